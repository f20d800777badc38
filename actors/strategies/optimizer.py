"""The optimiser of every strategy, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from actors.specs import RankSpec
from actors.strategies.base import NonFiniteGradient


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


def take_step(optimizer: torch.optim.Optimizer, norm: float, learning_rate: float) -> float:
    """Step by gradients that are clipped, and clear them; returns `norm`, theirs before. Raises
    NonFiniteGradient where that is no finite number: they are cleared, and no weight is changed."""
    if not math.isfinite(norm):
        optimizer.zero_grad()
        raise NonFiniteGradient(f"gradient norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """What each group of weights is stepped with: decay, betas, epsilon and what else it says."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def put_back(optimizer: Any, settings: Sequence[dict[str, Any]]) -> None:
    """Give each group its `settings_of` of before a load, which takes over those of the state that
    is loaded: a run goes on with the moments it had and the settings it has now."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def without(
    state: Mapping[str, Any], weights: Mapping[str, torch.Tensor], names: Collection[str]
) -> dict[str, Any]:
    """The state of the optimiser that `make_optimizer` makes of `weights`, by their names in the
    model's order, as if it had been made without those of `names`."""
    order = sorted(weights, key=lambda name: weights[name].ndim <= 1)  # as they are in its groups
    gone = {index for index, name in enumerate(order) if name in names}
    groups = [
        {**group, "params": [index for index in group["params"] if index not in gone]}
        for group in state["param_groups"]
    ]
    return {
        "state": {index: own for index, own in state["state"].items() if index not in gone},
        "param_groups": [group for group in groups if group["params"]],
    }
