"""Dr. GRPO (2503.20783): GRPO without the two divisions that bias it, by std and by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from aligntune.algorithms.advantages import centre, weighted_sum
from aligntune.algorithms.base import Defaults
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.losses import Aggregation

if TYPE_CHECKING:
    import torch


class DrGRPO(GRPO):
    """A = R - mean_g, and one constant normaliser: the sampling budget."""

    title: ClassVar[str] = "GRPO Done Right"
    aliases: ClassVar[tuple[str, ...]] = ("dr_grpo", "dr-grpo", "Dr. GRPO")
    defaults: ClassVar[Defaults] = Defaults(
        learning_rate=1e-6, completions_per_group=8, adam_betas=(0.9, 0.95)
    )

    aggregation: Aggregation = "constant"
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference model")

    @field_validator("combine")
    @classmethod
    def _nothing_to_decouple(
        cls, combine: Literal["sum", "decoupled"]
    ) -> Literal["sum", "decoupled"]:
        if combine == "decoupled":
            raise ValueError(
                "combine: decoupled normalises by standard deviations, which Dr. GRPO exists to "
                "leave out; set combine: sum, or algorithm grpo"
            )
        return combine

    def sequence_advantages(
        self, groups: Sequence[torch.Tensor], weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """Section 3.2: rewards centred in their group, no division."""
        return [centre(weighted_sum(rewards, weights)) for rewards in groups]
