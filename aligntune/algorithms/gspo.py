"""GSPO (2507.18071): ratio and clipping of whole sequences, as the reward is of whole sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from actors.messages import LossTerms, TokenBatch
from aligntune.algorithms.base import Defaults
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.losses import (
    Aggregation,
    clipped_surrogate,
    log_ratio,
    numerator,
    rollout_mean,
)


class GSPO(GRPO):
    """GRPO's advantages with the length-normalised sequence ratio, in a far finer window."""

    title: ClassVar[str] = "Group Sequence Policy Optimization"
    defaults: ClassVar[Defaults] = Defaults(
        learning_rate=1e-6, completions_per_group=8, minibatches=4
    )
    backends: ClassVar[tuple[str, ...]] = ("trl",)

    aggregation: Aggregation = "sequence_mean"
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference model")
    clip_low: float = Field(3e-4, gt=0)
    clip_high: float = Field(4e-4, gt=0)
    importance: Literal["sequence", "token"] = Field(
        "sequence", description="token: GSPO-token, the sequence ratio with per-token gradients"
    )

    @property
    def whole_rollouts(self) -> bool:
        """The ratio is that of all of a rollout."""
        return True

    def loss(self, batch: TokenBatch) -> LossTerms:
        """Eq. 5 with s = exp(mean_t d) of eq. 7; eq. 13 and 14 for GSPO-token. Negated."""
        d = log_ratio(batch, self.old)
        log_s = rollout_mean(d, batch.mask, batch.rollouts)[:, None].expand_as(d)
        if self.importance == "token":
            log_s = log_s.detach() + (d - d.detach())  # sg[s] * exp(logp - sg[logp])
        ell, clipped = clipped_surrogate(
            log_s,
            batch.advantages,
            batch.mask,
            self.clip_low,
            self.clip_high,
            self.dual_clip,
            self.weights(batch),
        )
        terms = self.terms(batch, log_s, ell, clipped)
        held = clipped.to(ell.dtype)
        share = numerator(held, batch.mask, "sequence_mean", batch.budget, batch.rollouts)
        return replace(terms, sums={**terms.sums, "gspo/sequence_clip_fraction": share})
