"""How old what is trained on is, where everything takes a random time: counted group by group.

The real loop on a virtual clock (`virtual`): groups of lognormal times (sigma 1), updates, exports
and loads of any length, several replicas, bounds 0 to 8. What is counted is what the stand-ins saw
and nothing that the loop says of itself.

    python -m tests.bench staleness         also as: make bench NAME=staleness
"""

from __future__ import annotations

import random
from collections import Counter

from tests.bench.report import Measured, Target
from tests.bench.virtual import Times, run

BOUNDS = range(9)
PER_STEP, STEPS = 8, 140  # 1,120 groups a bound, 10,080 in all


def ages(bound: int, steps: int, seed: int) -> tuple[Counter[int], int]:
    """How many groups were trained on at each age, in versions, and how many not exactly once."""
    draw = random.Random(f"{bound} {seed}")
    count = PER_STEP * steps
    groups = [draw.lognormvariate(-0.5, 1.0) for _ in range(count)]
    updates = [draw.lognormvariate(-0.5, 0.7) for _ in range(steps + 1)]
    loads = [draw.choice((0.0, 0.05, 0.5, 3.0)) for _ in range(steps + 1)]
    seen = run(
        Times(groups.__getitem__, updates.__getitem__, draw.choice((0.0, 0.2)), loads.__getitem__),
        PER_STEP,
        steps,
        bound,
        {"replicas": draw.randint(1, 4), "max_concurrent_groups": draw.choice((1, 2, 4, 16))},
    )
    found = Counter(
        step - 1 - seen.first_version[group]
        for step, batch in seen.trained.items()
        for group in batch
    )
    times = Counter(group for batch in seen.trained.values() for group in batch)
    return found, sum(times[group] != 1 for group in range(count))


def violations(bound: int, found: Counter[int]) -> int:
    """Groups that were older than the bound, or newer than the policy."""
    return sum(count for age, count in found.items() if not 0 <= age <= bound)


def measure() -> Measured:
    """Every bound."""
    figures: dict[str, float] = {"groups": 0.0, "violations": 0.0, "not_once": 0.0}
    for bound in BOUNDS:
        found, wrong = ages(bound, STEPS, 0)
        figures["groups"] += found.total()
        figures["violations"] += violations(bound, found)
        figures["not_once"] += wrong
        figures[f"bound_{bound}/oldest"] = max(found)
        mean = sum(age * count for age, count in found.items()) / found.total()
        figures[f"bound_{bound}/mean_age"] = mean
    return Measured(figures, (Target("violations", 0.0), Target("not_once", 0.0)))
