"""Plays a history with the real controller, and looks at what is left of it.

Invariant of every history: whatever breaks, the run ends by itself, each time with a reason; the
books balance after each end and each kill; what the last weights have learned is what the ledger
says, each group once; figures, evaluations and samples are there once.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import io
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from actors import environment as environments
from actors.environments.base import EpisodeFailed
from actors.environments.specs import EpisodeCode
from actors.scoring.criteria import EpisodeCriterion, RewardFailed, RewardFailure
from actors.supervise import ReplicaSet
from aligntune.algorithms import registry
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.errors import Interrupted, RunFailed
from aligntune.online import keeper, ranks, watch
from aligntune.online.assemble import assemble
from aligntune.online.controller import Controller
from aligntune.online.ledger import audit
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.role_table import limits_of
from aligntune.online.running import FAILURES
from aligntune.runs import copies
from aligntune.runs import recorder as recorders
from aligntune.runs.checkpoint import Checkpoint, Checkpoints
from aligntune.runs.jsonl import read_lines
from aligntune.runs.lifecycle import recorded
from aligntune.runs.rundir import RunDir
from cluster import processes
from tests.histories.cast import Meeting, Rank, Reference, Reward, Rollout, check, prompt_at
from tests.histories.clock import VirtualLoop
from tests.histories.episodes import Environment, Played, owners_of
from tests.histories.history import DEFAULT, Fault, History
from tests.histories.stage import Actor

ENDS_WELL = (
    "the policy was lost",
    "replica is left",
    "were quarantined, more than",
    "could not be written to",
    "kept; reward of those filtered",
    "groups were drawn and filtered",
    "prompts was scored",
)
"""What a run may end with that lost too much: it says so, and is called again."""

CRITERIA: Any = (
    SimpleNamespace(name="length"),
    EpisodeCriterion("environment", "environment"),
)
LIMIT_S = 60.0  # of any call: the clock goes on faster where less is asked while it hangs
SLOW_S = 40.0
HELD_OUT = 2
COMPLETIONS = 2


class Killed(SystemExit):
    """The driver is gone."""


class LateWriter:
    """As `Writer`, in the loop's own thread: what was given is written a little later."""

    def __init__(self, what: str) -> None:
        self._jobs: list[Callable[[], object]] = []

    def do(self, job: Callable[[], object]) -> None:
        """Have a job done."""
        self._jobs.append(job)
        if len(self._jobs) > 3:
            self.wait()

    def wait(self) -> None:
        """Until all that was given is done."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job()

    def close(self) -> None:
        """Do what is left."""
        self.wait()


class BreakingCheckpoints(Checkpoints):
    """On a disk that breaks as `stage` says."""

    stage: Process

    def begin(self, step: int) -> Path:
        """See `Checkpoints`."""
        self.stage.disk("begin")
        return super().begin(step)

    def commit(self, step: int, *args: Any) -> Checkpoint:
        """See `Checkpoints`."""
        self.stage.disk("commit")
        return super().commit(step, *args)


class Process:
    """One process of a run."""

    def __init__(self, history: History, number: int, folder: Path, faults: list[Fault]) -> None:
        self.history = history
        self.number = number
        self.folder = folder
        self.faults = faults
        self.fired: list[Fault] = []
        self.settings = {**DEFAULT, **history.settings}
        for change in history.changes[:number]:
            self.settings |= change
        self.dice = random.Random(f"{history.seed} {number}")
        self.times: Counter[str] = Counter()
        self.actors: list[Actor] = []
        self.meetings: dict[str, Meeting] = {}
        self.controller: Controller | None = None
        self.cut_short = False  # killed after it was asked to stop, before it had
        self.left: Path | None = None  # what a kill has left
        self.late: float | None = 0.0  # how long the disk takes for what it is at; None: for ever

    def _config(self) -> RunConfig:
        told, history = self.settings, self.history
        critic = history.algorithm == "ppo"
        several = {"ranks": told["ranks"], "strategy": "fsdp" if told["ranks"] > 1 else "torch"}
        start = {"start_timeout_s": LIMIT_S}
        limits = {"update_timeout_s": LIMIT_S, **start}
        reference, plays = told["beta"] > 0, told["environments"] > 0
        rewards = [{"model" if critic else "function": "length", "timeout_s": LIMIT_S}]
        frozen = {"replicas": told["replicas"], "timeout_s": LIMIT_S, **start}
        options: dict[str, Any] = {"name": history.algorithm, "beta": told["beta"]}
        if history.algorithm == "dapo":
            options |= {"overlong_shaping": False, "max_sampling_rounds": 50}
        return load_config(
            {
                "algorithm": options,
                "model": {"name": "m"},
                "data": {"path": "d", "eval_path": "e"},
                "rewards": [*rewards, *(["environment"] if plays else [])],
                "output_dir": str(self.folder),
                "train": {
                    "steps": told["steps"],
                    "groups_per_step": told["groups"],
                    "groups_per_minibatch": told["groups"],
                    "completions_per_group": COMPLETIONS,
                    "epochs_per_batch": 1,
                    "max_staleness": told["staleness"],
                    "max_quarantined_fraction": 0.4,
                },
                "eval": {"every_steps": told["evaluate_every"]},
                "checkpoint": {"every_steps": told["save_every"], "keep_last": told["keep"]},
                "tracking": {"trackers": [], "samples_per_step": told["samples"]},
                "policy": {**several, **limits},
                "rollout": {
                    "replicas": told["replicas"],
                    "max_concurrent_groups": told["at_once"],
                    "generation_timeout_s": LIMIT_S,
                    "max_prompt_length": 16,
                    "weight_timeout_s": LIMIT_S,
                    **start,
                    **({"max_replicas": told["replicas"] + 1} if told["grow"] else {}),
                },
                "reward": {
                    "replicas": told["replicas"],
                    "max_concurrent_groups": told["at_once"],
                    **start,
                },
                **(
                    {
                        "environment": "m:E",
                        "episodes": {"replicas": told["environments"], **start},
                    }
                    if plays
                    else {}
                ),
                **({"critic": {**several, **limits}} if critic else {}),
                **({"reference": frozen} if reference else {}),
            }
        )

    # What breaks

    def due(self, place: str) -> str | None:
        """What happens now that `place` is come to, once more."""
        number, self.times[place] = self.times[place], self.times[place] + 1
        for fault in self.faults:
            here = fault.process is None or fault.process == self.number
            if here and (fault.place, fault.number) == (place, number):
                self.faults.remove(fault)
                self.fired.append(fault)
                return fault.kind
        return None

    async def around(self, actor: Actor, method: str) -> None:
        """An actor is asked for something."""
        role = actor.name.rsplit("-", 1)[0]
        pause = self.dice.choice((0.0, 0.0, 0.1, 1.0, 5.0))
        for place in (f"{role}.{method}", "any"):
            if (kind := self.due(place)) is not None:
                await self._breaks(actor, place, kind)
        await asyncio.sleep(pause)

    async def _breaks(self, actor: Actor, place: str, kind: str) -> None:
        await asyncio.sleep(self.dice.choice((0.0, 0.5)))
        living = [other for other in self.actors if not other.dead]
        match kind:
            case "die":
                actor.kill()
                await asyncio.sleep(0)
            case "lose its node":
                actor.lose_node()
                await asyncio.sleep(0)
            case "lose arrays":
                for other in self.dice.sample(living, min(2, len(living))):
                    for ref in other._made:
                        ref.lose()
            case "wedge":
                actor.deaf = True
                await asyncio.Event().wait()
            case "hang":
                await asyncio.Event().wait()
            case "slow":
                await asyncio.sleep(SLOW_S)
            case "kill another":
                self.dice.choice(living).kill()
                await asyncio.sleep(0)
            case "fail" if place == "episode.tool":
                raise EpisodeFailed("by chance")
            case "fail by the machine":
                raise EpisodeFailed("by chance", infrastructure=True)
            case "fail":
                raise RewardFailed("length", RewardFailure.RAISED, "by chance")
            case "disk":
                raise OSError(errno.ENOSPC, "No space left on device")
            case "stop":
                self.stop()
            case "kill":
                self.kill()
            case _:
                raise AssertionError(f"{place}: {kind}")

    def disk(self, what: str) -> None:
        """The driver is at its disk."""
        match self.due(f"disk.{what}"):
            case "disk":
                raise OSError(errno.ENOSPC, "No space left on device")
            case "slow":
                self.late = SLOW_S
            case "hang":
                self.late = None
            case "stop":
                self.stop()
            case "kill":
                self.kill()

    def asked(self, ask: Callable[[], Any]) -> Future[Any]:
        """As `deadline.asked`, without a thread."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()  # as a thread is not cancelled
        self.late = 0.0
        try:
            value, error = ask(), None
        except Exception as raised:  # noqa: BLE001 - for whoever waits
            value, error = None, raised

        def settle() -> None:
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        if self.late is not None:
            asyncio.get_running_loop().call_later(self.late, settle)
        return answer

    def stop(self) -> None:
        """SIGTERM."""
        if self.controller is not None:
            self.controller.stop(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what is on disk now is what is left."""
        self.cut_short = self.controller is not None and bool(self.controller.state.signal)
        self.left = self.folder.with_name(f"{self.folder.name}-{self.number}")
        shutil.copytree(self.folder, self.left)
        if self.history.torn:
            for path in sorted(self.left.glob("*.jsonl")):
                with path.open("ab") as file:
                    file.write(b'{"step": 1, "ev'[: self.dice.randint(0, 15)])
        raise Killed(137)

    # Who plays

    def maker(self, role: Any) -> Callable[[int, str], Actor]:
        """As `Roles.maker`."""

        def make(index: int, name: str) -> Actor:
            if index == 0:
                self.meetings[role.name] = Meeting(role.size(self.config))
            self.actors.append(Actor(self._worker(role.name, name), self._around_of(role.name)))
            return self.actors[-1]

        return make

    def room(self, role: Any) -> Callable[[int], bool]:
        """As `Roles.room`."""
        return lambda index: self.dice.random() < 0.5

    def _actor(self, name: str) -> Actor:
        return next(actor for actor in self.actors if actor.name == name)

    def _worker(self, role: str, name: str) -> Any:
        if role == "rollout":

            async def meets(group: int) -> None:
                if group in self.history.poison:
                    self._actor(name).kill()
                    await asyncio.sleep(0)

            return Rollout(name, meets)
        if role == "environment":
            return self._environment(name)
        if role == "reward":
            return Reward(name, self.scores)
        if role == "reference":
            return Reference(name)
        return Rank(name, self.settings["staleness"], self.meetings[role])

    def _environment(self, name: str) -> Environment:
        async def breaks() -> None:
            await asyncio.sleep(self.dice.choice((0.0, 0.1, 1.0)))
            if (kind := self.due("episode.tool")) is not None:
                await self._breaks(self._actor(name), "episode.tool", kind)

        played = Played(self.history.unplayable, breaks)
        with mock.patch.object(environments, "episodes_of", return_value=played):
            made = Environment(
                self.config.model,
                self.config.episodes,
                EpisodeCode(),
                limits_of(self.config),
                name,
                LIMIT_S,
                self.settings["lockstep"],
                drop=lambda ref: ref.drop(),
            )
        made.name = name
        return made

    def _around_of(self, role: str) -> Any:
        async def around(actor: Actor, method: str) -> None:
            await self.around(actor, method)

        return around

    def scores(self, group: int) -> tuple[float, ...]:
        """What the completions of a group are worth."""
        if group in self.history.unscored:
            raise RewardFailed("length", RewardFailure.RAISED, "it never works")
        return (1.0, 1.0) if group % 7 in self.history.constant else (1.0, 0.0)

    def _play(self) -> str:
        self.config = self._config()
        loop = VirtualLoop()
        rundir = RunDir(self.folder)
        checkpoints = BreakingCheckpoints(self.folder / "checkpoints", self.settings["keep"])
        checkpoints.stage = self
        checkpoint = checkpoints.latest()
        steps = self.settings["steps"]
        after = checkpoint.step if checkpoint else 0
        prompts = SimpleNamespace(prompt_at=prompt_at, fingerprint="f")
        held_out = [prompt_at(position) for position in range(HELD_OUT)]
        try:
            with (
                recorded(
                    OnlineRecorder(self.config, rundir, steps, after), rundir, steps, FAILURES
                ) as recorder,
            ):
                self.controller = assemble(
                    self.config,
                    self,  # type: ignore[arg-type]
                    steps,
                    prompts,  # type: ignore[arg-type]
                    held_out,
                    rundir,
                    checkpoints,
                    recorder,
                    criteria=CRITERIA if self.settings["environments"] else (),
                    replica_set=functools.partial(
                        ReplicaSet, kill=lambda hand: hand.kill(), drop=lambda ref: ref.drop()
                    ),
                )
                loop.run(self.controller.run(checkpoint))
        except Interrupted:
            return "stopped"
        except Killed:
            return "killed"
        except RunFailed as failed:
            return str(failed)
        finally:
            check(not loop.unheard, f"errors that nobody heard of: {loop.unheard}")
        return "finished"

    def play(self) -> str:
        """Run the process to its end; how it ended: finished, stopped, killed, or the reason."""
        ray = SimpleNamespace(kill=lambda hand: hand.kill())
        replaced = [
            *((module, "asked", self.asked) for module in (keeper, watch, copies)),
            (ranks, "ray", ray),
            (recorders, "Writer", LateWriter),
            (registry, "entry_points", lambda group: []),
            (processes, "EVERY_S", LIMIT_S),
            (RunDir, "describe", lambda *args: None),
            (os, "fsync", lambda descriptor: None),
        ]
        with ExitStack() as stack:
            for where, name, with_what in replaced:
                stack.enter_context(mock.patch.object(where, name, with_what))
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
            return self._play()


def play(history: History, folder: Path, fired: list[Fault] | None = None) -> list[str]:
    """Play a history to the end of the run, in a new folder; how its processes ended. The faults
    that came about go to `fired`.

    Raises AssertionError, or whatever a defect raises.
    """
    run = folder / "run"
    run.mkdir()
    faults, ends, cut_short = list(history.faults), [], False
    while True:
        process = Process(history, len(ends), run, faults)
        before = _restores(run), _rebuilds(run)
        ends.append(process.play())
        if fired is not None:
            fired += process.fired
        run, cut_short = process.left or run, cut_short or process.cut_short
        _check_books(run)
        if process.left is None:
            _check_visible(run, before)
        if ends[-1] == "finished":
            _check_whole(process, run, cut_short)
            return ends
        if ends[-1] not in ("stopped", "killed"):
            check(any(known in ends[-1] for known in ENDS_WELL), f"ended with: {ends[-1]}")
            if "were quarantined" in ends[-1] or "prompts was scored" in ends[-1]:
                return ends  # so it will again
        most = len(history.faults) + 2
        check(len(ends) < most, f"{len(ends)} processes and no end: {ends}")


def _records(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / name
    return read_lines(path) if path.exists() else []


def _restores(run: Path) -> int:
    return sum(record["event"] == "restore" for record in _records(run, "ledger.jsonl"))


def _rebuilds(run: Path) -> int:
    return sum(event["kind"] == "policy_rebuilt" for event in _records(run, "events.jsonl"))


def _check_books(run: Path) -> None:
    """After any end."""
    ledger = run / "ledger.jsonl"
    if ledger.exists():
        check(audit(ledger).balanced, "the books do not balance")
    for name in ("metrics.jsonl", "evals.jsonl"):
        steps = [row["step"] for row in _records(run, name)]
        check(steps == sorted(set(steps)), f"{name} has the steps {steps}")


def _check_visible(run: Path, before: tuple[int, int]) -> None:
    """Each going back is an event, but for the start of a process."""
    back, told = _restores(run) - before[0], _rebuilds(run) - before[1]
    check(back <= told + 1, f"went back {back} times and told of {told}")


def _check_whole(process: Process, run: Path, cut_short: bool) -> None:
    """After the end of a run. One that was killed amid its stop may lack an evaluation: it saves
    first."""
    settings, history = process.settings, process.history
    steps, per_step = settings["steps"], settings["groups"]
    books = audit(run / "ledger.jsonl")
    check(books.open == 0, f"groups are left open: {books}")
    ends = surviving(run)
    check(sorted(ends) == list(range(books.admitted)), f"groups end {ends}")
    trained: dict[int, list[int]] = {}
    for group, end in ends.items():
        if isinstance(end, int):
            trained.setdefault(end, []).append(group)
    check(sorted(trained) == list(range(1, steps + 1)), f"trained are {trained}")
    check(all(len(groups) == per_step for groups in trained.values()), f"trained are {trained}")
    learned = learned_by(run / "model")
    plays = settings["environments"] > 0
    rows = {
        step: [[group, row] for group in sorted(of) for row in range(rows_of(group, plays))]
        for step, of in trained.items()
    }
    check(learned == rows, f"the weights learned {learned}, the ledger says {trained}")
    figures = _records(run, "metrics.jsonl")
    check(
        [row["step"] for row in figures] == list(range(1, steps + 1)), "figures of a step are gone"
    )
    oldest = max((row["staleness/max"] for row in figures), default=0)
    widest = max([history.settings["staleness"], *(c.get("staleness", 0) for c in history.changes)])
    check(oldest <= widest, f"a group was {oldest} versions old")
    for name in ("filtered", "quarantined"):
        count = sum(row[f"groups/{name}"] for row in figures)
        check(count == getattr(books, name), f"{count} {name} in the figures, {books}")
    every = settings["evaluate_every"]
    evaluated = {0, steps} | (
        {s for s in range(1, steps + 1) if s % every == 0} if every else set()
    )
    kept = [(r["step"], round(r["eval/reward/mean"], 6)) for r in _records(run, "evals.jsonl")]
    wanted = [(step, round(0.5 + step / 10, 6)) for step in sorted(evaluated)]
    few = cut_short and set(kept) <= set(wanted) and len(kept) == len(set(kept))
    check(kept == wanted or few, f"evaluations are {kept}")
    samples = [(row["step"], row["group"]) for row in _records(run, "samples.jsonl")]
    check(len(samples) == len(set(samples)), f"samples are {samples}")
    check(all(group in trained[step] for step, group in samples), f"samples are {samples}")
    if not history.changes:
        check(len(samples) == steps * min(settings["samples"], per_step), f"samples: {samples}")
    if not books.quarantined and not any("staleness" in c for c in history.changes):
        _check_order(history, trained, ends)


def _check_order(history: History, trained: dict[int, list[int]], ends: dict[int, Any]) -> None:
    """At staleness 0 the groups of the steps are those of a run in which nothing breaks."""
    if history.settings["staleness"] == 0:
        kept = sorted(group for groups in trained.values() for group in groups)
        per_step = history.settings["groups"]
        due = {i // per_step + 1: kept[i : i + per_step] for i in range(0, len(kept), per_step)}
        check(trained == due, f"groups are trained in another order: {trained}")
        filters = history.algorithm == "dapo"
        expected = {group for group in ends if filters and group % 7 in history.constant}
        filtered = {group for group, end in ends.items() if end == "FILTERED"}
        check(filtered == expected, f"filtered are {filtered}, should be {expected}")


def surviving(run: Path) -> dict[int, Any]:
    """How each group ended in the history that survived: in which step, FILTERED or QUARANTINED."""
    ended: dict[int, Any] = {}
    marks: dict[int, dict[int, Any]] = {0: {}}
    for record in read_lines(run / "ledger.jsonl"):
        match record["event"]:
            case "checkpoint":
                marks[record["step"]] = dict(ended)
            case "restore":
                ended = dict(marks[record["step"]])
            case "move" if record["to"] in ("TRAINED", "FILTERED", "QUARANTINED"):
                how = record["step"] if record["to"] == "TRAINED" else record["to"]
                for group in record["groups"]:
                    check(group not in ended, f"group {group} ends twice")
                    ended[group] = how
    return ended


def rows_of(group: int, plays: bool) -> int:
    """How many rows a group has: one a completion, more where histories are written anew."""
    return len(owners_of(group, COMPLETIONS)) if plays else COMPLETIONS


def learned_by(folder: Path) -> dict[int, list[list[int]]]:
    """The rows that all ranks of the policy together have learned, step by step."""
    learned: dict[int, list[list[int]]] = {}
    for part in sorted(folder.glob("policy-*")):
        for step, rows in json.loads(part.read_text(encoding="utf-8")).items():
            learned[int(step)] = sorted([*learned.get(int(step), []), *rows])
    return learned
