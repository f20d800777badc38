"""When a group may be admitted and which groups a step trains on. Pure.

Invariant: with these two rules no token is trained on that is older than `max_staleness` policy
versions. Admission bounds how many groups can be open; the choice of a batch never leaves more
groups behind than can still be trained in time, and waits for late ones instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OpenGroup:
    """An admitted group that has not ended. `version` is the policy's at its admission."""

    group_id: int
    version: int
    ready: bool


def free_slots(
    version: int, max_staleness: int, groups_per_step: int, trained: int, in_flight: int
) -> int:
    """How many groups may be admitted now: never negative.

    `trained` groups and the `in_flight` ones together never exceed what the versions up to
    `version + max_staleness` will train on.
    """
    return max(0, (max_staleness + version + 1) * groups_per_step - (trained + in_flight))


def choose_batch(
    groups: Iterable[OpenGroup], version: int, max_staleness: int, groups_per_step: int
) -> list[int] | None:
    """Ids of the groups the next step trains on, in id order, or None to go on waiting.

    The oldest ready groups are taken. The step waits where it would leave more groups of some age
    behind than the steps until their age limit can still train.
    """
    oldest_first = sorted(groups, key=lambda g: (g.version, g.group_id))
    batch = [g for g in oldest_first if g.ready][:groups_per_step]
    if len(batch) < groups_per_step:
        return None
    taken = {g.group_id for g in batch}
    left_behind = 0
    for group in oldest_first:
        left_behind += group.group_id not in taken
        steps_left = group.version + max_staleness - version
        if left_behind > steps_left * groups_per_step:
            return None
    return sorted(taken)
