"""Denominators and figures of an optimiser step, exact over its micro-batches and ranks.

Invariant: a denominator is global over the optimiser step, and how rows were cut and shared shows
in no figure.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch

from actors.fetching import Fetched, rows_beside
from actors.messages import Counts, LossTerms, Row


class Tally:
    """Numerators and maxima of one optimiser step on one rank, to be joined with the others'."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.sums: dict[str, tuple[float, str]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, terms: LossTerms) -> float:
        """Take in one micro-batch, whose figures leave the device together; returns its loss."""
        of_sums = [value for value, _ in terms.sums.values()]
        loss, *others = numbers([terms.loss, *of_sums, *terms.maxima.values()])
        self.loss += loss
        for (name, (_, count)), value in zip(terms.sums.items(), others, strict=False):
            known, _ = self.sums.get(name, (0.0, count))
            self.sums[name] = (known + value, count)
        for name, peak in zip(terms.maxima, others[len(of_sums) :], strict=True):
            self.maxima[name] = max(self.maxima.get(name, -math.inf), peak)
        return loss


def numbers(scalars: Sequence[torch.Tensor]) -> list[float]:
    """Tensors of one number each as numbers: one copy from the device, so one wait for it."""
    found: list[float] = torch.stack(
        [one.detach().double().reshape(()) for one in scalars]
    ).tolist()
    return found


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


def total(parts: Sequence[Counts]) -> Counts:
    """The denominators of several ranks together."""
    return Counts(
        tokens=sum(part.tokens for part in parts),
        rows=sum(part.rows for part in parts),
        nonempty_rows=sum(part.nonempty_rows for part in parts),
    )


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
