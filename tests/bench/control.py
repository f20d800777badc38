"""What the driver costs: the real loop over roles that answer at once, without Ray.

Controller, pipeline, ledger, learner, replica sets and recorder are the run's own; the actors they
call are stand-ins whose answers are there when they are asked. Processor time, so that a machine
that is busy with something else shows little; sizes take turns, and the median of rounds counts.

    python -m tests.bench control           also as: make bench NAME=control
"""

from __future__ import annotations

import asyncio
import cProfile
import gc
import io
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from actors.messages import (
    FinishReason,
    GroupRecord,
    Prompt,
    Sampling,
    Scores,
    UpdateResult,
    VersionSpan,
)
from actors.supervise import ReplicaSet
from aligntune.config.load import load_config
from aligntune.online.assemble import assemble
from aligntune.online.recorder import OnlineRecorder
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.rundir import RunDir
from tests.bench.report import Measured, Target

SIZES = (64, 256, 1024, 4096)  # groups of a step
GROUPS = 4096  # of a run
ROUNDS = 5
STALENESS = (0, 1)
PROFILED = 1024
COMPLETIONS = 4


class Ref:
    """A reference whose value is there."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def future(self) -> Future[Any]:
        """As Ray's."""
        future: Future[Any] = Future()
        future.set_result(self.value)
        return future


class Method:
    """A remote method of a stand-in."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._returns = 1

    def options(self, num_returns: int) -> Method:
        """As Ray's."""
        self._returns = num_returns
        return self

    def remote(self, *args: Any) -> Any:
        """A reference to the answer, or one to each of several."""
        value = self._call(*(arg.value if isinstance(arg, Ref) else arg for arg in args))
        return [Ref(each) for each in value] if self._returns > 1 else Ref(value)


class Actor:
    """An actor of any role. The rollouts' version is that of the last export."""

    version = 0

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self, f"_{name}"))

    def _start(self, *_: Any) -> dict[str, Any]:
        return {"max_concurrent_groups": 32}

    def _address(self) -> tuple[str, int]:
        return "", 0

    def _sees(self, _: str) -> tuple[bool, str]:
        return True, ""

    def _generate(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupRecord, int]:
        lengths = tuple(100 + (sampling.group_id * 7 + i) % 50 for i in range(COMPLETIONS))
        spans = tuple((VersionSpan(Actor.version, length),) for length in lengths)
        stop = (FinishReason.STOP,) * COMPLETIONS
        record = GroupRecord(sampling.group_id, 20, lengths, stop, spans, 0.1, "rollout-0")
        return record, sampling.group_id

    def _score(self, prompt: Prompt, group_id: int) -> tuple[Scores, tuple[str, ...]]:
        values = tuple((float((group_id + i) % 3),) for i in range(COMPLETIONS))
        return Scores(group_id, ("length",), values, 0.1), ("text",) * COMPLETIONS

    def _update(self, job: Any) -> UpdateResult:
        return UpdateResult({"loss/policy": 0.0}, 0.1)

    def _export_weights(self, version: int, _: bool = False) -> tuple[int, str]:
        Actor.version = version
        return 0, "weights"

    def _load_weights(self, _: Any) -> float:
        return 0.1

    def _save_model(self, folder: str) -> None: ...


