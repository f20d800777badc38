"""How a step's rows lie in micro-batches and on ranks: padding, balance and time in step; exact.

Lengths are drawn: prompts lognormal(5, 0.6), responses lognormal(6.2, sigma), groups of 8, a budget
of 16,384 tokens. Four ways, on the same rows:

greedy   whole groups on ranks, micro-batches filled one after the other
whole    whole groups on ranks, all ranks cut at the same places: what runs
rows     single rows on ranks, all ranks cut at the same places
dealt    rows cut before they are dealt out to ranks

    python -m tests.bench packing           also as: make bench NAME=packing
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

from actors.messages import Row
from actors.packing import A_MICROBATCH, cost, microbatches, share_out, split, widest
from tests.bench.report import Measured, Target

GROUP = 8
BUDGET = 16_384
SEEDS = 4
CASES = [  # groups a step, ranks
    *((32, ranks) for ranks in (1, 2, 4, 8)),
    *((128, ranks) for ranks in (1, 2, 4, 8)),
    *((512, ranks) for ranks in (8, 64)),
    (2048, 64),
]
SIGMAS = (0.5, 1.0)
SIZES = (256, 1024, 4096, 16_384)  # rows, for the planner's own time
Parts = list[list[tuple[Row, ...]]]  # micro-batches by rank


def groups_of(count: int, sigma: float, seed: int) -> list[list[Row]]:
    """Rows of groups of `GROUP`, with lengths of a long tail."""
    draw = random.Random(seed)
    groups = []
    for work in range(count):
        prompt = 1 + int(draw.lognormvariate(5, 0.6))
        lengths = [1 + int(draw.lognormvariate(6.2, sigma)) for _ in range(GROUP)]
        groups.append([Row(work, i, prompt + length) for i, length in enumerate(lengths)])
    return groups


def greedy(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """Micro-batches filled one after the other, longest rows first."""
    ordered = sorted(rows, key=lambda row: -row.tokens)
    ends, start = [], 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or (end + 1 - start) * ordered[start].tokens > BUDGET:
            ends.append(end)
            start = end
    return [tuple(ordered[a:b]) for a, b in pairwise([0, *ends])]


def of_microbatch(batch: Sequence[Row]) -> int:
    """Cost of a padded micro-batch in tokens, attention's square in it."""
    return len(batch) * cost(max(row.tokens for row in batch))


def cut_alike(shares: Sequence[Sequence[Row]]) -> Parts:
    """Micro-batches that end at the same places on all ranks."""
    widths = widest([[row.tokens for row in share] for share in shares])
    return [list(microbatches(share, BUDGET, False, widths)) for share in shares]


def ways(groups: list[list[Row]], ranks: int) -> dict[str, Parts]:
    """The micro-batches of each rank, by way."""
    rows = [row for group in groups for row in group]
    shares = share_out([[row] for row in rows], ranks)
    single = split([cost(row.tokens) for row in rows], ranks)
    first = microbatches(rows, BUDGET, False)
    dealt = split([of_microbatch(batch) for batch in first], ranks)
    return {
        "greedy": [greedy(share) for share in shares],
        "whole": cut_alike(shares),
        "rows": cut_alike([[rows[index] for index in share] for share in single]),
        "dealt": [[first[index] for index in share] for share in dealt],
    }


def figures(parts: Parts) -> dict[str, float]:
    """Exact figures of one way.

    padding       share of the tokens computed that no row has
    cost          cost of the costliest rank's rows over the mean, less 1; attention's square in it
    tokens        the same of tokens
    in_step       time over the ideal, less 1, where each round of micro-batches waits for its
                  slowest (FSDP, ZeRO 2 and 3)
    alone         the same where ranks wait at the end alone (ZeRO 1)
    reads         ranks that read a group's arrays, mean
    microbatches  of a rank, at most
    """
    ranks = len(parts)
    rows = [[row for batch in part for row in batch] for part in parts]
    real = sum(row.tokens for own in rows for row in own)
    padded = sum(len(batch) * max(row.tokens for row in batch) for part in parts for batch in part)
    costs = [sum(cost(row.tokens) for row in own) for own in rows]
    tokens = [sum(row.tokens for row in own) for own in rows]
    ideal = sum(costs) / ranks
    rounds = range(max(map(len, parts)))
    in_step = sum(max(of_microbatch(p[k]) for p in parts if k < len(p)) for k in rounds)
    reads = sum(len({row.work for row in own}) for own in rows)
    return {
        "padding": 1 - real / padded,
        "cost": max(costs) / ideal - 1,
        "tokens": max(tokens) * ranks / real - 1,
        "in_step": in_step / ideal - 1,
        "alone": max(sum(map(of_microbatch, part)) for part in parts) / ideal - 1,
        "reads": reads / len({row.work for own in rows for row in own}),
        "microbatches": len(rounds),
    }


def milliseconds(rows: int, packed: bool) -> float:
    """Processor time of one plan, median of 5."""
    flat = [row for group in groups_of(rows // GROUP, 1.0, 0) for row in group]
    seen = []
    for _ in range(5):
        began = time.process_time()
        microbatches(flat, BUDGET, packed)
        seen.append(time.process_time() - began)
    return statistics.median(seen) * 1e3


def split_milliseconds(groups: int, ranks: int) -> float:
    """Processor time of sharing groups out, median of 5."""
    draw = random.Random(0)
    costs = [int(draw.lognormvariate(9, 0.5)) for _ in range(groups)]
    seen = []
    for _ in range(5):
        began = time.process_time()
        split(costs, ranks)
        seen.append(time.process_time() - began)
    return statistics.median(seen) * 1e3


def measure() -> Measured:
    """All cases, and the planner's own time."""
    found: dict[str, float] = {}
    for sigma in SIGMAS:
        for count, ranks in CASES:
            seen: dict[str, list[float]] = {}
            for seed in range(SEEDS):
                for way, parts in ways(groups_of(count, sigma, seed), ranks).items():
                    for name, value in figures(parts).items():
                        seen.setdefault(f"{way}/{name}", []).append(value)
            case = f"sigma_{sigma}/{count * GROUP}_rows/{ranks}_ranks"
            found |= {f"{case}/{name}": statistics.mean(each) for name, each in seen.items()}
    for packed in (False, True):
        way = "packed" if packed else "padded"
        times = {rows: milliseconds(rows, packed) for rows in SIZES}
        found |= {f"plan_ms/{way}/{rows}": each for rows, each in times.items()}
    for count, ranks in ((2048, 64), (4096, 512)):
        found[f"split_ms/{count}_groups/{ranks}_ranks"] = split_milliseconds(count, ranks)
    targets = [
        Target(f"sigma_1.0/{count * GROUP}_rows/{ranks}_ranks/whole/{name}", limit)
        for count, ranks in CASES
        for name, limit in (("padding", 0.02), ("cost", 0.01))
    ]
    return Measured(found, tuple(targets), {"a_microbatch": A_MICROBATCH})
