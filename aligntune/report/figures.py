"""The figures of a run as a page holds them: thinned, rounded, and lengths counted. Pure."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.runs.measure import KEY
from aligntune.runs.reading import POINTS

BINS = 24
MOST_REPLICAS = 8  # that have curves of their own

Row = Mapping[str, Any]


LABELS = {"step", "version", KEY}
"""What a row has beside its figures."""


def names(rows: Sequence[Row]) -> set[str]:
    """The metrics in some rows of metrics.jsonl or evals.jsonl."""
    return {name for row in rows for name in row} - LABELS


OF_REPLICA = re.compile(r"rollout/(rollout-\d+)/")


def of_few_replicas(rows: Sequence[Row]) -> list[Row]:
    """Rows without the figures of each rollout replica, where there are more than `MOST_REPLICAS`:
    some hundred curves that nobody looks at."""
    found = {match[1] for name in names(rows) if (match := OF_REPLICA.match(name))}
    if len(found) <= MOST_REPLICAS:
        return list(rows)
    return [{n: value for n, value in row.items() if not OF_REPLICA.match(n)} for row in rows]


def thinned(rows: Sequence[Row], most: int = POINTS) -> list[Row]:
    """At most `most` rows: every k-th, counted back from the last."""
    every = max(1, -(-len(rows) // most))
    return list(rows[::-1][::every])[::-1]


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """{"steps": [N], "values": {metric: [N]}}, null where a row has no such figure."""
    found = sorted(names(rows))
    return {
        "steps": [row["step"] for row in rows],
        "values": {name: [rounded(row.get(name)) for row in rows] for name in found},
    }


def rounded(value: Any) -> float | int | None:
    """A figure with 5 digits, which no picture shows more of. None where that is no finite number:
    the largest float, at which a figure that overflowed is held, is rounded beyond it."""
    if not isinstance(value, int | float):
        return None
    short = float(f"{value:.5g}")
    if not math.isfinite(short):
        return None
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def histogram(samples: Mapping[str, Sequence[Row]]) -> dict[str, Any] | None:
    """Lengths of completions in tokens: {"edges": [B + 1], "counts": {label: [B]}}, as shares of
    each label's completions; None where there are none."""
    lengths = {
        label: [said["tokens"] for row in rows for said in row.get("completions", ())]
        for label, rows in samples.items()
    }
    lengths = {label: found for label, found in lengths.items() if found}
    if not lengths:
        return None
    longest = max(itertools.chain(*lengths.values()))
    width = max(1, -(-(longest + 1) // BINS))
    edges = list(range(0, longest + 1 + width, width))
    counts = {}
    for label, found in lengths.items():
        bins = [0] * (len(edges) - 1)
        for length in found:
            bins[length // width] += 1
        counts[label] = [rounded(count / len(found)) for count in bins]
    return {"edges": edges, "counts": counts}


def quarters(samples: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The samples of the first quarter of the steps that have any, and of the last."""
    steps = sorted({row["step"] for row in samples})
    if not steps:
        return [], []
    cut = max(1, len(steps) // 4)
    first, last = set(steps[:cut]), set(steps[-cut:])
    return [r for r in samples if r["step"] in first], [r for r in samples if r["step"] in last]
