"""Settles what a preference job's config leaves open by what its pairs and its model are. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from actors.models.positions import Bound
from aligntune.config.preference import PreferenceConfig
from aligntune.decisions import KEPT, Decision, asked_length
from aligntune.errors import UserError

MAX_LENGTH = "data.max_length"


def settle_max_length(
    config: PreferenceConfig,
    lengths: Collection[int],
    positions: int | None,
    previous: Mapping[str, Any] | None = None,
    bound: Bound | None = None,
) -> tuple[PreferenceConfig, tuple[Decision, ...]]:
    """The config with `data.max_length` settled; `lengths` are those of its pairs. It is settled to
    no more than `bound`, to which a row's numbers do not hang on the rows beside it; what is given
    may be more.

    Raises:
        UserError: more tokens than the model has positions for.
    """
    given, taught = config.data.max_length, config.algorithm_name == "sft"
    if given is not None:
        if positions is not None and given > positions:
            raise UserError(
                f"data.max_length={given}, and the model reads {positions} tokens by its "
                f"configuration: lower it to {positions} or less"
            )
        return config, ()
    kept = ((previous or {}).get("data") or {}).get("max_length")
    if isinstance(kept, int):
        decision = Decision(MAX_LENGTH, kept, KEPT)
    else:
        asked, why = asked_length(lengths, "rows" if taught else "pairs", config.data.long_rows)
        value = asked if positions is None else min(asked, positions)
        if bound is not None and bound.tokens < value:
            value, why = bound.tokens, f"{bound.by}; {asked}, {why}, is more"
        elif value < asked:
            why = f"the positions that the model has; {asked}, {why}, is more"
        decision = Decision(MAX_LENGTH, value, why)
    data = config.data.model_copy(update={"max_length": decision.value})
    return config.model_copy(update={"data": data}), (decision,)


def beyond_note(config: PreferenceConfig, longest: int, bound: Bound | None) -> list[str]:
    """A line on rows beyond `bound`, where some are: `longest` is the longest row in tokens."""
    given = config.data.max_length
    if bound is None or given is None or min(given, longest) <= bound.tokens:
        return []
    return [
        f"{MAX_LENGTH}={given} takes rows of more than {bound.tokens} tokens ({bound.by}): a "
        "forward pass with one has other numbers for its other rows too; lower it, or set "
        "train.pairs_per_worker=1 and eval.pairs_per_worker=1"
    ]
