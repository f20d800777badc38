"""The three estimators and the adaptive weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.algorithms.kl import AdaptiveKL, Estimator, estimate

from . import slow


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@settings(deadline=None)
@given(st.floats(-5, 5))
def test_estimates_and_slopes_are_those_of_the_formulas(estimator: Estimator, d: float) -> None:
    leaf = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    k = estimate(leaf, estimator)
    k.backward()
    value, slope = slow.kl(d, estimator)
    assert k.item() == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(slope, rel=1e-9, abs=1e-9)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    d = (p / q).log()
    exact = (p * d).sum().item()
    assert (p * estimate(d, "k1")).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (p * estimate(d, "k3")).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (estimate(torch.linspace(-4, 4, 101), "k3") >= 0).all()


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.1, 1.0),  # at the target
        (0.11, 1 + 0.1 * 64 / 1000),
        (0.12, 1 + 0.2 * 64 / 1000),
        (5.0, 1 + 0.2 * 64 / 1000),  # held
        (0.09, 1 - 0.1 * 64 / 1000),
        (-3.0, 1 - 0.2 * 64 / 1000),  # held; a k1 mean can be negative
    ],
)
def test_adaptive_beta_moves_by_the_clipped_error(kl: float, factor: float) -> None:
    after = AdaptiveKL(beta=0.05, target=0.1, horizon=1000).after(kl, completions=64)
    assert after.beta == pytest.approx(0.05 * factor, rel=1e-12)
    assert (after.target, after.horizon) == (0.1, 1000)


def test_adaptive_beta_settles_where_the_kl_answers_to_it() -> None:
    """With KL = 0.01 / beta the weight that gives KL 0.1 is 0.1."""
    state = AdaptiveKL(beta=1.0, target=0.1, horizon=500)
    for _ in range(400):
        state = state.after(0.01 / state.beta, completions=64)
    assert math.isclose(state.beta, 0.1, rel_tol=1e-3)
