"""Work on files beside the loop: small jobs, one after the other, in a thread.

Invariant: what is given first is done first, and a job that fails is not lost: whoever gives the
next one, or waits, hears of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from aligntune.errors import RunFailed
from aligntune.runs.deadline import THREAD

SECONDS = 120.0  # a disk that takes no write for so long is a run that cannot go on

Job = Callable[[], object]


class Writer:
    """Jobs for one folder, done in order."""

    def __init__(self, what: str) -> None:
        """`what` the jobs write, for the message where they fail."""
        self._what = what
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        """Have a job done. Raises RunFailed where an earlier one failed."""
        self._raise()
        self._jobs.put(job)

    def wait(self) -> None:
        """Until all that was given is done. Raises RunFailed where one failed or hangs."""
        done = threading.Event()
        self._jobs.put(done.set)
        if not done.wait(SECONDS) and self._thread.is_alive():
            raise RunFailed(f"{self._what}: no write has ended within {SECONDS:g} s")
        self._raise()

    def close(self) -> None:
        """Do what is left, and end."""
        try:
            self.wait()
        finally:
            self._jobs.put(None)
            self._thread.join(1.0)

    def _raise(self) -> None:
        if self._failure is not None:
            error = self._failure
            raise RunFailed(f"{self._what}: {type(error).__name__}: {error}") from error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - for whoever gives the next one
                self._failure = self._failure or error
