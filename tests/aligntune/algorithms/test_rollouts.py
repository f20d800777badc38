"""Rollouts of several rows: each loss is that of their tokens end to end, and of any split."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import Counts, RolloutRows, TokenBatch, ValueBatch
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.losses import value_loss

from . import slow
from .batches import BUDGET, as_lists, figures, random_batch, take
from .test_policy_losses import CASES, EXACT, gradients
from .test_sharding import ALGORITHMS

OWNERS = [0, 0, 1, 2, 2, 2, 3]  # row 2, rollout 1, has no trained token


def several_rows(batch: TokenBatch, owners: list[int]) -> TokenBatch:
    """`batch` with its rows shared out to rollouts, all advantages those of the first row."""
    index = torch.tensor(owners)
    tokens = torch.zeros(max(owners) + 1, dtype=torch.int64).index_add(0, index, batch.mask.sum(1))
    first = [owners.index(owner) for owner in owners]
    return dataclasses.replace(
        batch,
        advantages=batch.advantages[first],
        counts=Counts(
            tokens=float(batch.mask.sum()),
            rows=float(len(tokens)),
            nonempty_rows=float((tokens > 0).sum()),
        ),
        rollouts=RolloutRows(index, tokens[index]),
    )


def end_to_end(x: slow.Tensors, owners: list[int]) -> slow.Tensors:
    """The rows of each rollout one after the other, as one."""
    joined = {
        name: [
            [
                value
                for row, owner in zip(rows, owners, strict=True)
                if owner == one
                for value in row
            ]
            for one in sorted(set(owners))
        ]
        for name, rows in vars(x).items()
        if name != "budget"
    }
    return slow.Tensors(**joined, budget=x.budget)


def by_rows(rollouts: slow.Rows, owners: list[int], width: int) -> torch.Tensor:
    """What `end_to_end` joined, cut into rows again."""
    rest = [list(values) for values in rollouts]
    rows = []
    for owner in owners:
        rows.append(rest[owner][:width])
        del rest[owner][:width]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(params=CASES, ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Algorithm, slow.Options]:
    return CASES[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drift", [0.4, 1e-3])
def test_a_rollout_of_several_rows_has_the_loss_of_its_tokens_end_to_end(
    case: tuple[Algorithm, slow.Options], seed: int, drift: float
) -> None:
    algorithm, options = case
    batch = several_rows(random_batch(seed, rows=len(OWNERS), drift=drift), OWNERS)
    expected = slow.policy_loss(end_to_end(as_lists(batch), OWNERS), options)
    terms = algorithm.loss(batch)
    grad_logp, grad_entropy = gradients(algorithm, batch)
    width = batch.logp.shape[1]
    assert terms.loss.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-9)
    wanted = by_rows(expected.grad_logp, OWNERS, width)
    torch.testing.assert_close(grad_logp, wanted, **EXACT)
    wanted = by_rows(expected.grad_entropy, OWNERS, width)
    torch.testing.assert_close(grad_entropy, wanted, **EXACT)
    reported = figures([terms], batch.counts)
    assert reported.pop("policy/ratio_max") == pytest.approx(expected.ratio_max, rel=1e-9)
    assert reported == pytest.approx(
        {name: expected.means[name] for name in reported}, rel=1e-9, abs=1e-9
    )


def test_rows_taken_for_rollouts_would_have_another_loss() -> None:
    """The comparison above has teeth."""
    batch = several_rows(random_batch(0, rows=len(OWNERS)), OWNERS)
    apart = dataclasses.replace(batch, rollouts=None)
    for algorithm in (GRPO(), GSPO(clip_low=0.1, clip_high=0.1)):
        assert abs(algorithm.loss(batch).loss.item() - algorithm.loss(apart).loss.item()) > 1e-3


@st.composite
def splits(draw: st.DrawFn) -> tuple[TokenBatch, list[int], list[int]]:
    """A step's rows, the rollout of each, and the share that each row goes to."""
    more = draw(st.lists(st.booleans(), min_size=0, max_size=6))
    owners = [0]
    for new in more:
        owners.append(owners[-1] + new)
    batch = random_batch(draw(st.integers(0, 10_000)), rows=len(owners))
    shares = draw(st.lists(st.integers(0, 3), min_size=len(owners), max_size=len(owners)))
    return several_rows(batch, owners), owners, shares


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=40, deadline=None)
@given(splits())
def test_shares_of_such_rollouts_add_up(
    name: str, split: tuple[TokenBatch, list[int], list[int]]
) -> None:
    """By rows; by whole rollouts where the loss says that it wants them."""
    algorithm: Algorithm = ALGORITHMS[name]
    batch, owners, shares = split
    if algorithm.whole_rollouts:
        shares = [shares[owners.index(owner)] for owner in owners]
    whole = algorithm.loss(batch)
    whole.loss.backward()
    assert batch.logp.grad is not None
    assert batch.rollouts is not None
    terms, gradient = [], torch.zeros_like(batch.logp)
    for share in sorted(set(shares)):
        rows = [row for row, place in enumerate(shares) if place == share]
        own = [owners[row] for row in rows]
        rollouts = RolloutRows(
            torch.tensor([own.index(owner) for owner in own]), batch.rollouts.tokens[rows]
        )
        part = dataclasses.replace(take(batch, rows), rollouts=rollouts)
        term = algorithm.loss(part)
        term.loss.backward()
        assert part.logp.grad is not None
        gradient[rows] += part.logp.grad
        terms.append(term)
    total = sum(term.loss.item() for term in terms)
    assert total == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(gradient, batch.logp.grad, rtol=1e-12, atol=1e-12)
    assert figures(terms, batch.counts) == pytest.approx(
        figures([whole], batch.counts), rel=1e-12, abs=1e-12
    )


def test_who_wants_whole_rollouts_says_so() -> None:
    assert GSPO().whole_rollouts
    assert GSPO(importance="token").whole_rollouts
    assert GRPO(correction="sequence").whole_rollouts
    assert not GRPO().whole_rollouts


def test_the_value_loss_weighs_rollouts_too() -> None:
    values, old, returns = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    rollouts = RolloutRows(torch.tensor([0, 0, 2]), torch.tensor([4, 4, 4]))
    counts = Counts(tokens=8.0, rows=2.0, nonempty_rows=2.0)
    batch = ValueBatch(values, old, returns, mask, counts, BUDGET, rollouts)
    squares = torch.where(mask, 0.5 * (values - returns) ** 2, 0.0)
    expected = (squares[:2].sum() / 4 + squares[2].sum() / 4) / 2
    got = value_loss(batch, None, "sequence_mean").loss
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
