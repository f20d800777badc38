"""The last layer of a sequence classifier, computed in float32 whatever the layers below are.

A score in bfloat16 has three digits: texts that the model tells apart would tie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FloatHead(nn.Linear):
    """A linear layer whose products and sums are in float32 or wider, under autocast too. Its
    weights stay as they are kept, and saved."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., outputs] of `input` [..., H]."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.to(wide), self.weight.to(wide), bias)


def give_float_heads(model: Any) -> None:
    """Make the layers that give a classifier's logits `FloatHead`s. Those of remote code stay: what
    such code does with the logits may want one dtype."""
    body = getattr(model, model.base_model_prefix, None)
    if not type(model).__module__.startswith("transformers.") or body is None:
        return
    below = {*body.modules()}
    for part in model.modules():
        is_head = type(part) is nn.Linear and part not in below
        if is_head and part.out_features == model.config.num_labels:
            part.__class__ = FloatHead
