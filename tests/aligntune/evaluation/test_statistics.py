"""Estimators against brute force over every subset, intervals against their laws."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.evaluation.statistics import (
    _wins,
    bootstrap,
    majority_at_k,
    pass_at_k,
    sign_test,
    wilson,
)

said = st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=1, max_size=8)


@pytest.mark.slow
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(
    passed: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(passed)))
    subsets = list(itertools.combinations(passed, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@settings(deadline=None)
@given(said, st.data())
def test_majority_at_k_is_the_mean_over_subsets_of_what_their_commonest_answer_scores(
    said: list[tuple[str, bool]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(said)))
    shares = {
        answer: statistics.fmean(passes for own, passes in said if own == answer)
        for answer, _ in said
    }
    scores = []
    for subset in itertools.combinations(said, k):
        counts = Counter(answer for answer, _ in subset)
        commonest = [a for a, count in counts.items() if count == max(counts.values())]
        scores.append(statistics.fmean(shares[answer] for answer in commonest))
    answers, passed = zip(*said, strict=True)
    assert majority_at_k(answers, passed, k) == pytest.approx(statistics.fmean(scores), abs=1e-9)


@pytest.mark.slow
@given(said)
def test_of_one_completion_both_are_the_share_that_passes(said: list[tuple[str, bool]]) -> None:
    answers, passed = zip(*said, strict=True)
    share = sum(passed) / len(passed)
    assert majority_at_k(answers, passed, 1) == pytest.approx(share)
    assert pass_at_k(len(passed), sum(passed), 1) == pytest.approx(share)


def test_many_samples_are_counted_and_not_enumerated() -> None:
    answers = [str(n % 7) for n in range(64)]
    assert majority_at_k(answers, [a == "0" for a in answers], 64) == 1.0, "0 is there once more"
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)


def test_answers_that_are_as_common_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def wins(own: int, others: Sequence[int], k: int) -> Fraction:
        asked.append((own, k))
        return _wins(own, others, k)

    monkeypatch.setattr("aligntune.evaluation.statistics._wins", wins)
    each = [str(n) for n in range(64)]
    assert majority_at_k(each, [True] * 64, 8) == 1.0
    assert asked == [(1, 8)]
    assert majority_at_k([*each, "0"], [True] * 65, 2) == 1.0
    assert sorted(asked[1:]) == [(1, 2), (2, 2)]


@pytest.mark.parametrize("k", [0, 4])
def test_no_k_beyond_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of 3"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=f"maj@{k} of 3"):
        majority_at_k("abc", [True] * 3, k)


@pytest.mark.parametrize(
    ("passed", "trials", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_the_published_intervals(
    passed: int, trials: int, low: float, high: float
) -> None:
    found = wilson(passed, trials)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert found.value == passed / trials


@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_share_and_stays_a_share(trials: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, trials))
    found, mirrored = wilson(passed, trials), wilson(trials - passed, trials)
    assert found.low is not None
    assert found.high is not None
    assert mirrored.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low == pytest.approx(1 - mirrored.high)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30), st.integers(0, 3))
def test_a_bootstrap_repeats_with_its_seed_and_lies_within_the_values(
    values: list[float], seed: int
) -> None:
    found = bootstrap(values, seed)
    assert found == bootstrap(values, seed)
    assert found.low is not None
    assert found.high is not None
    assert min(values) - 1e-9 <= found.low <= found.value <= found.high <= max(values) + 1e-9


def test_a_bootstrap_of_shares_is_about_as_wide_as_the_formula_says() -> None:
    values = [1.0] * 60 + [0.0] * 140
    found = bootstrap(values, 7)
    assert found.low is not None
    assert found.high is not None
    wide = 2 * 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert found.high - found.low == pytest.approx(wide, rel=0.1)


def test_one_prompt_has_no_interval_and_none_no_mean() -> None:
    assert bootstrap([0.5]).low is None
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


@given(st.integers(0, 12), st.integers(0, 12))
def test_the_sign_test_counts_the_flips_of_a_coin_that_are_as_uneven(
    wins: int, losses: int
) -> None:
    trials = wins + losses
    uneven = [c for c in range(trials + 1) if abs(2 * c - trials) >= abs(wins - losses)]
    expected = sum(math.comb(trials, count) for count in uneven) / 2**trials
    assert sign_test(wins, losses) == pytest.approx(expected)
