"""How many tokens a model can read: its positions, from its configuration alone."""

from __future__ import annotations

from typing import Any

from actors.models.hub import ask_once
from actors.models.loading import local, no_configuration
from actors.specs import ModelSpec

STRETCHED = ("linear", "dynamic", "yarn")
"""Rotary scalings by whose factor a model reads on beyond `max_position_embeddings`; the others'
number counts it already."""


def positions_of(config: Any) -> int | None:
    """Tokens that a model with this transformers configuration reads; None where nothing bounds it.

    Where scaling may have been counted already the larger number is taken: this is to refuse what
    cannot be, and never what can.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in STRETCHED or not isinstance(factor, int | float):
        return positions
    base = scaling.get("original_max_position_embeddings") or positions
    return max(positions, int(base * factor))


def positions_in_table(model: Any) -> int | None:
    """Tokens that a loaded model reads whose positions begin behind its padding's, as RoBERTa's do:
    its table has so many more rows. None for other models, which the configuration tells of."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("embeddings.position_embeddings") and padding is not None:
            return int(module.num_embeddings - padding - 1)
    return None


def model_positions(spec: ModelSpec) -> int | None:
    """`positions_of` the model that `spec` names. Raises ModelError without a configuration."""
    from transformers import AutoConfig

    spec = local(spec)
    ask_once(spec.name)
    try:
        config = AutoConfig.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise no_configuration(spec.name, error) from error
    return positions_of(config)
