"""When updates can begin at best under a staleness bound: list scheduling, of nothing but the law.

It shares no code with the loop. Groups start in the order of the prompts, each as soon as there is
a slot and the law allows it, and nobody knows how long one takes. The law: a group is trained on at
most `staleness` versions after that of its first token, every group is, and a step has `per_step`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a run has to do; all times in seconds."""

    groups: Sequence[float]  # how long each takes a slot
    per_step: int
    slots: int
    update: float
    staleness: int
    export: float = 0.0  # after an update; the policy does nothing else
    load: float = 0.0  # after an export; no slot goes on meanwhile

    @property
    def steps(self) -> int:
        """Of the run."""
        return len(self.groups) // self.per_step


def update_starts(work: Work) -> list[float]:
    """When each update begins."""
    starts: list[float] = []
    labels: dict[int, int] = {}  # version of the first token, of each group not yet trained on
    running: dict[int, float] = {}  # group: its end
    done: set[int] = set()
    ends: dict[str, float] = {}  # of an update, an export and a load
    now, started = 0.0, 0
    trained = exported = served = 0  # versions
    while True:
        if "load" not in ends:
            if exported > served:
                ends["load"], served = now + work.load, exported
                running = {group: end + work.load for group, end in running.items()}
            else:
                may = min(len(work.groups), (served + work.staleness + 1) * work.per_step)
                while len(running) < work.slots and started < may:
                    labels[started], running[started] = served, now + work.groups[started]
                    started += 1
        if "update" not in ends and "export" not in ends:
            batch = _batch(labels, done, trained, work)
            if batch:
                starts.append(now)
                if len(starts) == work.steps:
                    return starts
                ends["update"] = now + work.update
                for group in batch:
                    del labels[group]
                    done.remove(group)
        now = min([*running.values(), *ends.values()])
        over = [group for group, end in running.items() if end <= now]
        done.update(over)
        for group in over:
            del running[group]
        for what in [what for what, end in ends.items() if end <= now]:
            del ends[what]
            if what == "update":
                trained += 1
                ends["export"] = now + work.export
            elif what == "export":
                exported = trained


def _batch(
    labels: Mapping[int, int], done: Collection[int], version: int, work: Work
) -> list[int] | None:
    """The oldest groups that are done, unless one left behind could not be trained on in time."""
    oldest_first = sorted(labels, key=lambda group: (labels[group], group))
    batch = [group for group in oldest_first if group in done][: work.per_step]
    if len(batch) < work.per_step:
        return None
    taken, left = set(batch), 0
    for group in oldest_first:
        left += group not in taken
        if left > (labels[group] + work.staleness - version) * work.per_step:
            return None
    return batch
