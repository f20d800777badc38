"""Work on files beside the loop: small jobs, one after the other, in a thread.

Invariant: what is given first is done first. A job that finds no room on the disk is tried again,
and those after it wait; of one that fails whoever gives the next one, or waits, hears, and nothing
is done after it. So a job must leave nothing behind where it fails.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from aligntune.errors import RunFailed
from aligntune.runs.deadline import THREAD
from aligntune.runs.disk import is_full

SECONDS = 120.0  # a disk that takes no write for so long is a run that cannot go on
PAUSE_SECONDS = 1.0  # between two tries on a disk that is full

Job = Callable[[], object]


class Writer:
    """Jobs for one folder, done in order."""

    def __init__(self, what: str) -> None:
        """`what` the jobs write, for the message where they fail."""
        self._what = what
        self._jobs: queue.SimpleQueue[Job | threading.Event | None] = queue.SimpleQueue()
        self._trouble: BaseException | None = None  # of the job that is tried again
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        """Have a job done. Raises RunFailed where an earlier one failed."""
        self._raise(self._failure)
        self._jobs.put(job)

    def wait(self) -> None:
        """Until all that was given is done. Raises RunFailed where one failed or hangs."""
        done = threading.Event()
        self._jobs.put(done)
        if not done.wait(SECONDS) and self._thread.is_alive():
            self._raise(self._failure or self._trouble)
            raise RunFailed(f"{self._what}: no write has ended within {SECONDS:g} s")
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
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
            elif self._failure is None:
                self._failure = self._failed(job)

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
