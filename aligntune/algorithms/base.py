"""The contract between an algorithm and the loop that runs it.

An algorithm is a frozen bag of its hyperparameters with a few pure functions. The controller asks
it what it needs and for sequence advantages; policy ranks call its loss, which never sees where a
micro-batch ends: every denominator is in `TokenBatch.counts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from actors.messages import LossTerms, TokenBatch

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Estimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "token", "sequence", "icepop"]


@dataclass(frozen=True)
class Defaults:
    """What the config falls back to where the user is silent (ALGORITHMS.md, table of defaults)."""

    learning_rate: float
    completions_per_group: int
    epochs: int = 1
    minibatches: int = 1
    adam_betas: tuple[float, float] = (0.9, 0.999)
    critic_learning_rate: float | None = None


@dataclass(frozen=True)
class Needs:
    """Which roles an algorithm cannot do without."""

    reference: bool
    critic: bool = False
    reward_model: bool = False
    min_group: int = 2  # smallest G that gives a signal


class Algorithm(BaseModel):
    """Options every online algorithm has, and the functions it must give."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Defaults]
    backends: ClassVar[tuple[str, ...]] = ("trl", "unsloth")

    aggregation: Aggregation
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference model")
    kl_estimator: Estimator = "k3"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    correction: Correction = "token"
    correction_cap: float = Field(2.0, ge=1)
    entropy_coefficient: float = 0.0
    combine: Literal["sum", "decoupled"] = "sum"

    @property
    def needs(self) -> Needs:
        """Roles this algorithm needs with these options; beta 0 needs no reference model."""
        return Needs(reference=self.beta > 0)

    def keep(self, scores: dict[str, list[float]]) -> bool:
        """Whether a group is trained on, from its raw scores per criterion (before shaping)."""
        return True

    def shape(self, rewards: torch.Tensor, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        """Rewards [n, G] after length shaping; `lengths` [n, G] and `budget` in tokens."""
        return rewards

    def trains_on(self, truncated: bool) -> bool:
        """Whether a completion enters the loss; DAPO's overlong filtering says no if truncated."""
        return True

    def sequence_advantages(self, rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Advantages [n, G] of a step's groups from rewards [n, G, K] and weights [K], float64."""
        raise NotImplementedError

    def loss(self, batch: TokenBatch) -> LossTerms:
        """This micro-batch's share of the loss of the optimiser step."""
        raise NotImplementedError
