"""A transformers model as a role uses it: what strategies store and step, whatever it answers."""

from __future__ import annotations

from typing import Any

from torch import nn


class TrainedModel(nn.Module):
    """Wraps `model`, a transformers model, plain or under PEFT; a subclass says what it answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def unwrapped(self) -> Any:
        """The transformers model, without PEFT's wrapper but with its adapters inside."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def chunks(self, tokens: int) -> int:
        """How many calls of the output head `tokens` response tokens take; at least one."""
        return 1
