"""A model's weights as its checkpoint has them: by those names, in those pieces.

transformers loads some checkpoints into other names and pieces: of a mixture, all experts of a
layer are one weight. What reads checkpoints itself, as vLLM does, may know the checkpoint's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from types import SimpleNamespace
from typing import Any

import torch

NamedTensors = Iterator[tuple[str, torch.Tensor]]


def checkpoint_weights(model: Any, weights: NamedTensors) -> NamedTensors:
    """What `model.save_pretrained` would write where `weights` are all parameters of `model`, each
    by its name there and in the order of its modules.

    At one time no more is held than a weight and the pieces that it is cut into or, in a family
    whose checkpoints join weights, than a layer.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = chain(weights, kept_buffers(model))
    conversions = _conversions(model)
    if not conversions:
        yield from weights
        return
    loaded: Any = SimpleNamespace(config=model.config, _weight_conversions=conversions)
    parts: Iterator[Iterable[tuple[str, torch.Tensor]]] = ((weight,) for weight in weights)
    if any(map(_joins, conversions)):
        parts = (layer for _, layer in groupby(weights, key=lambda weight: _layer(weight[0])))
    for part in parts:
        yield from revert_weight_conversion(loaded, dict(part)).items()


def kept_buffers(model: Any) -> NamedTensors:
    """The buffers that are part of the model, as biases of some routers are."""
    persistent = model.state_dict().keys()
    buffers = model.named_buffers(remove_duplicate=False)
    return ((name, buffer.detach()) for name, buffer in buffers if name in persistent)


def _conversions(model: Any) -> list[Any]:
    """What transformers has made of the checkpoint's weights: of what it has loaded, what it did
    then, and else what it does with those of the family."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found: list[Any] | None = getattr(model, "_weight_conversions", None)
    if found is None or getattr(model, "is_quantized", False):  # whose own cannot be undone
        every = get_model_conversion_mapping(model, add_legacy=False)
        found = [each for each in every if not isinstance(each, PrefixChange)]
    return found


def _joins(conversion: Any) -> bool:
    """Whether one weight of the checkpoint is made of several of the model."""
    targets: list[str] = conversion.target_patterns
    return hasattr(conversion, "operations") and (len(targets) > 1 or "*" in targets[0])


def _layer(name: str) -> str:
    """A weight's name as far as the number of its layer; all of it where there is none."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts)
