"""What a system shows of itself while it does a work: its steps, in wall and processor seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import psutil
from pydantic import BaseModel, ConfigDict

from tests.bench.end_to_end.work import Work

EVERY = 0.05  # seconds between two looks


class Group(BaseModel):
    """A prompt with its completions, as the system rewarded and trained on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    rewards: tuple[float, ...]


class Step(BaseModel):
    """One step after the warm-up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wall_s: float
    cpu_s: float  # of all the system's processes
    loss: float | None  # None: it is not the system's to tell
    groups: tuple[Group, ...]
    parts: dict[str, float] = {}  # seconds of what, where the system tells

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(sum(group.tokens) for group in self.groups)


class System(Protocol):
    """An adapter: does the work `steps` times after its own warm-up, and tells of each time."""

    def __call__(self, work: Work, steps: int) -> Sequence[Step]: ...


def expected_loss(groups: Sequence[Group], epsilon: float) -> float:
    """Of the first step, whose ratios are 1: minus the mean of the advantages over all tokens.

    An advantage is a reward less its group's mean, over the group's standard deviation.
    """
    total, tokens = 0.0, 0
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        variance = sum((r - mean) ** 2 for r in group.rewards) / (len(group.rewards) - 1)
        for reward, length in zip(group.rewards, group.tokens, strict=True):
            total += (reward - mean) / (variance**0.5 + epsilon) * length
            tokens += length
    return -total / tokens


def cpu_seconds() -> float:
    """Processor seconds of this process and all its descendants, those that ended among them."""
    found = 0.0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found += times.user + times.system + times.children_user + times.children_system
    return found


class Marks:
    """(wall, processor) seconds at every change of a count, seen from beside; `full` is called
    once, when it is as many as `most`."""

    def __init__(self, count: Callable[[], int], most: int, full: Callable[[], None]) -> None:
        self._count = count
        self._most, self._full = most, full
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.at: dict[int, tuple[float, float]] = {}

    def __enter__(self) -> Marks:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            over = self._end.wait(EVERY)
            count = self._count()
            if count not in self.at:
                self.at[count] = (time.perf_counter(), cpu_seconds())
                if max(self.at) >= self._most and count == max(self.at):
                    self._full()
            if over:
                return
