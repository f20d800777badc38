"""Estimators of a KL divergence from sampled tokens, and the adaptive weight of a KL penalty."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, assert_never

if TYPE_CHECKING:
    import torch

Estimator = Literal["k1", "k2", "k3"]


def estimate(d: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Per-token estimate of KL(p || q) from d = log p - log q of tokens drawn from p.

    Schulman 2020: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. No clamp, plain autograd. Masked
    positions must hold 0 beforehand, or exp may overflow there.
    """
    import torch

    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d
    assert_never(estimator)


@dataclass(frozen=True)
class AdaptiveKL:
    """The penalty weight beta steered towards a target KL (Ziegler et al. 2019, section 2.2).

    beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon. `target` is in the unit of the
    `kl/reference` metric (nats per token), `horizon` in completions.
    """

    beta: float
    target: float
    horizon: float

    def after(self, kl: float, completions: int) -> AdaptiveKL:
        """The state after a step of `completions` whose mean KL was `kl`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, beta=self.beta * (1.0 + error * completions / self.horizon))
