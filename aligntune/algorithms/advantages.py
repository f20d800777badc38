"""From rewards to advantages: group-relative baselines, GAE, and whitening over the whole step.

A group (or batch) without contrast gives exactly zero, never rounding noise over rounding noise.
NaN is a score that is not there: its criterion abstains (TRL's None), or the completion has none at
all, not counting those of criteria of weight 0. It enters no mean, deviation or count, and its
advantage is exactly zero.
Shape legend: a step's groups, each of G rollouts, which may differ from group to group; K criteria,
B rows, T padded response width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STD_EPSILON = 1e-6
WHITEN_EPSILON = 1e-8
CONSTANT_TOLERANCE = 1e-12

AllSum = Callable[["torch.Tensor"], "torch.Tensor"]
"""Sums a small float64 CPU vector over all ranks; every rank calls it equally often."""


def on_one_rank(local: torch.Tensor) -> torch.Tensor:
    """The `AllSum` of a single rank."""
    return local


def is_constant(x: torch.Tensor) -> torch.Tensor:
    """Whether the last axis of [..., G] holds one value at most, up to rounding; bool [...].

    max - min <= 1e-12 relative to the largest magnitude, and at least 1e-12 absolute.
    """
    absent = x.isnan()
    spread = x.masked_fill(absent, -inf).amax(-1) - x.masked_fill(absent, inf).amin(-1)
    return spread <= CONSTANT_TOLERANCE * x.nan_to_num(0.0).abs().amax(-1).clamp(min=1.0)


def centre(x: torch.Tensor) -> torch.Tensor:
    """x - mean over the last axis of [..., G]; exactly 0 where it is constant (Dr. GRPO)."""
    import torch

    flat = is_constant(x)[..., None] | x.isnan()
    return torch.where(flat, 0.0, x - x.nanmean(-1, keepdim=True))


def standardise(x: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (std_ddof1 + 1e-6) over the last axis of [..., G]; 0 where it is constant."""
    import torch

    if x.shape[-1] < 2:
        return torch.zeros_like(x)
    centred = centre(x)
    count = (~x.isnan()).sum(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + STD_EPSILON)


def weighted_total(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """R = sum_k w_k R_k of one completion, None where a criterion abstains; None where all do whose
    weight is not 0. The same as `weighted_sum`, for who has no tensors."""
    pairs = zip(scores, weights, strict=True)
    given = [weight * score for score, weight in pairs if score is not None and weight != 0]
    return sum(given) if given else None


def weighted_sum(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """R = sum_k w_k R_k of a group in float64 over the criteria that do not abstain: [G, K] and
    [K] to [G]; NaN where all do whose weight is not 0.

    Raises ValueError on shapes that do not fit and on infinite rewards: a reward that failed is
    a failed group, and must not come this far as a number.
    """
    if rewards.ndim != 2 or weights.shape != rewards.shape[-1:]:
        raise ValueError(
            f"rewards of a group must be [rollouts, criteria] and weights [criteria], "
            f"got {tuple(rewards.shape)} and {tuple(weights.shape)}"
        )
    rewards, weights = rewards.double(), weights.double()
    if rewards.isinf().any() or not weights.isfinite().all():
        raise ValueError("a reward or a weight is not finite; its group must be quarantined")
    given = ~rewards.isnan() & (weights != 0)
    total = (rewards.masked_fill(~given, 0.0) * weights).sum(-1)
    return total.masked_fill(~given.any(-1), nan)


def decoupled(groups: Sequence[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    """GDPO (2601.05242): rewards [G, K] of each group and [K] to advantages [G] of each, float64.

    Each criterion is standardised within its group, the weighted sum over the rollouts of all
    groups.
    """
    import torch

    combined = []
    for rewards in groups:
        unscored = weighted_sum(rewards, weights).isnan()  # and the same checks
        total = standardise(rewards.double().T).T @ weights.double()
        combined.append(total.masked_fill(unscored, nan))
    if not combined:
        return []
    return list(standardise(torch.cat(combined)).split([len(group) for group in combined]))


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    final_values: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """Generalised advantage estimation (1506.02438, eq. 16) over the valid tokens of [B, T].

    delta_t = rho_t + gamma * V_t' - V_t and A_t = delta_t + gamma * lam * A_t', t' the next valid
    token: interior zeros of `mask` are stepped over. `final_values` [B] stand after the last one:
    0 where the completion ended, the critic's value of the final state where it was cut.

    A token's sum reaches 1, 2, 4, ... columns in turn, so long completions take few operations.
    """
    import torch

    width = values.shape[1]
    if not width:
        return torch.zeros_like(values)
    columns = torch.arange(width, device=values.device).expand_as(values)
    at = (
        columns.masked_fill(~mask, width).flip(1).cummin(1).values.flip(1)
    )  # a valid one, from t on
    after = torch.cat([at[:, 1:], at.new_full((len(at), 1), width)], dim=1)
    next_values = torch.cat([values, final_values[:, None]], dim=1).gather(1, after)
    sums = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    factors = torch.where(mask, gamma * lam, torch.ones_like(sums))
    reach = 1
    while reach < width:
        further = factors[:, :-reach] * sums[:, reach:]
        sums = torch.cat([sums[:, :-reach] + further, sums[:, -reach:]], dim=1)
        product = factors[:, :-reach] * factors[:, reach:]
        factors = torch.cat([product, factors[:, -reach:]], dim=1)
        reach *= 2
    return torch.where(mask, sums, 0.0)


@dataclass(frozen=True)
class Moments:
    """Of a variable over the whole step, all ranks together."""

    count: float
    mean: float
    variance: float  # ddof 1; 0 for fewer than two values

    @property
    def varies(self) -> bool:
        """Whether there is more than rounding noise to divide by; as `is_constant` of a group."""
        return self.variance**0.5 > CONSTANT_TOLERANCE * max(1.0, abs(self.mean))


def moments(local: torch.Tensor, all_sum: AllSum = on_one_rank) -> Moments:
    """Global moments of the ranks' `local` values (any shape), in two passes: two `all_sum` calls.

    The second pass sums squared distances from the global mean, so a large mean costs no digits.
    """
    import torch

    local = local.double().flatten()
    count, total = all_sum(
        torch.stack([torch.tensor(float(local.numel()), dtype=torch.float64), local.sum()])
    ).tolist()
    mean = total / count if count else 0.0
    squares = all_sum((local - mean).square().sum().reshape(1)).item()
    return Moments(count, mean, squares / (count - 1) if count > 1 else 0.0)


def whiten(x: torch.Tensor, of: Moments) -> torch.Tensor:
    """(x - mean) / sqrt(var_ddof1 + 1e-8) with the moments of the whole step."""
    return (x - of.mean) / (of.variance + WHITEN_EPSILON) ** 0.5
