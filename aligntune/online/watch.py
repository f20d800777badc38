"""Watches over a run from beside it: Ray's own processes, and whether anything moves at all.

Invariant: a run that cannot go on ends with the reason and the command that resumes it, also where
nobody would have answered any more. What the run waited for is written down first.
"""

from __future__ import annotations

import asyncio
import signal
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from psutil import Process

from actors.liveness import all_stacks, stacks_of
from actors.timeline import Timeline
from actors.whereabouts import whereabouts
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online.figures import EXPORTS, LOADS_WEIGHTS
from aligntune.online.keeper import Keeper
from aligntune.online.learner import Learner
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.serving import Serving
from aligntune.runs.deadline import asked
from aligntune.tracking.metrics import EventKind
from cluster.processes import draining, first_death

T = TypeVar("T")

CLOSE_SECONDS = 30.0  # for a run that is ended to let go of what it holds
DRAIN_SECONDS = 10.0  # between two looks at the nodes
LOOKS = 20  # within the time after which a run that does not move is stuck
OF_RANKS = ("address", "snapshot", "load", "save_model", *EXPORTS)
WAITED_FOR = frozenset({"start", *LOADS_WEIGHTS, *OF_RANKS})
"""Calls that go on for long and show nothing meanwhile. Each has a deadline of its own."""


class Watch:
    """Over one run, on the `processes` of Ray that it needs. Nothing of it holds the run up."""

    def __init__(
        self,
        config: RunConfig,
        recorder: OnlineRecorder,
        timeline: Timeline,
        learner: Learner,
        serving: Serving,
        keeper: Keeper,
        processes: Mapping[str, Process],
    ) -> None:
        self._train = config.train
        self._logs = Path(config.output_dir).absolute() / "logs"
        self._recorder = recorder
        self._timeline = timeline
        self._learner = learner
        self._serving = serving
        self._keeper = keeper
        self._processes = processes

    async def over(self, work: Coroutine[Any, Any, T], stop: Callable[[int, str], None]) -> T:
        """What `work` returns; `stop` asks it for its end. Raises RunFailed where it cannot come
        to one."""
        run = asyncio.create_task(work)
        watched = (self._ray(), self._movement(), self._time(stop), self._nodes(stop))
        guards = [asyncio.create_task(guard) for guard in watched]
        try:
            await asyncio.wait((run, *guards), return_when=asyncio.FIRST_COMPLETED)
            if run.done():
                return run.result()
            reason = next(guard.result() for guard in guards if guard.done())
            run.cancel()
            await asyncio.wait((run,), timeout=CLOSE_SECONDS)
            raise RunFailed(reason)
        finally:
            for task in (run, *guards):
                task.cancel()
            await asyncio.wait((run, *guards), timeout=CLOSE_SECONDS)

    async def _time(self, stop: Callable[[int, str], None]) -> str:
        """Ends a run in time, as a signal does. The time counts from when the run was called: data
        are fetched and Ray is started within it."""
        if (limit := self._train.time_limit_s) is not None:
            await asyncio.sleep(self._recorder.since + limit - time.monotonic())
            stop(signal.SIGTERM, f"train.time_limit_s={limit:g} is over")
        return await forever()

    async def _nodes(self, stop: Callable[[int, str], None]) -> str:
        """Ends a run whose ranks, or whose driver, are on a node that the cluster takes away."""
        while self._processes:
            await asyncio.sleep(DRAIN_SECONDS)
            nodes = {*self._learner.nodes, str(whereabouts()["node_id"])}
            try:
                gone = await asyncio.wrap_future(asked(partial(draining, nodes)))
            except Exception:  # noqa: BLE001 - a head that does not answer takes no node away
                continue
            if gone is not None:
                stop(signal.SIGTERM, f"node {gone[:8]} is being drained")
                break
        return await forever()

    def _progress(self) -> object:
        """Changes whenever anything does, and all the time in what has a deadline of its own."""
        keeper, timeline = self._keeper, self._timeline
        parts = (self._learner.progress, self._serving.progress, keeper.progress)
        timed = keeper.timed or any(span.method in WAITED_FOR for span in timeline.open)
        return timeline.calls, parts, time.monotonic() if timed else 0.0

    async def _ray(self) -> str:
        name = await first_death(self._processes)
        return f"Ray's {name} on this machine has died (killed, or out of memory?)"

    async def _movement(self) -> str:
        """Why the run is stuck, once it is. Time counts in looks: a machine that slept did not."""
        seen, still = self._progress(), 0
        while still < LOOKS:
            await asyncio.sleep(self._train.stall_timeout_s / LOOKS)
            now = self._progress()
            seen, still = now, still + 1 if now == seen else 0
        waits = "; ".join(self._timeline.running()[:5]) or "nothing that was asked of a process"
        try:
            path: str | None = str(await self._write())
            written = f"what every process was at is in {path}"
        except OSError as error:  # of a disk that is full, which may be why nothing moves
            path, written = None, f"what every process was at could not be written: {error}"
        limit = self._train.stall_timeout_s
        self._recorder.event(EventKind.STALLED, seconds=limit, path=path, waits=waits)
        return (
            f"nothing has moved for train.stall_timeout_s={limit:g} s; the run waits for {waits}; "
            f"{written}"
        )

    async def _write(self) -> Path:
        """The file with what everybody is at. Raises OSError."""
        found = [("the driver", all_stacks()), ("its tasks", tasks_of_this_loop())]
        found += await stacks_of({**self._learner.handles, **self._serving.handles})
        path = self._logs / f"stalled-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(f"==== {name}\n{what}\n" for name, what in found)
        path.write_text(text, encoding="utf-8")
        return path


def tasks_of_this_loop() -> str:
    """Where every task of the running event loop is, down to what it awaits, as text."""
    told = []
    for task in asyncio.all_tasks():
        told.append(f"task {task.get_name()}\n")
        waits: Any = task.get_coro()
        while (frame := getattr(waits, "cr_frame", None)) is not None:
            told += traceback.format_stack(frame, 1)
            waits = waits.cr_await
    return "".join(told)


async def forever() -> Any:
    """Never returns."""
    await asyncio.Event().wait()
