"""What a rank asks of the way its weights are stored and stepped, and what strategies share.

A strategy owns the wrapped model, the optimiser and the talk between ranks. It knows nothing of
losses, groups or micro-batch sizes: gradients it is given add up, over `backward` calls and over
ranks, to the gradient of the optimiser step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from actors.models.wrapped import TrainedModel
from actors.specs import ModelSpec, RankSpec

NamedTensors = Iterator[tuple[str, torch.Tensor]]
Gather = Callable[[list[torch.Tensor]], AbstractContextManager[Any]]


class NonFiniteGradient(ArithmeticError):
    """The gradient of an optimiser step is NaN or infinite; no weight was changed."""


class Strategy(Protocol):
    """One rank's share of a model. Every method is called on all ranks, in the same order."""

    rank: int
    world: int
    device: torch.device
    model: TrainedModel

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

    def gradients(self) -> NamedTensors:
        """Whole gradients between the last `backward` and `step`, unclipped; for checks."""

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank."""

    def full_state(self) -> NamedTensors:
        """Whole weights under the base model's names, LoRA merged; tied weights once.

        Each is valid until the next is asked for.
        """

    def adapter_state(self) -> NamedTensors:
        """Whole LoRA weights under PEFT's names; nothing without LoRA."""

    def save(self, folder: Path) -> None:
        """Write weights, optimiser and RNG state into `folder`, on disk when this returns."""

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, so that the next update is the one that would have been.

        Raises:
            ValueError: the state is of another strategy or another number of ranks.
        """

    def close(self) -> None:
        """Leave the other ranks."""


def learning_rate(spec: RankSpec, step: int, total_steps: int) -> float:
    """The learning rate of training step `step` (1-based), the same for all its optimiser steps.

    A function of the step alone: there is no scheduler state to save, and a rolled-back run has
    the rates it had. Warm-up rises linearly to the full rate at `warmup_steps`; what follows falls
    from it towards 0, which is reached only after `total_steps`.
    """
    if spec.learning_rate is None:
        raise ValueError(
            f"{spec.role}.learning_rate is not set; the algorithm's default was not filled"
        )
    if step <= spec.warmup_steps:
        return spec.learning_rate * step / spec.warmup_steps
    done = (step - spec.warmup_steps - 1) / max(1, total_steps - spec.warmup_steps)
    done = min(done, 1.0)
    match spec.scheduler:
        case "constant":
            return spec.learning_rate
        case "linear":
            return spec.learning_rate * (1 - done)
        case "cosine":
            return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, spec: RankSpec) -> torch.optim.AdamW:
    """AdamW over the trainable weights; biases and norms (one dimension) do not decay."""
    if spec.adam_betas is None:
        raise ValueError(
            f"{spec.role}.adam_betas is not set; the algorithm's default was not filled"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # The rate is set before every step; a zero here would show if it were not.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=spec.adam_betas,
        eps=spec.adam_epsilon,
        fused=True,
    )


def merged_state(model: TrainedModel, dtype: torch.dtype, gather: Gather) -> NamedTensors:
    """Weights [name, tensor] in `dtype` with LoRA added out of place: training weights stay as are.

    `gather` makes sharded parameters whole while its context is open. A tensor may share the
    training weight's memory and is whole only until the next one is asked for: copy what is kept.
    """
    inner = model.unwrapped
    adapted = {
        name: module
        for name, module in inner.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }
    for name, parameter in inner.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer = owner.removesuffix(".base_layer")
        if layer in adapted and owner != layer:
            clean = f"{layer}.{leaf}"
            if leaf == "weight":
                module = adapted[layer]
                with gather(list(module.parameters())), torch.no_grad():
                    merged = _numbers(parameter).float()
                    for adapter in module.active_adapters:
                        merged = merged + module.get_delta_weight(adapter).float()
                yield clean, merged.to(dtype)
                continue
        elif any(owner.startswith(f"{prefix}.") for prefix in adapted):
            continue  # the adapter's own weights
        else:
            clean = name
        with gather([parameter]):
            yield clean, _numbers(parameter).to(dtype)


def _numbers(parameter: torch.Tensor) -> torch.Tensor:
    """A weight as numbers, also where bitsandbytes keeps it in 4 bits."""
    packed = getattr(parameter, "quant_state", None)
    if packed is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    numbers: torch.Tensor = dequantize_4bit(parameter.data, packed)
    return numbers


def adapter_state(model: TrainedModel, gather: Gather) -> NamedTensors:
    """The trainable LoRA weights under the names PEFT gives them."""
    if not hasattr(model.model, "peft_config"):
        return
    for name, parameter in model.model.named_parameters():
        if "lora_" in name:
            with gather([parameter]):
                yield name, parameter.detach()


def is_lora(spec: ModelSpec) -> bool:
    """Whether adapters are trained instead of the model."""
    return spec.lora is not None


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of every generator an update draws from (LoRA's dropout)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Take back what `rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def flush(folder: Path) -> None:
    """Bring every file below `folder`, and the folders themselves, to the disk."""
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
