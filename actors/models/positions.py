"""How many tokens a model can read: its positions, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from actors.models.configuration import configuration
from actors.specs import ModelSpec

STRETCHED = ("linear", "dynamic", "yarn")
"""Rotary scalings by whose factor a model reads on beyond `max_position_embeddings`; the others'
number counts it already."""

BEHIND_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types whose positions begin behind the padding token's number, as RoBERTa's do: of their
`max_position_embeddings` so many are never a token's."""

TABLES = ("position_embeddings", "positions_embed", "embed_positions", "wpe")
"""What models call their table of learned positions."""


class Bound(NamedTuple):
    """How far a model reads."""

    tokens: int
    by: str = "max_position_embeddings"
    """What says so, for people: a key of its configuration, and why."""


def positions_of(config: Any) -> int | None:
    """Tokens that a model with this transformers configuration reads; None where nothing bounds it.

    Where scaling may have been counted already the larger number is taken: this is to refuse what
    cannot be, and never what can.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    if text.model_type in BEHIND_PADDING:
        return positions - _taken_by_padding(text)
    scaling = _scaling(text)
    factor = scaling.get("factor")
    if _kind(scaling) not in STRETCHED or not isinstance(factor, int | float):
        return positions
    base = scaling.get("original_max_position_embeddings") or positions
    return max(positions, int(base * factor))


def bound_of(config: Any, vllm: bool) -> Bound | None:
    """As far as `positions_of` says and a token's log-prob depends on its own row alone, by one
    model for whoever samples (with `vllm` by vLLM) and trains; None where nothing bounds it.

    Some rotary frequencies change with the longest row: LongRoPE's for all tokens of a pass that
    has a row of more than its original positions, and in vLLM for all tokens where any may have as
    many; dynamic ones with every longer row. vLLM reads none at a position that YaRN's factor alone
    gives.
    """
    if (positions := positions_of(config)) is None:
        return None
    text = config.get_text_config()
    scaling = _scaling(text)
    kind, written = _kind(scaling), text.max_position_embeddings
    original = scaling.get("original_max_position_embeddings")
    others = "beyond which log-probs would depend on the rows beside"
    if kind == "longrope" and isinstance(original, int) and original < positions:
        return Bound(original, f"original_max_position_embeddings of LongRoPE, {others}")
    if kind == "dynamic" and written < positions:
        return Bound(written, f"max_position_embeddings of dynamic scaling, {others}")
    if kind == "yarn" and vllm and written < positions:
        cure = f"to be {positions} in its config.json if vLLM is to read as far as YaRN's factor"
        if isinstance(original, int):  # it is what was written, where nobody wrote it
            cure += f", beside original_max_position_embeddings={original} there"
        return Bound(written, f"max_position_embeddings, {cure}")
    return Bound(positions)


def _scaling(text: Any) -> Mapping[str, Any]:
    """Of rotary positions, by the configuration of the text model."""
    return getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}


def _kind(scaling: Mapping[str, Any]) -> str | None:
    kind: str | None = scaling.get("rope_type", scaling.get("type"))
    return kind


def _taken_by_padding(config: Any) -> int:
    if config.model_type == "mpnet":  # whatever its padding is
        return 2
    if getattr(config, "position_embedding_type", "absolute") != "absolute":  # of some ESM
        return 0
    padding: int | None = config.pad_token_id
    return 0 if padding is None else padding + 1


def positions_in_table(model: Any) -> int | None:
    """Tokens that a loaded model reads because it has learned so many positions and no more; None
    for models that compute theirs, as rotary ones, which the configuration alone tells of."""
    for name, module in model.named_modules():
        table = getattr(module, "weight", None)
        if name.rpartition(".")[2] in TABLES and table is not None:
            padding = getattr(module, "padding_idx", None)
            rows = len(table) if padding is None else len(table) - padding - 1
            counted = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            return min(rows, counted or rows)  # some tables begin with rows for no token
    return None


def model_bound(spec: ModelSpec, vllm: bool) -> Bound | None:
    """`bound_of` the model that `spec` names. Raises ModelError without a configuration."""
    return bound_of(configuration(spec), vllm)


def model_positions(spec: ModelSpec) -> int | None:
    """`positions_of` the model that `spec` names. Raises ModelError without a configuration."""
    return positions_of(configuration(spec))
