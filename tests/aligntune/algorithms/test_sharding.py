"""The sharding law: shares of any split of the rows add up to the loss of the whole step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import TokenBatch
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO

from .batches import figures, random_batch, take

EVERYTHING = {"beta": 0.1, "entropy_coefficient": 0.05, "dual_clip": 1.5}
ALGORITHMS = {
    "ppo": PPO(kl_in="loss", kl_estimator="k3", **EVERYTHING),
    "grpo": GRPO(**EVERYTHING),
    "dr_grpo": DrGRPO(correction="sequence", **EVERYTHING),
    "dapo": DAPO(correction="icepop", **EVERYTHING),
    "gspo": GSPO(**EVERYTHING),
    "gspo, token": GSPO(importance="token", **EVERYTHING),
}


@st.composite
def splits(draw: st.DrawFn) -> tuple[TokenBatch, list[list[int]], list[int]]:
    """A step's rows, the rows of each share (some maybe empty), and padding of each share."""
    rows = draw(st.integers(1, 7))
    seed = draw(st.integers(0, 10_000))
    batch = random_batch(seed, rows=rows, per_token_advantages=draw(st.booleans()))
    order = draw(st.permutations(range(rows)))
    shares: list[list[int]] = [[] for _ in range(draw(st.integers(1, rows + 1)))]
    for row in order:
        shares[draw(st.integers(0, len(shares) - 1))].append(row)
    return batch, shares, [draw(st.integers(0, 3)) for _ in shares]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=60, deadline=None)
@given(splits())
def test_shares_add_up_to_the_loss_its_gradient_and_its_figures(
    name: str, split: tuple[TokenBatch, list[list[int]], list[int]]
) -> None:
    algorithm: Algorithm = ALGORITHMS[name]
    batch, shares, pads = split
    whole = algorithm.loss(batch)
    whole.loss.backward()
    assert batch.logp.grad is not None
    assert batch.entropy is not None

    terms, total = [], 0.0
    gradient = torch.zeros_like(batch.logp)
    entropy_gradient = torch.zeros_like(batch.logp)
    width = batch.logp.shape[1]
    for rows, pad in zip(shares, pads, strict=True):
        share = take(batch, rows, pad)
        term = algorithm.loss(share)
        term.loss.backward()
        assert share.logp.grad is not None
        assert share.entropy is not None
        assert share.entropy.grad is not None
        gradient[rows] += share.logp.grad[:, :width]
        entropy_gradient[rows] += share.entropy.grad[:, :width]
        assert (share.logp.grad[:, width:] == 0).all()
        total += term.loss.item()
        terms.append(term)

    assert total == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(gradient, batch.logp.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy_gradient, batch.entropy.grad, rtol=1e-12, atol=1e-12)
    assert figures(terms, batch.counts) == pytest.approx(
        figures([whole], batch.counts), rel=1e-12, abs=1e-12
    )


def test_a_mean_of_means_is_not_the_loss() -> None:
    """The law has teeth: per-share denominators would give another number."""
    batch = random_batch(0)
    whole = DAPO().loss(batch).loss.item()
    halves = [take(batch, rows) for rows in ([0], [1, 2, 3, 4, 5])]
    local = []
    for half in halves:
        tokens = half.mask.sum().item()
        local.append(DAPO().loss(half).loss.item() * batch.counts.tokens / tokens)
    assert abs(sum(local) / 2 - whole) > 1e-3