class Run:
    """One run of the loop, ready to go."""

    def __init__(
        self,
        folder: Path,
        per_step: int,
        steps: int,
        max_staleness: int,
        maker: Callable[[Any], Callable[[int, str], Any]] = lambda role: (
            lambda index, name: Actor()
        ),
        rollout: Mapping[str, Any] | None = None,
    ) -> None:
        """`maker(role)` makes its actors; `rollout`: settings other than usual."""
        Actor.version = 0
        self.groups = per_step * steps
        self.sets: list[ReplicaSet] = []
        self._stack = ExitStack()
        for quiet in (redirect_stdout, redirect_stderr):  # its progress
            self._stack.enter_context(quiet(io.StringIO()))
        config = load_config(
            {
                "algorithm": {"name": "grpo", "beta": 0.0},
                "model": {"name": "m"},
                "data": {"path": "d"},
                "rewards": ["length"],
                "output_dir": str(folder),
                "train": {
                    "steps": steps,
                    "groups_per_step": per_step,
                    "completions_per_group": COMPLETIONS,
                    "max_staleness": max_staleness,
                },
                "rollout": {"max_concurrent_groups": 32, **(rollout or {})},
                "reward": {"max_concurrent_groups": 16},
                "checkpoint": {"every_steps": steps, "at_end": False},
                "tracking": {"trackers": []},
            }
        )
        prompt = Prompt(0, "a", "a", np.array([1]))
        roles: Any = SimpleNamespace(maker=maker, room=lambda role: None)
        prompts: Any = SimpleNamespace(prompt_at=lambda position: prompt, fingerprint="f")
        rundir = RunDir(folder)
        self._recorder = self._stack.enter_context(OnlineRecorder(config, rundir, steps, 0))
        self._stack.enter_context(mock.patch("ray.kill"))
        checkpoints = mock.create_autospec(Checkpoints, instance=True)
        checkpoints.exists.return_value = True  # none is written
        checkpoints.bytes_read = 0  # of an instance, which a specification does not show
        self.controller = assemble(
            config,
            roles,
            steps,
            prompts,
            [],
            rundir,
            checkpoints,
            self._recorder,
            replica_set=self._replica_set,
        )

    def _replica_set(self, *args: Any, **options: Any) -> ReplicaSet:
        self.sets.append(partial(ReplicaSet, kill=lambda handle: None)(*args, **options))
        return self.sets[-1]

    def go(self, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        """To the last step, on an event loop that `loop` makes."""
        with self._stack, asyncio.Runner(loop_factory=loop) as runner:
            runner.run(self.controller.run(None))


@contextmanager
def ready(per_step: int, steps: int, max_staleness: int) -> Iterator[Run]:
    """A run in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="bench-control-") as folder:
        yield Run(Path(folder), per_step, steps, max_staleness)


def seconds_a_group(per_step: int, groups: int, max_staleness: int) -> float:
    """Processor seconds of the driver for one group."""
    with ready(per_step, max(1, groups // per_step), max_staleness) as run:
        gc.collect()
        began = time.process_time()
        run.go()
        return (time.process_time() - began) / run.groups


def calls_a_group(per_step: int, steps: int, max_staleness: int) -> float:
    """Function calls of the driver for one group: a cost that no other process touches."""
    profile = cProfile.Profile()
    with ready(per_step, steps, max_staleness) as run:
        profile.runcall(run.go)
        return sum(entry.callcount for entry in profile.getstats()) / run.groups


def profiled(per_step: int, groups: int) -> list[dict[str, Any]]:
    """The ten functions with the most processor time of their own, in microseconds a group."""
    profile = cProfile.Profile(time.process_time)
    with ready(per_step, max(1, groups // per_step), 0) as run:
        profile.runcall(run.go)
        count = run.groups
    stats: dict[tuple[str, int, str], tuple[Any, ...]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    top = sorted(stats.items(), key=lambda item: -item[1][2])[:10]
    return [
        {
            "function": f"{Path(file).name}:{line} {name}" if line else name,
            "own_us": round(own / count * 1e6, 1),
            "calls": round(calls / count, 1),
        }
        for (file, line, name), (_, calls, own, *_rest) in top
    ]


def measure() -> Measured:
    """Every size in every round, one after the other."""
    seen: dict[tuple[int, int], list[float]] = {}
    for _ in range(ROUNDS):
        for max_staleness in STALENESS:
            for size in SIZES:
                found = seconds_a_group(size, GROUPS, max_staleness)
                seen.setdefault((max_staleness, size), []).append(found * 1e6)
    medians = {key: statistics.median(values) for key, values in seen.items()}
    figures, targets = {}, []
    for staleness in STALENESS:
        for size in SIZES:
            figures[f"us_a_group/staleness_{staleness}/{size}"] = medians[staleness, size]
        ratio = f"us_a_group/staleness_{staleness}/{SIZES[-1]}_over_{SIZES[0]}"
        figures[ratio] = medians[staleness, SIZES[-1]] / medians[staleness, SIZES[0]]
        targets.append(Target(ratio, 1.3))
    rounds = {f"staleness_{s}/{n}": [round(x, 1) for x in v] for (s, n), v in seen.items()}
    profile = profiled(PROFILED, GROUPS)
    return Measured(figures, tuple(targets), {"rounds_us": rounds, "profile": profile})
