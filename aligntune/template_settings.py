"""What chat templates decide of a run, once, when it begins: by which token a turn ends, and the
day that they write.

Invariant: a run's prompts, rows and conversations are rendered alike on whatever day it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from typing import Any

from actors.engines.base import configured_ends
from actors.models.templates import give, turn_ends, writes_day
from actors.specs import ModelSpec
from aligntune.decisions import KEPT, Decision
from aligntune.runs.rundir import same_place

STOPS, DAY = "model.stop_token_ids", "model.chat_template_day"


def settle_template(
    model: ModelSpec,
    tokenizer: Any | None,
    others: Sequence[Any],
    before: Callable[[], Mapping[str, Any] | None],
) -> tuple[ModelSpec, tuple[Decision, ...]]:
    """The model with what templates decide, and what was decided; the tokenizers get the day.

    Args:
        tokenizer: of the model that writes by its template, if one does.
        others: those whose templates are applied too, as of reward models.
        before: gives the config tree of the run that is to go on, if there is one.
    """
    decided = []
    before = cache(before)  # it may ask a storage
    if model.stop_token_ids is None and tokenizer is not None:
        decided += _end(model, tokenizer, before)
    own = [] if tokenizer is None else [tokenizer]
    applied = [each for each in (*own, *others) if writes_day(each)]
    if model.chat_template_day is None and applied:
        decided.append(_day(before()))
    values = {decision.path.partition(".")[2]: decision.value for decision in decided}
    model = model.model_copy(update=values)
    for each in applied:
        give(each, {}, model.chat_template_day)
    return model, tuple(decided)


def _end(
    model: ModelSpec, tokenizer: Any, before: Callable[[], Mapping[str, Any] | None]
) -> list[Decision]:
    """The token that ends a turn, where nothing else says that it does. Of what follows an answer
    one that is known may come later, as behind Cohere's `<|END_RESPONSE|>`: it ends the turn.

    A run of this model that goes on ends its turns as it did: one of an earlier version has no such
    token."""
    ends = turn_ends(tokenizer)
    if not ends or {tokenizer.eos_token_id, *configured_ends(model)} & {*ends}:
        return []
    old = (before() or {}).get("model") or {}
    if old.get("name") == model.name or same_place("model.name", old.get("name"), model.name):
        kept = old.get("stop_token_ids")
        return [] if kept is None else [Decision(STOPS, kept, KEPT)]
    end = tokenizer.convert_ids_to_tokens(ends[0])
    why = (
        f"the chat template ends a turn by {end}, which neither eos_token, "
        f"{tokenizer.eos_token}, nor the generation config has"
    )
    return [Decision(STOPS, [ends[0]], why)]


def _day(before: Mapping[str, Any] | None) -> Decision:
    kept = ((before or {}).get("model") or {}).get("chat_template_day")
    if isinstance(kept, str):
        return Decision(DAY, kept, KEPT)
    why = "the chat template writes the date, and a run that goes on has to write the same one"
    return Decision(DAY, date.today().isoformat(), why)
