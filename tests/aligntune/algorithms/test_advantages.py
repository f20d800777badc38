"""Group baselines, GAE and whitening against the slow reference, to 1e-9."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aligntune.algorithms import advantages
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO

from . import slow

ONE = torch.ones(1, dtype=torch.float64)
timeless = settings(deadline=None)  # a loaded machine is no failure
rewards = st.floats(-10, 10, allow_subnormal=False)
groups = st.integers(1, 6).flatmap(
    lambda g: st.lists(st.lists(rewards, min_size=g, max_size=g), min_size=1, max_size=5)
)


def single(groups: list[list[float]]) -> torch.Tensor:
    """[n, G, 1] of one criterion."""
    return torch.tensor(groups, dtype=torch.float64)[..., None]


def sequence_advantages(algorithm: Algorithm, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Of groups of one size: [n, G, K] and [K] to [n, G]."""
    return torch.stack(algorithm.sequence_advantages(list(x), w))


@timeless
@given(groups)
def test_group_advantages_are_standardised_rewards(groups: list[list[float]]) -> None:
    expected = torch.tensor([slow.standardised(g) for g in groups], dtype=torch.float64)
    for algorithm in (GRPO(), DAPO(), GSPO()):
        got = sequence_advantages(algorithm, single(groups), ONE)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@timeless
@given(groups)
def test_dr_grpo_only_centres(groups: list[list[float]]) -> None:
    got = sequence_advantages(DrGRPO(), single(groups), ONE)
    expected = [[0.0 if slow.constant(g) else r - slow.mean(g) for r in g] for g in groups]
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("algorithm", [GRPO(), DrGRPO(), DAPO(), GSPO()])
@pytest.mark.parametrize(
    "group",
    [
        [0.1] * 3,
        [0.1] * 8,
        [-0.1] * 7,
        [1e9] * 5,
        [1e9, 1e9 + 1e-4, 1e9],  # 1e-13 relative
        [0.0, 5e-13, 0.0],  # below 1e-12 absolute
        [0.3, 0.1 + 0.2, 0.3],
        [7.0],
        [0.0, 0.0],
    ],
)
def test_a_group_without_contrast_gives_exactly_zero(algorithm: GRPO, group: list[float]) -> None:
    assert sequence_advantages(algorithm, single([group]), ONE).tolist() == [[0.0] * len(group)]


def test_rounding_alone_would_have_made_advantages_of_a_constant_group() -> None:
    """The rule is needed: the plain formula turns 0.1 repeated into noise over 1e-6."""
    x = torch.full((3,), 0.1, dtype=torch.float64)
    assert ((x - x.mean()) != 0).any()


@pytest.mark.parametrize("group", [[0.0, 2e-12], [1e9, 1e9 + 1.0], [1.0, 1.0 + 1e-9]])
def test_a_small_contrast_is_not_a_constant_group(group: list[float]) -> None:
    assert (sequence_advantages(GRPO(), single([group]), ONE) != 0).all()


@pytest.mark.slow
@timeless
@given(groups, st.floats(-100, 100), st.floats(0.5, 20))
def test_group_advantages_do_not_see_an_offset(
    groups: list[list[float]], offset: float, spread: float
) -> None:
    x = (single(groups) * spread).round(decimals=3)
    a = sequence_advantages(GRPO(), x, ONE)
    torch.testing.assert_close(
        sequence_advantages(GRPO(), x + offset, ONE), a, rtol=1e-6, atol=1e-6
    )
    assert a.sum(-1).abs().max() < 1e-9


