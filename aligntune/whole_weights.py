"""What a model's configuration decides before the model is loaded: whole weights in place of
quantised ones, or one line that refuses it, and attention that leaves nothing out."""

from __future__ import annotations

from actors.models.caps import CAP, attention_of
from actors.models.configuration import ModelError, configuration
from actors.models.packed import (
    KEPT_IN_4_BITS,
    quantised_by,
    with_whole_weights,
    without_ending,
)
from actors.specs import ModelSpec
from aligntune.config.backends import Backend
from aligntune.decisions import Decision
from aligntune.errors import UserError


def settle_model(model: ModelSpec, backend: Backend) -> tuple[ModelSpec, tuple[Decision, ...]]:
    """The model with whole weights where `model` names packed ones, and with the attention that
    computes all of it; and what was decided. Raises UserError where there are no whole weights."""
    try:
        whole = with_whole_weights(model)
        attention = attention_of(whole.attention, configuration(whole))
    except ModelError as error:
        raise UserError(f"model.name: {error}") from error
    decided = [] if whole is model else _renamed(model, whole)
    if attention != whole.attention and backend != "unsloth":  # which has an attention of its own
        why = f"the model caps its attention's scores ({CAP}), and transformers' sdpa does not"
        decided.append(Decision("model.attention", attention, why))
        whole = whole.model_copy(update={"attention": attention})
    return whole, tuple(decided)


def _renamed(model: ModelSpec, whole: ModelSpec) -> list[Decision]:
    why = (
        f"the weights of {model.name} are packed by bitsandbytes, and can neither be trained nor "
        f"loaded by vLLM; {KEPT_IN_4_BITS}"
    )
    decided = [Decision("model.name", whole.name, why)]
    if model.revision is not None:
        decided.append(Decision("model.revision", None, f"{model.revision} is of {model.name}"))
    return decided


def check_whole(key: str, model: ModelSpec) -> None:
    """Whether the weights of the model that `key` names are whole: those that are trained, and
    those that what is trained is held to. Raises UserError."""
    try:
        how = quantised_by(model)
    except ModelError as error:
        raise UserError(f"{key}: {error}") from error
    if how is not None:
        other = without_ending(model.name)
        cure = f", as {other!r} may have them" if other else ""
        raise UserError(
            f"{key}: the weights of {model.name!r} are quantised ({how}), and training needs whole "
            f"ones; name a model that has them{cure}"
        )
