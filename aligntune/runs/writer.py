"""Work on files beside the loop: small jobs, one after the other, in a thread.

Invariant: what is given first is done first. A job that finds no room on the disk is tried again,
and those after it wait; of one that fails whoever gives the next one, or waits, hears, and nothing
is done after it. So a job must leave nothing behind where it fails. Whoever waits does so as long
as jobs end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aligntune.errors import RunFailed
from aligntune.runs.deadline import THREAD
from aligntune.runs.disk import is_full

SECONDS = 120.0  # a disk that takes no write for so long is a run that cannot go on
PAUSE_SECONDS = 1.0  # between two tries on a disk that is full

Job = Callable[[], object]


@dataclass(frozen=True)
class Joined:
    """A job that is one with those of the same `write` that wait right behind it: `write(items)`.
    On a slow disk it is the number of writes that takes the time."""

    write: Callable[[Sequence[Any]], object]
    item: Any

    def __call__(self) -> None:
        self.write([self.item])


Given = Job | threading.Event | None


class Writer:
    """Jobs for one folder, done in order."""

    def __init__(self, what: str) -> None:
        """`what` the jobs write, for the message where they fail."""
        self._what = what
        self._jobs: queue.SimpleQueue[Given] = queue.SimpleQueue()
        self._next: list[Given] = []  # what was taken of them, one at most
        self._ended = 0  # jobs
        self._trouble: BaseException | None = None  # of the job that is tried again
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        """Have a job done. Raises RunFailed where an earlier one failed."""
        self._raise(self._failure)
        self._jobs.put(job)

    def wait(self) -> None:
        """Until all that was given is done. Raises RunFailed where one failed, or where none has
        ended for `SECONDS`."""
        done = threading.Event()
        self._jobs.put(done)
        ended = self._ended
        while not done.wait(SECONDS) and self._thread.is_alive():
            if self._ended == ended:
                self._raise(self._failure or self._trouble)
                raise RunFailed(f"{self._what}: no write has ended within {SECONDS:g} s")
            ended = self._ended
        self._raise(self._failure)

    def close(self) -> None:
        """Do what is left, and end."""
        try:
            self.wait()
        finally:
            self._jobs.put(None)
            self._thread.join(1.0)

    def _raise(self, error: BaseException | None) -> None:
        if error is not None:
            raise RunFailed(f"{self._what}: {type(error).__name__}: {error}") from error

    def _run(self) -> None:
        while (job := self._taken()) is not None:
            if isinstance(job, threading.Event):
                job.set()
            elif self._failure is None:
                self._failure = self._failed(job)
                self._ended += 1

    def _taken(self) -> Given:
        """The next job, with those that are one with it."""
        job = self._next.pop() if self._next else self._jobs.get()
        if not isinstance(job, Joined):
            return job
        items = [job.item]
        while not self._next and not self._jobs.empty():  # nobody else takes one
            other = self._jobs.get()
            if isinstance(other, Joined) and other.write == job.write:
                items.append(other.item)
            else:
                self._next.append(other)
        return partial(job.write, items)

    def _failed(self, job: Job) -> BaseException | None:
        """Why a job has failed for good; None where it is done."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                job()
                self._trouble = None
                return None
            except BaseException as error:  # noqa: BLE001 - for whoever gives the next one
                if not is_full(error) or time.monotonic() > deadline:
                    return error
                self._trouble = error
            time.sleep(PAUSE_SECONDS)
