"""Models whose weights are quantised: whole ones are taken, or the model is refused in one line."""

from __future__ import annotations

from actors.models.loading import ModelError
from actors.models.packed import (
    KEPT_IN_4_BITS,
    quantised_by,
    with_whole_weights,
    without_ending,
)
from actors.specs import ModelSpec
from aligntune.decisions import Decision
from aligntune.errors import UserError


def settle_model(model: ModelSpec) -> tuple[ModelSpec, tuple[Decision, ...]]:
    """The model with whole weights, and what was decided where `model` names packed ones. Raises
    UserError where there are no whole ones."""
    try:
        whole = with_whole_weights(model)
    except ModelError as error:
        raise UserError(f"model.name: {error}") from error
    if whole is model:
        return model, ()
    why = (
        f"the weights of {model.name} are packed by bitsandbytes, and can neither be trained nor "
        f"loaded by vLLM; {KEPT_IN_4_BITS}"
    )
    decided = [Decision("model.name", whole.name, why)]
    if model.revision is not None:
        decided.append(Decision("model.revision", None, f"{model.revision} is of {model.name}"))
    return whole, tuple(decided)


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
