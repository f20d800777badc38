"""What a rank holds, as others want it: merged weights, adapters, generators, files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from actors.models.adapters import is_adapter
from actors.models.wrapped import TrainedModel

NamedTensors = Iterator[tuple[str, torch.Tensor]]
Whole = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""A parameter as all ranks together have it, in a dtype, without its gradient; all ranks ask
together. What travels between them is in that dtype where it is the smaller one."""


def in_place(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`Whole` where every rank has all of it: the training weight's own memory, in its dtype."""
    return parameter.detach().to(dtype)


def merged_state(model: TrainedModel, dtype: torch.dtype, whole: Whole) -> NamedTensors:
    """Weights [name, tensor] in `dtype` with LoRA added out of place: training weights stay as are.

    A tensor may share the training weight's memory: copy what is kept.
    """
    inner = model.unwrapped
    adapted = {
        name: module
        for name, module in inner.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }
    for name, parameter in inner.named_parameters():
        plain = _plain(name, adapted)
        if plain is None:
            continue
        clean, layers = plain
        merged = _numbers(parameter, whole, parameter.dtype if layers else dtype)
        if layers:
            merged = merged.float()
            for delta in (d for layer in layers for d in _deltas(layer, whole)):
                merged = merged + delta.float()
        yield clean, merged.to(dtype)


def _plain(name: str, adapted: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """A weight's name without PEFT's wrappers, and those that add to it; None: an adapter's own.

    Adapters of several weights of one module, such as a mixture's experts, wrap one another.
    """
    parts = name.split(".")
    clean: list[str] = []
    around: list[Any] = []
    for index, part in enumerate(parts):
        wrapper = adapted.get(".".join(parts[:index]))
        if wrapper is None:
            around = around if index == len(parts) - 1 else []
            clean.append(part)
        elif part != "base_layer":
            return None
        else:
            around.append(wrapper)
    own = [layer for layer in around if getattr(layer, "parameter_name", "weight") == parts[-1]]
    return ".".join(clean), own


class _Delta(nn.Module):
    """What the active adapters of a layer add to its weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> list[torch.Tensor]:
        return [self.layer.get_delta_weight(adapter) for adapter in self.layer.active_adapters]


@torch.no_grad()
def _deltas(layer: Any, whole: Whole) -> list[torch.Tensor]:
    """PEFT's own product of the adapters' weights, made of whole ones."""
    weights = {
        f"layer.{name}": whole(parameter, parameter.dtype)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    deltas: list[torch.Tensor] = torch.func.functional_call(_Delta(layer), weights)
    return deltas


def _numbers(parameter: torch.Tensor, whole: Whole, dtype: torch.dtype) -> torch.Tensor:
    """A weight as numbers in `dtype`; where bitsandbytes keeps it in 4 bits, in the dtype that it
    computes in."""
    packed = getattr(parameter, "quant_state", None)
    if packed is None:
        return whole(parameter, dtype)
    from bitsandbytes.functional import dequantize_4bit

    numbers: torch.Tensor = dequantize_4bit(parameter.data, packed)
    return numbers


def adapter_state(model: TrainedModel, whole: Whole) -> NamedTensors:
    """The trainable LoRA weights under the names PEFT gives them."""
    if not hasattr(model.model, "peft_config"):
        return
    for name, parameter in model.model.named_parameters():
        if is_adapter(name):
            yield name, whole(parameter, parameter.dtype)


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


def as_file(state: Any) -> memoryview:
    """What `torch.save` writes of `state`, in memory: a copy, whatever becomes of its tensors."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()
