"""One rank's share of an update: its groups, its micro-batches, their padding, and the figures.

Invariant: a denominator is global over the optimiser step, and a figure is exact over micro-batches
and ranks; how rows were cut and shared shows in neither. Shapes: B rows of a micro-batch, T its
padded response width, N response tokens of a group.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from actors.messages import (
    Counts,
    GroupTensors,
    GroupWork,
    LossTerms,
    RolloutRows,
    Row,
    TokenTargets,
)

V = TypeVar("V")


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


@dataclass(frozen=True)
class Minibatch:
    """One optimiser step as this rank runs it."""

    batches: tuple[tuple[Row, ...], ...]  # this rank's micro-batches
    chunks: list[int]  # head calls of each micro-batch of the longest-running rank
    counts: Counts  # global
    tokens: int  # prompt and response tokens, global


class Tally:
    """Numerators and maxima of one optimiser step on one rank, to be joined with the others'."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.sums: dict[str, tuple[float, str]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, terms: LossTerms) -> None:
        """Take in one micro-batch."""
        self.loss += float(terms.loss.detach())
        for name, (value, count) in terms.sums.items():
            known, _ = self.sums.get(name, (0.0, count))
            self.sums[name] = (known + float(value.detach()), count)
        for name, peak in terms.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), float(peak.detach()))


def join(ranks: Sequence[Tally], counts: Counts) -> dict[str, float]:
    """Figures of one optimiser step over all its micro-batches and ranks."""
    figures = {}
    names = {name: count for rank in ranks for name, (_, count) in rank.sums.items()}
    for name, count in names.items():
        numerator = sum(rank.sums[name][0] for rank in ranks if name in rank.sums)
        denominator = getattr(counts, count)
        if denominator > 0:
            figures[name] = numerator / denominator
    for name in {name for rank in ranks for name in rank.maxima}:
        figures[name] = max(rank.maxima[name] for rank in ranks if name in rank.maxima)
    return figures


def over_steps(steps: Sequence[Mapping[str, float]], peaks: Container[str]) -> dict[str, float]:
    """Each figure's mean over the optimiser steps that have it; of `peaks` the largest."""
    joined = {}
    for name in sorted({name for figures in steps for name in figures}):
        seen = [figures[name] for figures in steps if name in figures]
        joined[name] = max(seen) if name in peaks else sum(seen) / len(seen)
    return joined


def count(rows: Sequence[Row], groups: Mapping[int, Fetched]) -> Counts:
    """The denominators of `rows` alone. A rollout of several rows counts with its first one."""
    tokens = [groups[row.work].mask(row.completion).sum() for row in rows]
    first = [
        groups[row.work].rollout_tokens(row.completion)
        for row in rows
        if rows_beside(row.completion, groups[row.work].work.rollouts)[0] == row.completion
    ]
    return Counts(
        tokens=float(sum(tokens)),
        rows=float(len(first)),
        nonempty_rows=float(sum(n > 0 for n in first)),
    )


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


def total(parts: Sequence[Counts]) -> Counts:
    """The denominators of several ranks together."""
    return Counts(
        tokens=sum(part.tokens for part in parts),
        rows=sum(part.rows for part in parts),
        nonempty_rows=sum(part.nonempty_rows for part in parts),
    )


def longest(chunks: Sequence[Sequence[int]]) -> list[int]:
    """Elementwise maximum of lists of unequal length: what every rank has to keep up with."""
    return [
        max(part[index] for part in chunks if index < len(part))
        for index in range(max(map(len, chunks)))
    ]


class Padding:
    """Where the flat response tokens of a micro-batch's rows lie in its padded [B, T]."""

    def __init__(
        self, groups: Mapping[int, Fetched], rows: Sequence[Row], device: torch.device
    ) -> None:
        self._groups = groups
        self._rows = rows
        self._device = device
        self.lengths = [groups[r.work].tensors.lengths[r.completion] for r in rows]
        self.width = max(1, *self.lengths)
        self._cells = torch.cat(
            [torch.arange(n) + self.width * place for place, n in enumerate(self.lengths)]
        ).to(device)

    def pad(self, flat: torch.Tensor) -> torch.Tensor:
        """Values of the rows' response tokens, in row order, as [B, T]; zeros elsewhere."""
        empty = flat.new_zeros(len(self._rows) * self.width)
        return empty.index_copy(0, self._cells, flat).view(len(self._rows), self.width)

    def mask(self) -> torch.Tensor:
        """[B, T] bool, the tokens that are trained on."""
        parts = [self._groups[row.work].mask(row.completion) for row in self._rows]
        return self.pad(torch.as_tensor(np.concatenate(parts), device=self._device))

    def rows(self, arrays: Mapping[int, np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        """The rows' cuts of arrays [N] by group, as [B, T] in `dtype`."""
        parts = [
            arrays[row.work][self._groups[row.work].tensors.completion(row.completion)]
            for row in self._rows
        ]
        return self.pad(torch.as_tensor(np.concatenate(parts), device=self._device).to(dtype))

    def rollouts(self) -> RolloutRows | None:
        """Which rollouts the rows belong to; None where each row is one of its own."""
        if not of_several_rows(self._rows, self._groups):
            return None
        owners = [(r.work, self._groups[r.work].work.rollouts[r.completion]) for r in self._rows]
        tokens = [self._groups[r.work].rollout_tokens(r.completion) for r in self._rows]
        return RolloutRows(
            index=torch.tensor([owners.index(owner) for owner in owners], device=self._device),
            tokens=torch.tensor(tokens, device=self._device),
        )

    def per_row(self, numbers: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """One number a row along its response, as [B, T] in `dtype`."""
        spread = torch.tensor(numbers, dtype=dtype).repeat_interleave(torch.tensor(self.lengths))
        return self.pad(spread.to(self._device))

    def of_each(self, what: str, pick: Callable[[Fetched], V | None]) -> dict[int, V]:
        """What `pick` finds in each of the rows' groups; empty where no group has it.

        Raises:
            ValueError: some groups have it and others have not.
        """
        groups = {row.work: self._groups[row.work] for row in self._rows}
        picked = {index: pick(group) for index, group in groups.items()}
        found = {index: value for index, value in picked.items() if value is not None}
        if found and len(found) < len(groups):
            raise ValueError(f"some groups of a micro-batch have {what} and others have none")
        return found


def fetch(works: Mapping[int, GroupWork]) -> dict[int, Fetched]:
    """The arrays of `works`, by the same keys; values of states are left where they are."""
    tensors = objects([work.tensors for work in works.values()])
    references = objects([work.reference for work in works.values()])
    targets = objects([work.targets for work in works.values()])
    return {
        index: Fetched(*parts)
        for index, *parts in zip(works, works.values(), tensors, references, targets, strict=True)
    }


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


def describe(
    terms: LossTerms, batch: Any, rows: Sequence[Row], groups: Mapping[int, Fetched], rank: int
) -> str:
    """What a person needs to find the cause of a non-finite loss."""
    ids = sorted({groups[row.work].tensors.group_id for row in rows})
    bad = [
        name
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and not bool(value.isfinite().all())
    ]
    seen = f"not finite in its inputs: {', '.join(bad)}" if bad else "its inputs are finite"
    return f"loss {float(terms.loss.detach())} on rank {rank} over groups {ids}, {seen}"
