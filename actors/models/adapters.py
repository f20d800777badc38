"""LoRA adapters apart from the model that they are trained on: their names, shapes and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from actors.models.loading import load_skeleton
from actors.specs import ModelSpec

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Adapters:
    """What `model.lora` makes of a model, without weights."""

    config: PeftConfig  # `target_modules` by their names
    shapes: dict[str, torch.Size]  # by PEFT's name of the parameter


def adapters_of(spec: ModelSpec) -> Adapters:
    """Those of `spec.lora` on the model that it names; no weight is read. Raises ModelError."""
    with torch.device("meta"):
        model = load_skeleton(spec)
    shapes = {name: p.shape for name, p in model.named_parameters() if is_adapter(name)}
    return Adapters(model.peft_config["default"], shapes)


def is_adapter(name: str) -> bool:
    """Whether PEFT's parameter of this name belongs to an adapter."""
    return "lora_" in name


def in_a_file(name: str) -> str:
    """The name of an adapter's parameter in a folder that PEFT saves."""
    return name.replace(".default.", ".")
