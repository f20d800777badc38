"""The arrays of a rank's groups, fetched from the object store. Shapes: N response tokens."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.messages import GroupTensors, GroupWork, Row, TokenTargets


@dataclass(frozen=True)
class Fetched:
    """The arrays of one group, on this rank."""

    work: GroupWork
    tensors: GroupTensors
    reference: np.ndarray | None  # [N]
    targets: TokenTargets | None
    old: np.ndarray | None = None  # [N], where they were computed for this update

    def mask(self, row: int) -> np.ndarray:
        """Which response tokens of a row are trained on, [n] bool."""
        mask = np.asarray(self.tensors.mask[self.tensors.completion(row)], dtype=bool)
        return mask if self.work.trained[self.work.rollouts[row]] else np.zeros_like(mask)

    def rollout_tokens(self, row: int) -> int:
        """How many tokens of a row's whole rollout are trained on."""
        return sum(int(self.mask(other).sum()) for other in rows_beside(row, self.work.rollouts))


def rows_beside(row: int, rollouts: Sequence[int]) -> range:
    """The rows of the rollout that `row` belongs to; `rollouts` [R] of all rows ascend."""
    owner = rollouts[row]
    return range(bisect_left(rollouts, owner), bisect_right(rollouts, owner))


def of_several_rows(
    rows: Sequence[Row], groups: Mapping[int, Fetched]
) -> dict[tuple[int, int], list[Row]]:
    """Those of `rows` that are not their whole rollout, by (work, rollout)."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        rollouts = groups[row.work].work.rollouts
        if len(rows_beside(row.completion, rollouts)) > 1:
            found.setdefault((row.work, rollouts[row.completion]), []).append(row)
    return found


class ArraysLost(RuntimeError):
    """Arrays of `groups` are gone with the node that held them; nothing was computed with any."""

    def __init__(self, groups: tuple[int, ...]) -> None:
        named = ", ".join(map(str, groups[:8])) + (", ..." if len(groups) > 8 else "")
        super().__init__(f"the arrays of groups {named} are lost with their node")
        self.groups = groups

    def __reduce__(self) -> tuple[type, tuple[tuple[int, ...]]]:
        return type(self), (self.groups,)


def fetch_or_lost(works: Sequence[GroupWork]) -> tuple[dict[int, Fetched], tuple[int, ...]]:
    """As `fetch`, and the ids of the groups whose arrays are lost, which are left out."""
    if "ray" not in sys.modules:  # then there is nothing that could be lost
        return fetch(works), ()
    from ray.exceptions import ObjectLostError

    try:
        return fetch(works), ()
    except ObjectLostError:
        found: dict[int, Fetched] = {}
        lost = []
        for index, work in enumerate(works):
            try:
                found[index] = fetch([work])[0]
            except ObjectLostError:
                lost.append(work.group_id)
        return found, tuple(lost)


def fetch(works: Sequence[GroupWork]) -> dict[int, Fetched]:
    """The arrays of `works`, by their index; values of states are left where they are."""
    tensors = objects([work.tensors for work in works])
    references = objects([work.reference for work in works])
    targets = objects([work.targets for work in works])
    found = zip(works, tensors, references, targets, strict=True)
    return {index: Fetched(*parts) for index, parts in enumerate(found)}


def objects(values: Sequence[Any]) -> list[Any]:
    """Values with Ray references replaced by what they refer to; plain objects need no Ray."""
    found = list(values)
    if "ray" not in sys.modules:  # then nothing can be a reference
        return found
    import ray

    places = [index for index, value in enumerate(found) if isinstance(value, ray.ObjectRef)]
    if not places:  # even an empty `ray.get` starts a Ray where there is none
        return found
    for index, value in zip(places, ray.get([found[i] for i in places]), strict=True):
        found[index] = value
    return found
