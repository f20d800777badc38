"""The statistics of evaluations: estimators, intervals and paired tests. Pure.

pass@k is the unbiased estimator of Chen et al. 2021 (Evaluating Large Language Models Trained on
Code, eq. 1). The interval of a share of single trials is Wilson's (1927, Probable Inference); that
of any other mean over prompts is the percentile bootstrap (Efron 1979) over prompts, because the
completions of one prompt are not independent of each other. The paired test is the exact sign test,
which for pass and fail of one completion a prompt is McNemar's exact test (1947).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95
RESAMPLES = 2000  # of the bootstrap
CHUNK = 2**22  # numbers that are drawn at a time


class Estimate(BaseModel):
    """A figure with the interval that holds the true one in `CONFIDENCE` of evaluations."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float | None  # None where one prompt alone says nothing of the spread
    high: float | None
    interval: Literal["wilson", "bootstrap"]
    prompts: int  # that it is over


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that at least one of k completions passes, estimated without bias from
    `samples` of them of which `passed` did: 1 - C(n-c, k) / C(n, k).

    Raises ValueError where 1 <= k <= samples and 0 <= passed <= samples do not hold.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise ValueError(f"no pass@{k} of {samples} samples of which {passed} passed")
    return float(1 - Fraction(math.comb(samples - passed, k), math.comb(samples, k)))


def majority_at_k(answers: Sequence[str], passed: Sequence[bool], k: int) -> float:
    """The probability that the commonest answer among k of the completions passes: the mean over
    all subsets of k, without drawing any. Answers that are as common as each other share.

    An answer passes as often as its completions do. Raises ValueError where k is out of range.
    """
    if not 1 <= k <= len(answers) or len(answers) != len(passed):
        raise ValueError(f"no maj@{k} of {len(answers)} answers and {len(passed)} verdicts")
    counts = Counter(answers)
    right = Counter(counts[said] for said, passes in zip(answers, passed, strict=True) if passes)
    total = Fraction(0)
    for own, hits in right.items():  # answers that are as common win as often
        others = list(counts.values())
        others.remove(own)
        total += Fraction(hits, own) * _wins(own, others, k)
    return float(total / math.comb(len(answers), k))


def _wins(own: int, others: Sequence[int], k: int) -> Fraction:
    """In how many subsets of k an answer with `own` completions is the commonest; 1/r of one where
    r answers are."""
    wins = Fraction(0)
    for votes in range(1, min(own, k) + 1):
        ways = {(0, 0): 1}  # {(completions of others taken, others with as many votes): subsets}
        for count in others:
            grown: Counter[tuple[int, int]] = Counter()
            for (taken, ties), number in ways.items():
                for more in range(min(count, votes, k - votes - taken) + 1):
                    at = (taken + more, ties + (more == votes))
                    grown[at] += number * math.comb(count, more)
            ways = dict(grown)
        for (taken, ties), number in ways.items():
            if taken == k - votes:
                wins += Fraction(math.comb(own, votes) * number, ties + 1)
    return wins


def wilson(passed: int, trials: int, confidence: float = CONFIDENCE) -> Estimate:
    """The share of independent trials that passed, with Wilson's score interval."""
    if not 0 <= passed <= trials or trials < 1:
        raise ValueError(f"no share of {trials} trials of which {passed} passed")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, squared = passed / trials, z * z / trials
    middle = (share + squared / 2) / (1 + squared)
    half = z * math.sqrt(share * (1 - share) / trials + squared / trials / 4) / (1 + squared)
    return Estimate(
        value=share,
        low=min(share, max(0.0, middle - half)),
        high=max(share, min(1.0, middle + half)),
        interval="wilson",
        prompts=trials,
    )


def bootstrap(values: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of a value a prompt, with the percentile interval of `RESAMPLES` resamplings of the
    prompts; the same seed gives the same interval. Raises ValueError without values."""
    if not values:
        raise ValueError("no mean of no values")
    array = np.asarray(values, dtype=np.float64)
    value, count = float(array.mean()), len(array)
    if count == 1:
        return Estimate(value=value, low=None, high=None, interval="bootstrap", prompts=1)
    draw = np.random.default_rng(seed)
    at_once = max(1, CHUNK // count)
    means = [
        array[draw.integers(0, count, size=(min(at_once, RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(
        value=value,
        low=min(value, float(low)),
        high=max(value, float(high)),
        interval="bootstrap",
        prompts=count,
    )


def sign_test(wins: int, losses: int) -> float:
    """How probable so uneven a split of wins and losses is, or a more uneven one, where both are as
    probable: two-sided and exact. Ties are left out, as Dixon and Mood (1946) do."""
    trials = wins + losses
    tail = sum(math.comb(trials, count) for count in range(min(wins, losses) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**trials)))
