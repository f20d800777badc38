"""What DAPO changes around the loss: dynamic sampling, overlong shaping and filtering."""

from __future__ import annotations

import pytest
import torch

from aligntune.algorithms.base import SCORE
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.shaping import soft_overlong

from . import slow


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ([1.0, -1.0, 1.0, -1.0], True),  # mean zero is contrast all the same
        ([1.0, 1.0, 1.0, 1.0], False),
        ([-1.0, -1.0, -1.0], False),
        ([0.0, 0.0], False),
        ([0.1] * 8, False),
        ([0.0, 0.0, 0.0, 1.0], True),
        ([1.0], False),
    ],
)
def test_dynamic_sampling_keeps_groups_with_contrast(raw: list[float], kept: bool) -> None:
    assert DAPO().keep({SCORE: raw}) is kept


def test_the_filter_looks_at_the_metric_it_names() -> None:
    scores = {"correct": [1.0, 1.0], "format": [0.0, 1.0], SCORE: [1.0, 2.0]}
    assert DAPO().keep(scores)
    assert not DAPO(metric="correct").keep(scores)
    assert DAPO(metric="format").keep(scores)
    assert DAPO(dynamic_sampling=False).keep({SCORE: [1.0, 1.0]})
    assert DAPO(metric="correct").sampling_metric == "correct"


def test_score_is_the_weighted_sum_though_a_criterion_is_called_so() -> None:
    scores = {"score": [0.0, 1.0], "other": [1.0, 0.0], SCORE: [1.0, 1.0]}
    DAPO(metric="score").check_run(["score", "other"], 100, 64)
    assert not DAPO(metric="score").keep(scores)
    assert not DAPO().keep(scores)


def test_decoupled_criteria_keep_a_group_where_any_varies() -> None:
    """Weights (2, 1) over (0, 2), (1, 0): the sum is constant and the criteria are not."""
    scores = {"correct": [0.0, 1.0], "format": [2.0, 0.0], SCORE: [2.0, 2.0]}
    assert not DAPO().keep(scores)
    decoupled = DAPO(combine="decoupled")
    assert decoupled.keep(scores)
    assert not decoupled.keep({"correct": [1.0, 1.0], "format": [0.0, 0.0], SCORE: [1.0, 1.0]})
    assert not DAPO(combine="decoupled", metric="correct").keep({**scores, "correct": [1.0, 1.0]})


def test_contrast_by_length_alone_does_not_keep_a_group() -> None:
    """The filter sees raw scores; shaping afterwards tells the completions apart."""
    algorithm = DAPO(overlong_cache=4)
    raw = torch.ones(1, 2)
    assert algorithm.shape(raw, torch.tensor([[10, 2]]), 10).tolist() == [[0.0, 1.0]]
    assert not algorithm.keep({SCORE: raw[0].tolist()})


def test_a_metric_that_is_no_criterion_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"'corect'.*correct, format, score"):
        DAPO(metric="corect").check_run(["correct", "format"], 100, 64)
    with pytest.raises(ValueError, match="'corect'"):
        DAPO(metric="corect").keep({"correct": [1.0, 0.0]})
    DAPO(metric="correct").check_run(["correct", "format"], 100, 64)


def test_sampling_rounds_are_bounded_only_where_sampling_is_dynamic() -> None:
    assert DAPO(max_sampling_rounds=3).sampling_rounds == 3
    assert DAPO(dynamic_sampling=False).sampling_rounds is None


@pytest.mark.parametrize(("l_max", "l_cache"), [(20, 4), (20480, 4096), (10, 10), (7, 1)])
def test_soft_overlong_punishment_is_its_formula_around_every_corner(
    l_max: int, l_cache: int
) -> None:
    corners = [l_max - l_cache, l_max]
    lengths = sorted({max(c + step, 0) for c in corners for step in range(-2, 3)} | {0})
    got = soft_overlong(torch.tensor(lengths), l_max, l_cache)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(
        [slow.soft_overlong(n, l_max, l_cache) for n in lengths], abs=1e-12
    )


def test_soft_overlong_punishment_at_the_corners_by_hand() -> None:
    got = soft_overlong(torch.tensor([15, 16, 17, 18, 20, 21, 99]), 20, 4)
    assert got.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]


def test_the_default_cache_is_a_fifth_of_the_budget() -> None:
    lengths = torch.tensor([[16, 17, 20]])
    assert DAPO().shape(torch.zeros(1, 3), lengths, 20).tolist() == [[0.0, -0.25, -1.0]]
    assert DAPO().shape(torch.zeros(1, 1), torch.tensor([[2]]), 3).tolist() == [[0.0]]


def test_shaping_can_be_off() -> None:
    raw = torch.ones(1, 2)
    got = DAPO(overlong_shaping=False).shape(raw, torch.tensor([[99, 1]]), 10)
    assert torch.equal(got, raw)


def test_a_cache_beyond_the_budget_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="max_completion_length = 10, got 11"):
        DAPO(overlong_cache=11).check_run(["correct"], 10, 64)


def test_overlong_filtering_leaves_truncated_completions_out() -> None:
    assert DAPO().trains_on(truncated=True)
    assert not DAPO(overlong_filtering=True).trains_on(truncated=True)
    assert DAPO(overlong_filtering=True).trains_on(truncated=False)
