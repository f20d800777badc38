"""The real loop on a clock that jumps from timer to timer.

Controller, pipeline, ledger, learner and replica sets are the run's own; the actors are stand-ins
that take the seconds they are told to. No processor time is in what it shows.
"""

from __future__ import annotations

import asyncio
import selectors
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.messages import (
    FinishReason,
    GroupRecord,
    GroupSampling,
    Prompt,
    Scores,
    UpdateResult,
    VersionSpan,
)
from tests.bench.control import COMPLETIONS, Run


class Jump(selectors.DefaultSelector):
    """Waits for nothing: the time that it would have waited has passed at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        """What is ready, or else the clock goes on."""
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class Clock(asyncio.SelectorEventLoop):
    """An event loop without waiting. What it would give to a thread it does itself."""

    def __init__(self) -> None:
        self._jump = Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        """Seconds since the loop was made, on its own clock."""
        return self._jump.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """A future that is done."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whatever it raises belongs to who waits
            future.set_exception(error)
        return future


class Ref:
    """A reference to one value of a call."""

    def __init__(self, call: asyncio.Task[Any], place: int | None) -> None:
        self._call = call
        self._place = place

    @property
    def value(self) -> Any:
        """What the call gave."""
        made = self._call.result()
        return made if self._place is None else made[self._place]

    def future(self) -> Future[Any]:
        """As Ray's."""
        future: Future[Any] = Future()
        self._call.add_done_callback(
            lambda call: None if call.cancelled() else future.set_result(self.value)
        )
        return future


class Method:
    """A remote method of a stand-in."""

    def __init__(self, call: Callable[..., Any], returns: int = 1) -> None:
        self._call = call
        self._returns = returns

    def options(self, num_returns: int = 1, **_: Any) -> Method:
        """As Ray's."""
        return Method(self._call, num_returns)

    def remote(self, *args: Any) -> Any:
        """A reference to the answer, or one to each of several."""
        given = (arg.value if isinstance(arg, Ref) else arg for arg in args)
        call = asyncio.ensure_future(self._call(*given))
        if self._returns == 1:
            return Ref(call, None)
        return [Ref(call, place) for place in range(self._returns)]


@dataclass(frozen=True)
class Times:
    """What everything takes, in seconds."""

    group: Callable[[int], float]  # by its id
    update: Callable[[int], float]  # by its step
    export: float = 0.0
    load: Callable[[int], float] = lambda version: 0.0


@dataclass
class Seen:
    """What a run did."""

    starts: list[float] = field(default_factory=list)  # of the updates
    first_version: dict[int, int] = field(default_factory=dict)  # of a group's first token
    trained: dict[int, list[int]] = field(default_factory=dict)  # groups of a step


class Actor:
    """What every stand-in answers."""

    def __getattr__(self, name: str) -> Method:
        return Method(object.__getattribute__(self, f"_{name}"))

    async def _ping(self) -> int:
        return 0

    async def _address(self) -> tuple[str, int]:
        return "", 0

    async def _sees(self, _: str) -> tuple[bool, str]:
        return True, ""

    async def _start(self, *_: Any) -> dict[str, Any]:
        return {}


class Policy(Actor):
    """One rank: one call at a time, in the order in which they came."""

    def __init__(self, times: Times, seen: Seen) -> None:
        self._times = times
        self._seen = seen
        self._turn = asyncio.Lock()

    async def _update(self, job: Any) -> UpdateResult:
        async with self._turn:
            self._seen.starts.append(asyncio.get_running_loop().time())
            self._seen.trained[job.step] = [work.group_id for work in job.groups]
            await asyncio.sleep(self._times.update(job.step))
        return UpdateResult({"loss/policy": 0.0}, 0.1)

    async def _export_weights(self, version: int, _: bool = False) -> tuple[int, int]:
        async with self._turn:
            await asyncio.sleep(self._times.export)
        return 0, version

    async def _save_model(self, folder: str) -> None: ...


class Rollout(Actor):
    """One replica: any number of groups side by side, none of which goes on during a load."""

    def __init__(self, times: Times, seen: Seen) -> None:
        self._times = times
        self._seen = seen
        self._version = 0
        self._stood = 0.0  # seconds of all loads so far
        self._loaded = 0.0  # when the last one ends

    async def _generate(self, prompt: Prompt, sampling: GroupSampling) -> tuple[GroupRecord, int]:
        clock, group = asyncio.get_running_loop(), sampling.group_id
        if (left := self._loaded - clock.time()) > 0:
            await asyncio.sleep(left)
        began, stood, first = clock.time(), self._stood, self._version
        end = began + self._times.group(group)
        while True:  # loads put the end off
            left = end + self._stood - stood - clock.time()
            if left <= 1e-9:
                break
            await asyncio.sleep(left)
        self._seen.first_version[group] = first
        spans = ((VersionSpan(first, 50), VersionSpan(self._version, 50)),) * COMPLETIONS
        spans = spans if self._version > first else ((VersionSpan(first, 100),),) * COMPLETIONS
        stop = (FinishReason.STOP,) * COMPLETIONS
        return GroupRecord(group, 20, (100,) * COMPLETIONS, stop, spans, 0.1, "rollout-0"), group

    async def _load_weights(self, version: int) -> float:
        seconds = self._times.load(version)
        self._stood += seconds
        self._loaded = asyncio.get_running_loop().time() + seconds
        self._version = version
        await asyncio.sleep(seconds)
        return seconds


class Reward(Actor):
    """Scores at once."""

    async def _score(self, prompt: Prompt, group: int) -> tuple[Scores, tuple[str, ...]]:
        values = tuple((float((group + i) % 3),) for i in range(COMPLETIONS))
        return Scores(group, ("length",), values, 0.1), ("text",) * COMPLETIONS


def run(
    times: Times,
    per_step: int,
    steps: int,
    max_staleness: int,
    rollout: Mapping[str, Any],
) -> Seen:
    """One run to its last step; `rollout` has replicas and slots."""
    seen = Seen()

    def maker(role: Any) -> Callable[[int, str], Actor]:
        def make(index: int, name: str) -> Actor:
            if role.name == "policy":
                return Policy(times, seen)
            return Rollout(times, seen) if role.name == "rollout" else Reward()

        return make

    with tempfile.TemporaryDirectory(prefix="bench-virtual-") as folder:
        Run(Path(folder), per_step, steps, max_staleness, maker, rollout).go(Clock)
    return seen
