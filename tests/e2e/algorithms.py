"""Algorithms the end-to-end tests name by import path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from aligntune.algorithms.base import Needs
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.ppo import PPO


class PPOOnFunctions(PPO):
    """PPO that is content with reward functions, so that a test needs no trained reward model."""

    @property
    def needs(self) -> Needs:
        """All that PPO needs but the reward model."""
        return replace(super().needs, reward_model=False)


class FlippedGRPO(GRPO):
    """GRPO with the sign of its advantages flipped: what it learns is to be wrong."""

    def sequence_advantages(
        self, groups: Sequence[torch.Tensor], weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """The opposite of what the rewards say."""
        return [-advantages for advantages in super().sequence_advantages(groups, weights)]
