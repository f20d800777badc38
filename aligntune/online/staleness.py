"""When a group may be admitted and which groups a step trains on. Pure.

Invariant: with these two rules no token is trained on that is older than `max_staleness` policy
versions. Admission bounds how many groups can be open; the choice of a batch never leaves more
groups behind than can still be trained in time, and waits for late ones instead. A group's age
counts from its dispatch: one that waits for a replica has no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Cohort:
    """The open groups dispatched at one policy version, without those of a running update."""

    version: int
    size: int
    ready: Set[int]  # ids


def free_slots(
    version: int, max_staleness: int, groups_per_step: int, trained: int, in_flight: int
) -> int:
    """How many groups may be admitted now: never negative.

    `trained` groups and the `in_flight` ones together never exceed what the versions up to
    `version + max_staleness` will train on.
    """
    return max(0, (max_staleness + version + 1) * groups_per_step - (trained + in_flight))


def choose_batch(
    cohorts: Iterable[Cohort], version: int, max_staleness: int, groups_per_step: int
) -> list[int] | None:
    """Ids of the groups the next step trains on, in id order, or None to go on waiting.

    The oldest ready groups are taken. The step waits where it would leave more groups of some age
    behind than the steps until their age limit can still train. To find that it has to wait takes
    no look at any single group.
    """
    oldest_first = sorted(cohorts, key=lambda cohort: cohort.version)
    missing, left_behind = groups_per_step, 0
    for cohort in oldest_first:
        taken = min(missing, len(cohort.ready))
        missing -= taken
        left_behind += cohort.size - taken
        steps_left = cohort.version + max_staleness - version
        if cohort.size and left_behind > steps_left * groups_per_step:
            return None
    if missing:
        return None
    batch: list[int] = []
    for cohort in oldest_first:
        batch += sorted(cohort.ready)[: groups_per_step - len(batch)]
    return sorted(batch)
