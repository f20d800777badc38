"""What a mixture's config says of its routers, which TRL's SFTTrainer sets for its training.

Nothing here trains by the loss that these settings are about, the balance of the experts. A saved
model says of it what the model said that was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTINGS = ("output_router_logits", "router_aux_loss_coef")


def routing_of(config: Any) -> dict[str, Any]:
    """Those of `SETTINGS` that a model's config has."""
    text = config.get_text_config()
    return {name: getattr(text, name) for name in SETTINGS if hasattr(text, name)}


def put_back(routing: Mapping[str, Any], config: Any) -> None:
    """Let `config` have what `routing_of` gave, and no other of `SETTINGS`."""
    text = config.get_text_config()
    for name in SETTINGS:
        if name in routing:
            setattr(text, name, routing[name])
        elif hasattr(text, name):
            delattr(text, name)