def test_combine_sum_weighs_the_criteria_first() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    got = sequence_advantages(GRPO(), x, torch.tensor([2.0, 0.5]))
    expected = slow.standardised([2.0, 1.5, 2.5])
    assert got[0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@timeless
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_combine_decoupled_normalises_each_criterion_then_the_batch(
    seed: int, n: int, size: int, criteria: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 3, (n, size, criteria), generator=g).double()
    w = torch.rand(criteria, generator=g, dtype=torch.float64) + 0.1
    flat = [0.0] * (n * size)
    for k, i in itertools.product(range(criteria), range(n)):
        for j, a in enumerate(slow.standardised(x[i, :, k].tolist())):
            flat[i * size + j] += w[k].item() * a
    expected = torch.tensor(slow.standardised(flat), dtype=torch.float64).view(n, size)
    for algorithm in (GRPO(combine="decoupled"), DAPO(combine="decoupled")):
        got = sequence_advantages(algorithm, x, w)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_decoupled_tells_apart_what_a_sum_cannot() -> None:
    """GDPO's example: with two criteria a sum maps (0, 1), (1, 0) to one value."""
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0]] * 4])
    w = torch.tensor([1.0, 0.25])
    decoupled = sequence_advantages(GRPO(combine="decoupled"), x, w)
    assert decoupled[1].tolist() == [0.0] * 4
    assert decoupled[0, 0] < decoupled[0, 1]


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
@pytest.mark.parametrize("algorithm", [GRPO(), GRPO(combine="decoupled"), DrGRPO(), PPO()])
def test_a_reward_that_is_no_number_is_refused(algorithm: GRPO, bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        sequence_advantages(algorithm, single([[1.0, bad]]), ONE)


ABSTAINS = math.nan
SOME_ABSTAIN = [[1.0, ABSTAINS], [ABSTAINS, 3.0], [ABSTAINS, ABSTAINS], [0.0, 1.0]]


def test_criteria_that_abstain_leave_the_sum_the_mean_and_the_deviation() -> None:
    """TRL's None. With weights 2 and 1 the sums are 2, 3, none and 1: mean 2, deviation 1."""
    x, w = torch.tensor([SOME_ABSTAIN], dtype=torch.float64), torch.tensor([2.0, 1.0])
    assert sequence_advantages(DrGRPO(), x, w).tolist() == [[0.0, 1.0, 0.0, -1.0]]
    torch.testing.assert_close(
        sequence_advantages(GRPO(), x, w),
        torch.tensor([[0.0, 1.0, 0.0, -1.0]], dtype=torch.float64) / (1 + 1e-6),
        rtol=1e-12,
        atol=0,
    )


def test_decoupled_criteria_are_normalised_over_what_they_score() -> None:
    """Both criteria give +-1/sqrt(2); summed 2, 1, none, -3 of it, whose deviation is sqrt(3.5)."""
    x, w = torch.tensor([SOME_ABSTAIN], dtype=torch.float64), torch.tensor([2.0, 1.0])
    got = sequence_advantages(GRPO(combine="decoupled"), x, w)
    scale = math.sqrt(0.5) / math.sqrt(3.5)
    expected = torch.tensor([[2 * scale, scale, 0.0, -3 * scale]], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert got[0, 2] == 0.0


@pytest.mark.parametrize("algorithm", [GRPO(), GRPO(combine="decoupled"), DrGRPO(), DAPO()])
def test_a_completion_without_any_score_is_as_if_it_were_not_in_its_group(algorithm: GRPO) -> None:
    w = torch.tensor([1.0, 0.5])
    there = [[1.0, 0.0], [0.0, 0.25], [0.5, 0.5]]
    without = sequence_advantages(algorithm, torch.tensor([there], dtype=torch.float64), w)
    beside = [there[0], [ABSTAINS] * 2, *there[1:]]
    got = sequence_advantages(algorithm, torch.tensor([beside], dtype=torch.float64), w)
    assert got[0, 1] == 0.0
    torch.testing.assert_close(got[0, [0, 2, 3]], without[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "algorithm", [GRPO(), GRPO(combine="decoupled"), DAPO(combine="decoupled"), DrGRPO(), DAPO()]
)
def test_a_group_that_nothing_scores_has_no_advantages(algorithm: GRPO) -> None:
    x = torch.full((1, 3, 1), ABSTAINS, dtype=torch.float64)
    (scores,), (got,) = algorithm.scores_and_advantages(x, ONE, torch.tensor([[9, 10, 1]]), 10)
    assert got.tolist() == [0.0] * 3
    assert scores.isnan().all()


@pytest.mark.parametrize("algorithm", [GRPO(), GRPO(combine="decoupled"), DrGRPO(), DAPO()])
def test_a_criterion_of_weight_0_is_no_score(algorithm: GRPO) -> None:
    """It is watched alone: with it or without it, and whatever it says, advantages are the same."""
    x = torch.tensor([SOME_ABSTAIN], dtype=torch.float64)
    watched = torch.tensor([[[5.0], [ABSTAINS], [7.0], [-3.0]]], dtype=torch.float64)
    w, lengths = torch.tensor([2.0, 1.0]), [torch.tensor([9, 10, 1, 4])]
    wanted = algorithm.scores_and_advantages(list(x), w, lengths, 10)
    beside = torch.cat([x, watched], dim=2)
    got = algorithm.scores_and_advantages(list(beside), torch.tensor([2.0, 1.0, 0.0]), lengths, 10)
    assert wanted[0][0].isnan().tolist() == [False, False, True, False]
    for one, other in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


@timeless
@given(st.lists(st.tuples(st.none() | rewards, st.just(0.0) | rewards), min_size=1, max_size=4))
def test_one_sum_is_the_others(given: list[tuple[float | None, float]]) -> None:
    scores, weights = zip(*given, strict=True)
    row = [[ABSTAINS if score is None else score for score in scores]]
    doubles = (torch.tensor(numbers, dtype=torch.float64) for numbers in (row, weights))
    (tensor,) = advantages.weighted_sum(*doubles).tolist()
    number = advantages.weighted_total(scores, weights)
    if number is None:
        assert math.isnan(tensor)
    else:
        assert number == pytest.approx(tensor, rel=1e-9, abs=1e-9)


def test_rewards_and_weights_must_fit() -> None:
    with pytest.raises(ValueError, match="criteria"):
        sequence_advantages(GRPO(), single([[1.0, 0.0]]), torch.ones(2))


def test_shaping_is_a_criterion_of_its_own_where_criteria_are_decoupled() -> None:
    x = torch.tensor([[[1.0], [0.0], [1.0], [0.0]]])
    lengths = torch.tensor([[10, 10, 9, 8]])
    algorithm = DAPO(overlong_cache=2, combine="decoupled")
    (scores,), got = algorithm.scores_and_advantages(x, torch.tensor([2.0]), lengths, 10)
    penalties = [-1.0, -1.0, -0.5, 0.0]
    assert scores.tolist() == [1.0, -1.0, 1.5, 0.0]
    summed = [
        2 * a + b
        for a, b in zip(
            slow.standardised([1.0, 0.0, 1.0, 0.0]), slow.standardised(penalties), strict=True
        )
    ]
    assert got[0].tolist() == pytest.approx(slow.standardised(summed), abs=1e-12)


@pytest.mark.parametrize("size", [1.0, 1e8, 1e15])
def test_the_punishment_for_length_is_exact_beside_rewards_of_any_size(size: float) -> None:
    """As a difference of scores it would lose its digits: 1.6e-3 at 1e8."""
    algorithm = DAPO(overlong_cache=7, combine="decoupled")
    lengths, equal = torch.tensor([[10, 9, 5, 4]]), torch.full((1, 4, 1), size)
    _, (got,) = algorithm.scores_and_advantages(equal.double(), ONE, lengths, 10)
    penalties = [-1.0, -6 / 7, -2 / 7, -1 / 7]
    twice = slow.standardised(slow.standardised(penalties))
    assert got.tolist() == pytest.approx(twice, abs=1e-9)


def test_shaping_is_added_to_the_sum_otherwise() -> None:
    x = torch.tensor([[[1.0], [0.0], [1.0], [0.0]]])
    lengths = torch.tensor([[10, 10, 9, 8]])
    (scores,), got = DAPO(overlong_cache=2).scores_and_advantages(x, torch.ones(1), lengths, 10)
    assert scores.tolist() == [0.0, -1.0, 0.5, 0.0]
    assert got[0].tolist() == pytest.approx(slow.standardised(scores.tolist()), abs=1e-12)


@pytest.mark.slow
@timeless
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_groups_of_other_sizes_are_each_their_own_baseline(
    seed: int, sizes: list[int], criteria: int
) -> None:
    """Of ragged groups, by either way of combining criteria."""
    g = torch.Generator().manual_seed(seed)
    groups = [torch.randint(0, 3, (n, criteria), generator=g).double() for n in sizes]
    w = torch.rand(criteria, generator=g, dtype=torch.float64) + 0.1
    weighted = [
        [math.fsum(a * b for a, b in zip(row, w.tolist(), strict=True)) for row in x.tolist()]
        for x in groups
    ]
    got = GRPO().sequence_advantages(groups, w)
    for a, scores in zip(got, weighted, strict=True):
        assert a.tolist() == pytest.approx(slow.standardised(scores), rel=1e-9, abs=1e-9)
    for a, scores in zip(DrGRPO().sequence_advantages(groups, w), weighted, strict=True):
        centred = [0.0 if slow.constant(scores) else r - slow.mean(scores) for r in scores]
        assert a.tolist() == pytest.approx(centred, rel=1e-9, abs=1e-9)
    normal = [
        [slow.standardised(column) for column in zip(*x.tolist(), strict=True)] for x in groups
    ]
    flat = [
        math.fsum(w[k].item() * columns[k][j] for k in range(criteria))
        for columns in normal
        for j in range(len(columns[0]))
    ]
    decoupled = GRPO(combine="decoupled").sequence_advantages(groups, w)
    assert [len(a) for a in decoupled] == sizes
    assert torch.cat(decoupled).tolist() == pytest.approx(
        slow.standardised(flat), rel=1e-9, abs=1e-9
    )


@pytest.mark.slow
@timeless
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_gae_is_its_definition_over_valid_tokens(
    seed: int, width: int, gamma: float, lam: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    rho, values = torch.randn(2, 4, width, generator=g, dtype=torch.float64)
    mask = torch.rand(4, width, generator=g) < 0.7
    final = torch.randn(4, generator=g, dtype=torch.float64)
    got = advantages.gae(rho, values, mask, final, gamma, lam)
    for b in range(4):
        expected = slow.gae(
            rho[b].tolist(), values[b].tolist(), mask[b].tolist(), final[b].item(), gamma, lam
        )
        assert got[b].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("width", [1, 2, 63, 64, 300])
def test_gae_of_long_completions_takes_few_operations(width: int) -> None:
    """Token by token, 32,768 of them took 1.6 s a step in which no GPU worked."""

    class Counted(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    g = torch.Generator().manual_seed(width)
    rho, values = torch.randn(2, 3, width, generator=g, dtype=torch.float64)
    mask = torch.rand(3, width, generator=g) < 0.7
    final = torch.randn(3, generator=g, dtype=torch.float64)
    with Counted() as counted:
        got = advantages.gae(rho, values, mask, final, 0.99, 0.95)
    assert counted.calls < 40 + 14 * math.log2(width)
    for b in range(3):
        row = [each[b].tolist() for each in (rho, values, mask)]
        expected = slow.gae(*row, final[b].item(), 0.99, 0.95)
        assert got[b].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_gae_steps_over_interior_zeros_as_if_they_were_not_there() -> None:
    rho = torch.tensor([[1.0, 77.0, -77.0, 2.0, 5.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 99.0, -99.0, 0.25, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, False, True, False]])
    final = torch.tensor([3.0], dtype=torch.float64)
    valid = mask[0].nonzero().flatten()
    short = advantages.gae(rho[:, valid], values[:, valid], mask[:, valid], final, 0.9, 0.8)
    full = advantages.gae(rho, values, mask, final, 0.9, 0.8)
    assert full[:, valid].tolist() == short.tolist()
    assert (full[~mask] == 0).all()


@pytest.mark.slow
@timeless
@given(st.lists(st.floats(-1e3, 1e3), max_size=30))
def test_whitening_is_that_of_all_values(xs: list[float]) -> None:
    x = torch.tensor(xs, dtype=torch.float64)
    got = advantages.whiten(x, advantages.moments(x))
    assert got.tolist() == pytest.approx(slow.whitened(xs) if xs else [], rel=1e-9, abs=1e-9)


def test_moments_keep_their_digits_beside_a_large_mean() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) + 1e9
    assert advantages.moments(x).variance == pytest.approx(5 / 3, rel=1e-12)
