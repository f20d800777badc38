"""A run without processes: roles that answer at once, each of which can be told to misbehave."""

from __future__ import annotations

import asyncio
import os
import signal
import zlib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from actors.disk import Sums
from actors.messages import (
    FinishReason,
    GroupRecord,
    GroupWork,
    Prompt,
    Scores,
    UpdateResult,
    VersionSpan,
)
from aligntune.algorithms.base import Algorithm
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.assemble import assemble
from aligntune.online.controller import Controller
from aligntune.online.learner import PolicyLost
from aligntune.online.recorder import OnlineRecorder
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.jsonl import read_lines
from aligntune.runs.rundir import RunDir

STEPS = 3


Hook = Callable[..., Any]


EVALUATED = [(step, step, round(0.5 + step / 10, 6)) for step in range(STEPS + 1)]


class Reference:
    """An object in the store, or one that is gone with its node."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(self._value, Exception):
            future.set_exception(self._value)
        else:
            future.set_result(self._value)
        return future


def ahead(max_staleness: int) -> dict[str, Any]:
    """Rollouts that may run ahead of the updates."""
    return {
        "steps": STEPS,
        "groups_per_step": 2,
        "completions_per_group": 2,
        "groups_per_minibatch": 2,
        "max_staleness": max_staleness,
    }


async def settle() -> None:
    """Lets whatever can go on go on."""
    for _ in range(50):
        await asyncio.sleep(0)


class World:
    """A run's folder, and the roles of its processes, each of which can be told to misbehave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = RunConfig.model_construct()
        self.scores: Callable[[int], tuple[float, float]] = lambda group: (1.0, 0.0)
        self.texts: Callable[[int], Any] = lambda group: (f"{group}a", f"{group}b")
        self.during: dict[str, Hook] = {}  # role's method: called first, with what it was given
        self.evaluation_turns = 0  # of the event loop that an evaluation takes
        self.updates: list[tuple[int, Algorithm]] = []
        self.version = 0
        self.prepare: Hook | None = None
        self.controller: Controller | None = None
        self.task: asyncio.Task[Any] | None = None  # of the run, which a second Ctrl-C cancels
        self.checkpoints: Callable[[Path, int], Checkpoints] = Checkpoints
        self.mirror: Any = None
        self.roles: Any = SimpleNamespace(maker=lambda role: None, room=lambda role: None)
        self.replica_set: Callable[..., Any] = lambda *args, **_: FakeReplicas(self, *args)
        self.criteria: Sequence[Any] = ()
        self.learner: Callable[[World], Any] = FakeLearner

    async def happens(self, what: str, *args: Any) -> None:
        if hook := self.during.get(what):
            answer = hook(*args)
            if asyncio.iscoroutine(answer):
                await answer

    def configure(self, **changes: Any) -> None:
        """The run's settings, some other than usual; `algorithm` by default GRPO without KL."""
        self.config = load_config(
            {
                "algorithm": {"name": "grpo", "beta": 0.0},
                "model": {"name": "m"},
                "data": {"path": "d", "eval_path": "e"},
                "rewards": ["length"],
                "output_dir": str(self.folder),
                "train": ahead(0),
                "eval": {"every_steps": 1},
                "checkpoint": {"every_steps": 1},
                "tracking": {"trackers": []},
                **changes,
            }
        )

    def run(self, evaluated: bool = True, since: float | None = None) -> dict[str, float]:
        """One process of the run, from its newest checkpoint; it was called at `since`."""
        self.version = 0  # of the model that is started from
        rundir, prompt = RunDir(self.folder), Prompt(0, "a", "a", np.array([1]))
        checkpoints = self.checkpoints(self.folder / "checkpoints", 2)
        checkpoint = checkpoints.latest()
        prompts = SimpleNamespace(prompt_at=lambda position: prompt, fingerprint="f")
        after = checkpoint.step if checkpoint else 0
        with OnlineRecorder(self.config, rundir, STEPS, after, since) as recorder:
            self.controller = assemble(
                self.config,
                self.roles,
                STEPS,
                prompts,  # type: ignore[arg-type]
                [prompt] if evaluated else [],
                rundir,
                checkpoints,
                recorder,
                self.mirror,
                self.criteria,
                learner=self.learner(self),
                replica_set=self.replica_set,
            )
            return asyncio.run(self._whole(self.controller.run(checkpoint)))

    async def _whole(self, run: Coroutine[Any, Any, dict[str, float]]) -> dict[str, float]:
        self.task = asyncio.current_task()
        return await asyncio.wait_for(run, 60)

    def stop(self) -> None:
        assert self.controller is not None
        self.controller.stop(signal.SIGTERM)

    def trained(self) -> list[list[int]]:
        """The groups of each step in the history that survived."""
        steps: dict[int, list[int]] = {}
        for record in read_lines(self.folder / "ledger.jsonl"):
            if record["event"] == "restore":
                steps = {step: ids for step, ids in steps.items() if step <= record["step"]}
            if record["event"] == "move" and record["to"] == "TRAINED":
                steps[record["step"]] = record["groups"]
        return [steps[step] for step in sorted(steps)]

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl without times."""
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "rollout/"))}
            for row in read_lines(self.folder / "metrics.jsonl")
        ]

    def evaluated(self) -> list[tuple[int, int, float]]:
        """Step, version and reward of every row of evals.jsonl."""
        return [
            (row["step"], row["version"], round(row["eval/reward/mean"], 6))
            for row in read_lines(self.folder / "evals.jsonl")
        ]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_lines(self.folder / "events.jsonl") if e["kind"] == kind]


class FakeLearner:
    """Policy ranks that learn nothing, at once."""

    lost: str | None = None
    progress = 0
    handles: ClassVar[dict[str, Any]] = {}
    nodes: ClassVar[set[str]] = set()

    def __init__(self, world: World) -> None:
        self._world = world
        self._running = False

    def _check(self) -> None:
        if not self._running:
            raise PolicyLost("the policy ranks are not running")

    async def start(self) -> list[tuple[str, dict[str, Any]]]:
        self._running = True
        await self._world.happens("start")
        return [("policy-0", {"pid": 1})]

    async def blind(self, _: Path) -> list[str]:
        return []

    async def prepare(
        self, step: int, algorithm: Algorithm, works: Sequence[GroupWork]
    ) -> tuple[list[GroupWork], dict[str, float]]:
        self._check()
        return [*works], {}

    async def update(
        self, step: int, algorithm: Algorithm, works: Sequence[GroupWork]
    ) -> UpdateResult:
        self._check()
        self._world.updates.append((step, algorithm))
        await self._world.happens("update", step)
        return UpdateResult(metrics={"loss/policy": float(step)}, seconds=0.1)

    async def export(self, version: int) -> str:
        self._check()
        await self._world.happens("export", version)
        return f"weights {version}"

    async def snapshot(self) -> None:
        self._check()
        await self._world.happens("save")

    async def write(self, folder: Path) -> Sums:
        await self._world.happens("write", folder)
        (folder / "policy" / "weights").write_bytes(b"x")
        return {"policy/weights": (1, zlib.crc32(b"x"))}

    async def load(self, _: Path) -> None:
        await self._world.happens("load")

    async def save_model(self, folder: Path) -> None:
        os.makedirs(folder, exist_ok=True)

    def kill(self) -> None:
        self._running = False


class FakeReplicas:
    """Replicas that answer at once. Groups of evaluations, whose ids are negative, are heard of as
    `evaluate`, and their score tells the version that they are of."""

    progress = 0
    serving = 0  # for those who ask whether any is left
    handles: ClassVar[dict[str, Any]] = {}

    def __init__(self, world: World, role: str, size: int, make: Any, prepare: Any) -> None:
        self._world = world
        if role == "rollout":
            world.prepare = prepare

    async def start(self) -> None: ...

    def refill(self) -> None: ...

    async def broadcast(self, method: str, *args: Any, **_: Any) -> list[Any]:
        await self._world.happens(method, *args)
        if method == "load_weights":
            self._world.version = int(args[0].removeprefix("weights "))
        return []

    async def call(self, method: str, *args: Any, **options: Any) -> tuple[Any, ...]:
        world = self._world
        if dispatched := options.get("on_dispatch"):
            dispatched("replica-0")
        if method == "generate":
            group, version = args[1].group_id, world.version
            if group < 0:
                for _ in range(world.evaluation_turns):
                    await asyncio.sleep(0)
                await world.happens("evaluate", version)
            else:
                await world.happens("generate", *args)
            spans = ((VersionSpan(world.version, 1),),) * 2
            stop = (FinishReason.STOP,) * 2
            return GroupRecord(group, 1, (1, 1), stop, spans, 0.1, "replica-0"), group
        group = args[1]
        if group < 0:
            scores = (0.5 + world.version / 10,) * 2
        else:
            await world.happens("score", *args)
            scores = world.scores(group)
        values = tuple((score,) for score in scores)
        return Scores(group, ("length",), values, 0.1), Reference(world.texts(group))

    async def close(self) -> None: ...
