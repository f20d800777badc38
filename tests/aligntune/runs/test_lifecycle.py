"""However a run ends, its folder is free again and its last event says how."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from aligntune.errors import Interrupted, RunFailed, UserError
from aligntune.runs.lifecycle import claimed, recorded
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind


class Kept:
    """Records that keep the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.open = False

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.open = False

    def event(self, kind: EventKind, **fields: Any) -> None:
        assert self.open
        self.events.append((kind, fields))


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_a_run_that_ends_well_has_its_start_with_what_changed_and_its_end(rundir: RunDir) -> None:
    rundir.changed = {"train.steps": (2, 3)}
    with recorded(Kept(), rundir, last_step=3) as records:
        pass
    assert records.events == [
        (EventKind.RUN_STARTED, {"changed": {"train.steps": 3}}),
        (EventKind.RUN_FINISHED, {"step": 3}),
    ]
    assert not records.open


class Told(RuntimeError):
    """An error whose message is for people."""


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (Interrupted(15), Interrupted, "stopped by signal 15"),
        (UserError("wrong input"), UserError, "wrong input"),
        (RunFailed("it went wrong"), RunFailed, "it went wrong"),
        (Told("a rank is lost"), RunFailed, "a rank is lost"),
        (LookupError("nobody\nthought of it"), RunFailed, "LookupError: nobody thought of it"),
    ],
)
def test_a_run_that_ends_otherwise_says_why_and_frees_its_folder(
    rundir: RunDir, error: Exception, raised: type[Exception], said: str
) -> None:
    records = Kept()
    with (
        pytest.raises(raised) as ended,
        claimed(rundir),
        recorded(records, rundir, last_step=3, failures=(Told,)),
    ):
        raise error
    assert str(ended.value).startswith(said)
    assert "\n" not in str(ended.value)
    _, (kind, fields) = records.events
    assert (kind, fields["reason"]) == (EventKind.RUN_STOPPED, said)
    assert ("traceback" in fields) == isinstance(error, LookupError)
    assert ended.value.__cause__ is (error if isinstance(error, LookupError) else None)
    rundir.claim()
    rundir.release()


def end_by_signal(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 10)  # the handler runs by its end


@pytest.mark.parametrize(
    ("end", "number"),
    [
        (end_by_signal, signal.SIGTERM),
        (lambda: sys.exit(signal.SIGTERM), signal.SIGTERM),  # as Ray's handler
        (lambda: end_by_signal(signal.SIGINT), signal.SIGINT),
    ],
)
def test_a_signal_that_no_loop_hears_stops_the_run_and_says_so(
    rundir: RunDir, end: Callable[[], None], number: int
) -> None:
    records, before = Kept(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as ended, recorded(records, rundir, last_step=3):
        end()
    assert ended.value.signal == number
    _, (kind, fields) = records.events
    assert (kind, fields["reason"]) == (EventKind.RUN_STOPPED, f"stopped by signal {number}")
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_that_comes_as_the_records_are_closed_is_told_too(rundir: RunDir) -> None:
    class Closing(Kept):
        def __exit__(self, *exc: Any) -> None:
            super().__exit__(*exc)
            end_by_signal()

    records = Closing()
    with pytest.raises(Interrupted) as ended, recorded(records, rundir, last_step=3):
        pass
    assert ended.value.signal == signal.SIGTERM
    assert [kind for kind, _ in records.events][-1] == EventKind.RUN_FINISHED


def test_another_exit_stays_what_it_is(rundir: RunDir) -> None:
    with pytest.raises(SystemExit) as ended, recorded(Kept(), rundir, last_step=3):
        sys.exit(3)
    assert ended.value.code == 3


def test_what_fails_between_the_claim_and_the_record_frees_the_folder(rundir: RunDir) -> None:
    def describe() -> None:
        with pytest.raises(UserError, match="in use by a running process"):
            RunDir(rundir.path).claim()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), claimed(rundir):
        describe()
    with claimed(rundir):
        pass
