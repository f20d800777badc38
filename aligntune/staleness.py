"""When a group may be admitted and which groups a step trains on. Pure.

Invariant: with these two rules no token is trained on that is older than `max_staleness` policy
versions. Admission bounds how many groups can be open; the choice of a batch never leaves behind a
group that would be too old for the next step, and waits for it instead.
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

    Groups at the age limit are in the batch or hold it back; the rest is filled with ready groups,
    oldest id first.
    """
    due: list[int] = []
    others: list[int] = []
    for group in sorted(groups, key=lambda g: g.group_id):
        if group.version + max_staleness <= version:
            if not group.ready:
                return None
            due.append(group.group_id)
        elif group.ready:
            others.append(group.group_id)
    batch = (due + others)[:groups_per_step]
    return sorted(batch) if len(batch) == groups_per_step else None
