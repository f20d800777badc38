"""A step's time over the best possible under the same staleness bound, and over max(R, T).

The real loop on a virtual clock (`virtual`) beside list scheduling of the law alone (`bound`), with
the same draws. R is what a step's rollouts take all slots, T what its update takes.

    python -m tests.bench overlap_sim       also as: make bench NAME=overlap_sim
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.bench.bound import Work, update_starts
from tests.bench.report import Measured, Target
from tests.bench.virtual import Times, run

PER_STEP, SLOTS, STEPS, FIRST = 16, 16, 60, 10
UPDATE = 1.0
SIGMAS = (0.0, 0.5, 1.0)
RATIOS = (0.5, 1.0, 2.0)
STALENESS = (0, 1, 2, 3, 4)
SYNC = (0.01, 0.05)  # export and load, over T


@dataclass(frozen=True)
class Case:
    """One setting."""

    sigma: float  # of the lognormal times; 0: constant
    ratio: float  # R over T
    staleness: int
    replicas: int = 1
    sync: tuple[float, float] = (0.0, 0.0)
    slots: int = SLOTS  # of all replicas
    steps: int = STEPS

    @property
    def name(self) -> str:
        """In figures."""
        synced = f"/sync_{sum(self.sync):g}" if any(self.sync) else ""
        times = f"sigma_{self.sigma:g}/r_{self.ratio:g}"
        few = f"/{self.slots}_slots" if self.slots != SLOTS else ""
        return f"{times}/staleness_{self.staleness}/{self.replicas}_replicas{synced}{few}"


def draws(count: int, mean: float, sigma: float, seed: int = 0) -> list[float]:
    """Times of groups."""
    draw = random.Random(seed)
    mu = -sigma * sigma / 2
    return [mean * (draw.lognormvariate(mu, sigma) if sigma else 1.0) for _ in range(count)]


def a_step(starts: list[float]) -> float:
    """Mean seconds from one update to the next, without the first ones."""
    return (starts[-1] - starts[FIRST]) / (len(starts) - 1 - FIRST)


def starts(case: Case) -> tuple[list[float], list[float]]:
    """When the updates of the loop begin, and those of the bound."""
    groups = draws(PER_STEP * case.steps, case.ratio * UPDATE * case.slots / PER_STEP, case.sigma)
    export, load = case.sync
    seen = run(
        Times(groups.__getitem__, lambda step: UPDATE, export, lambda version: load),
        PER_STEP,
        case.steps,
        case.staleness,
        {"replicas": case.replicas, "max_concurrent_groups": case.slots // case.replicas},
    )
    best = update_starts(Work(groups, PER_STEP, case.slots, UPDATE, case.staleness, export, load))
    return seen.starts, best


def cases() -> list[Case]:
    """All of them. With few slots, groups wait for one, and some over several updates."""
    few = [
        Case(sigma, ratio, staleness, slots=4)
        for sigma in (0.5, 1.0)
        for ratio in (1.0, 2.0)
        for staleness in (1, 2, 4)
    ]
    return few + [
        Case(sigma, ratio, staleness, replicas, sync)
        for replicas, sync in ((1, (0.0, 0.0)), (4, SYNC))
        for sigma in SIGMAS
        for ratio in RATIOS
        for staleness in STALENESS
    ]


def measure() -> Measured:
    """Every case once: nothing is left to chance."""
    figures: dict[str, float] = {}
    for case in cases():
        ours, best = starts(case)
        figures[f"over_best/{case.name}"] = ours[-1] / best[-1]  # the whole run
        figures[f"over_max/{case.name}"] = a_step(ours) / max(UPDATE, case.ratio * UPDATE)
    figures["over_best/worst"] = max(v for name, v in figures.items() if "over_best" in name)
    return Measured(figures, (Target("over_best/worst", 1.03),))
