"""A run of any kind from its claim to its release, and what its events say however it ends.

Invariant: a folder that was claimed is let go of; a run that was begun in `events.jsonl` has ended
there, as finished or as stopped with the reason, unless its process was killed.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, Self, TypeVar

from aligntune import cycles
from aligntune.config.backends import Backend, check_installed
from aligntune.config.records import TrackingSpec
from aligntune.errors import Interrupted, RunFailed, UserError
from aligntune.runs import failure
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind
from aligntune.tracking.ready import check_ready
from aligntune.tracking.trackers import TrackerMissing, check_settings, check_trackers
from cluster.session import resolve_address
from cluster.specs import ClusterSpec


class Records(Protocol):
    """What a run writes into while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> object: ...

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Write an event."""


R = TypeVar("R", bound=Records)


def check_programs(backend: Backend, tracking: TrackingSpec, cluster: ClusterSpec) -> None:
    """Whether what a run needs beside its model and data is installed, and its trackers can begin.
    Raises UserError."""
    if resolve_address(cluster) == "local":
        check_installed(backend)
    check_settings(tracking)
    try:
        check_trackers(tracking.trackers)
    except TrackerMissing as error:
        raise UserError(str(error)) from error
    check_ready(tracking.trackers)


def ray_runs(address: str) -> str:
    """What a person is told once a run has its Ray."""
    return "Ray runs on this machine" if address == "local" else f"connected to Ray at {address}"


@contextmanager
def claimed(rundir: RunDir) -> Iterator[None]:
    """The run directory is this process's. Raises UserError where another holds it."""
    rundir.claim()
    try:
        yield
    finally:
        rundir.release()


@contextmanager
def _signals_told() -> Iterator[None]:
    """SIGTERM raises, as SIGINT does, and both come out as Interrupted. Ray has SIGTERM raise
    SystemExit with its number, from when it starts on."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _end) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        raise Interrupted(signal.SIGTERM) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(number)


@contextmanager
def recorded(
    records: R, rundir: RunDir, last_step: int, failures: tuple[type[Exception], ...] = ()
) -> Iterator[R]:
    """A run whose start and end are events; `records` are open while it lasts.

    `failures` are errors whose message is written for people: their own line ends the run.

    Raises:
        Interrupted, UserError: as they came; Interrupted too for SIGINT and SIGTERM outside of a
            loop that hears them, as while Ray starts or the report is written.
        RunFailed: for anything else.
    """
    cycles.as_usual()
    with _signals_told(), records:
        changed = {path: now for path, (_, now) in rundir.changed.items()}
        records.event(EventKind.RUN_STARTED, changed=changed)
        try:
            with _signals_told():
                yield records
        except (Interrupted, UserError, RunFailed) as told:
            records.event(EventKind.RUN_STOPPED, reason=str(told))
            raise
        except failures as told:
            records.event(EventKind.RUN_STOPPED, reason=str(told))
            raise RunFailed(str(told)) from None
        except Exception as unforeseen:
            reason, log = failure.reason(unforeseen), failure.write_log(rundir, unforeseen)
            trace = "".join(traceback.format_exception(unforeseen))
            records.event(EventKind.RUN_STOPPED, reason=reason, traceback=trace)
            raise RunFailed(f"{reason} (the traceback is in {log})") from unforeseen
        records.event(EventKind.RUN_FINISHED, step=last_step)
