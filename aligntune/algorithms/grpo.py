"""GRPO (2402.03300): a group of completions is its own baseline; no critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from actors.messages import LossTerms, TokenBatch
from aligntune.algorithms.advantages import decoupled, standardise, weighted_sum
from aligntune.algorithms.base import Algorithm, Defaults
from aligntune.algorithms.losses import Aggregation, clipped_surrogate, log_ratio

if TYPE_CHECKING:
    import torch


class GRPO(Algorithm):
    """A = (R - mean_g) / std_g, PPO's clip, and k3 to the reference in the loss."""

    title: ClassVar[str] = "Group Relative Policy Optimization"
    defaults: ClassVar[Defaults] = Defaults(learning_rate=1e-6, completions_per_group=8)

    aggregation: Aggregation = "sequence_mean"
    beta: float = Field(0.04, ge=0, description="weight of the KL to the reference model")

    def sequence_advantages(
        self, groups: Sequence[torch.Tensor], weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """Section 4.1.2: rewards normalised within their group."""
        if self.combine == "decoupled":
            return decoupled(groups, weights)
        return [standardise(weighted_sum(rewards, weights)) for rewards in groups]

    def loss(self, batch: TokenBatch) -> LossTerms:
        """Eq. 3, negated: clipped ratio times advantage, minus beta times the KL."""
        d = log_ratio(batch, self.old)
        ell, clipped = clipped_surrogate(
            d,
            batch.advantages,
            batch.mask,
            self.clip_low,
            self.clip_high,
            self.dual_clip,
            self.weights(batch),
        )
        return self.terms(batch, d, ell, clipped)
