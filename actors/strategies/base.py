"""What a rank asks of the way its weights are stored and stepped.

A strategy owns the wrapped model, the optimiser and the talk between ranks. It knows nothing of
losses, groups or micro-batch sizes: gradients it is given add up, over `backward` calls and over
ranks, to the gradient of the optimiser step.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from actors.disk import Files
from actors.models.wrapped import TrainedModel
from actors.specs import ModelSpec, RankSpec
from actors.strategies.state import NamedTensors


class NonFiniteGradient(ArithmeticError):
    """The gradient of an optimiser step is NaN or infinite; no weight was changed."""


class Strategy(Protocol):
    """One rank's share of a model. Every method is called on all ranks, in the same order."""

    rank: int
    world: int
    device: torch.device
    model: TrainedModel

    def __init__(
        self, model: TrainedModel, spec: RankSpec, model_spec: ModelSpec, rank: int
    ) -> None:
        """Keep them; `setup` moves things."""

    def setup(self, master_address: str, master_port: int) -> None:
        """Meet the other ranks (rank 0 listens at the address) and place weights and optimiser."""

    def forward(self, **inputs: Any) -> Any:
        """`model.forward`, with the weights wherever they are."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss`; `last` says that the optimiser step follows."""

    def step(self, learning_rate: float) -> float:
        """Clip, step, clear; returns the global norm before clipping.

        Raises:
            NonFiniteGradient: on every rank, before any weight changed.
        """

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank."""

    def full_state(self) -> NamedTensors:
        """Whole weights under the base model's names, LoRA merged; tied weights once.

        Each may share the memory of a training weight.
        """

    def adapter_state(self) -> NamedTensors:
        """Whole LoRA weights under PEFT's names; nothing without LoRA."""

    def snapshot(self) -> Files:
        """This rank's files of weights, optimiser and RNG state, in memory.

        A copy: they are written while weights go on, without any other rank. Touches no disk.
        """

    def load(self, folder: Path) -> None:
        """Take back what every rank's `snapshot` made, so that the next update is the one that
        would have been.

        Raises:
            ValueError: the state is of another strategy, or of ranks it cannot be taken from.
        """

    def close(self) -> None:
        """Leave the other ranks."""


def make_strategy(
    model: TrainedModel, spec: RankSpec, model_spec: ModelSpec, rank: int
) -> Strategy:
    """The strategy that `spec` names; nothing but its own framework is imported."""
    module, _, name = spec.strategy.implementation.partition(":")
    made = getattr(importlib.import_module(module), name)
    return cast(Strategy, made(model, spec, model_spec, rank))
