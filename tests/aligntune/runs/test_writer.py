"""Work on files beside the loop: in order, and no failure lost."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence

import pytest

from aligntune.errors import RunFailed
from aligntune.runs import writer as module
from aligntune.runs.writer import Joined, Writer


def test_jobs_are_done_in_order_beside_whoever_gives_them() -> None:
    done: list[int] = []
    go = threading.Event()
    writer = Writer("the files of a run")
    writer.do(lambda: go.wait(30))
    for number in range(100):
        writer.do(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == []
    go.set()
    writer.wait()
    assert done == list(range(100))
    writer.close()
    assert not writer._thread.is_alive()


def test_a_job_that_fails_is_heard_of_by_the_next_one_and_at_the_end() -> None:
    writer = Writer("the files of run x")

    def full() -> None:
        raise OSError("No space left on device")

    writer.do(full)
    reason = "the files of run x: OSError: No space left on device"
    with pytest.raises(RunFailed, match=reason):
        writer.wait()
    with pytest.raises(RunFailed, match=reason):
        writer.do(lambda: None)
    with pytest.raises(RunFailed, match=reason):
        writer.close()


def test_a_job_without_room_is_tried_again_and_those_after_it_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    done: list[str] = []
    left = [OSError(errno.ENOSPC, "No space left on device")] * 3

    def full() -> None:
        if left:
            raise left.pop()
        done.append("first")

    writer = Writer("the files of run x")
    writer.do(full)
    writer.do(lambda: done.append("second"))
    writer.wait()
    assert done == ["first", "second"]
    monkeypatch.setattr(module, "SECONDS", 0.2)
    left += [OSError(errno.ENOSPC, "No space left on device")] * 10**6
    writer.do(full)
    writer.do(lambda: done.append("third"))
    with pytest.raises(RunFailed, match=r"the files of run x: OSError: .*No space left"):
        writer.close()
    assert done == ["first", "second"], "nothing is done after what was not"


@pytest.mark.slow
def test_a_disk_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.05)
    go = threading.Event()
    writer = Writer("the files of run x")
    writer.do(lambda: go.wait(30))
    with pytest.raises(RunFailed, match=r"no write has ended within 0\.05 s"):
        writer.close()
    go.set()


@pytest.mark.slow
def test_whoever_waits_does_so_as_long_as_jobs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.4)
    writer, done = Writer("the files of run x"), list[int]()
    for number in range(8):
        writer.do(lambda number=number: (time.sleep(0.1), done.append(number)))  # type: ignore[misc]
    writer.close()
    assert done == list(range(8))


def test_items_that_wait_behind_each_other_are_written_at_once_and_in_their_order() -> None:
    written: list[list[int]] = []

    def write(items: Sequence[int]) -> None:
        written.append([*items])

    go = threading.Event()
    writer = Writer("the files of run x")
    writer.do(lambda: go.wait(30))
    for number in range(3):
        writer.do(Joined(write, number))
    writer.do(lambda: write([-1]))
    for number in range(3, 5):
        writer.do(Joined(write, number))
    go.set()
    writer.close()
    assert written == [[0, 1, 2], [-1], [3, 4]]
