"""The tokenizer of a config's model, read and checked; each fault is named by its key."""

from __future__ import annotations

from typing import Any

from actors.models.configuration import ModelError
from actors.models.loading import check_adapters, check_causal_lm, load_tokenizer
from actors.models.templates import check_given
from actors.specs import ModelSpec
from aligntune.errors import UserError


def read_tokenizer(spec: ModelSpec, causal: bool = True) -> Any:
    """The tokenizer of model `spec`, which writes text where it is `causal`. Raises UserError for a
    model, adapters or settings of the chat template that do not go together."""
    try:
        if causal:
            check_causal_lm(spec)
        tokenizer = load_tokenizer(spec)
    except ModelError as error:
        raise UserError(f"model.name: {error}") from error
    try:
        if causal:
            check_adapters(spec)
    except ModelError as error:
        raise UserError(f"model.lora: {error}") from error
    try:
        check_given(tokenizer)
    except ValueError as error:
        raise UserError(f"model.chat_template_kwargs: {error}") from error
    return tokenizer
