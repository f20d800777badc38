"""The reward for JSON that meets a schema, by jsonschema. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from actors.scoring.said import Completion, text_of
from aligntune.rewards.fences import last_block
from aligntune.rewards.inputs import column_of

_NONE: Any = object()


def json_valid(
    completions: list[Completion],
    *,
    schema: dict[str, Any] | None = None,
    column: str | None = None,
    fenced: bool = True,
    **columns: Any,
) -> list[float]:
    """1 where a completion is one JSON value that meets the schema, else 0.

    Range: 0 or 1.
    Formula: the last fenced block that is tagged as JSON, else the last without a tag, else (and
    without `fenced`) the whole text is parsed (NaN and Infinity are no JSON) and checked against
    option `schema`, or against the one that a `column` holds, as an object or as text; without
    either every JSON value is right.
    Source: jsonschema; the draft is the one that `$schema` names, else 2020-12. A `$ref` that
    leads out of the schema is never fetched.

    Raises:
        ValueError: both `schema` and `column`, or what is no schema.
    """
    if schema is not None and column is not None:
        raise ValueError("reward options: give schema or column, not both")
    rows = column_of(columns, column) if column is not None else [schema] * len(completions)
    return [
        float(_meets(_parsed(text_of(completion), fenced), _validator(row)))
        for completion, row in zip(completions, rows, strict=True)
    ]


def _parsed(text: str, fenced: bool) -> Any:
    block = last_block(text, ("json",)) if fenced else None
    try:
        return json.loads(text if block is None else block, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NONE


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _meets(value: Any, validator: Any) -> bool:
    if value is _NONE:
        return False
    try:
        return validator is None or bool(validator.is_valid(value))
    except RecursionError:  # nested as deep as a schema that names itself follows
        return False


def _validator(schema: Any) -> Any:
    """What checks by a schema, None for none. Raises ValueError."""
    if schema is None:
        return None
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a row of the data has a schema that is no JSON: {error}") from error
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"a JSON schema is an object, not {type(schema).__name__}")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the JSON schema is none: {error.message}") from error
    return kind(schema, registry=Registry())
