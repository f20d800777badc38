"""What the reward functions here read from a call beside completions: a data column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def column_of(columns: Mapping[str, Any], name: str) -> Sequence[Any]:
    """The data column `name`, one value per completion; `column.field` is a field of its objects.

    Raises:
        ValueError: there is no such column, or it has a row without a value.
    """
    if name not in columns and name.partition(".")[0] in columns:
        top, _, path = name.partition(".")
        return [field_of(value, path, name) for value in columns[top]]
    if name not in columns:
        have = ", ".join(map(repr, sorted(columns.keys() - {"prompts"}))) or "none"
        raise ValueError(
            f"the reward reads column {name!r}, which the data lack (columns: {have}); "
            "name another with the reward option 'column'"
        )
    values: Sequence[Any] = columns[name]
    if any(value is None for value in values):
        raise ValueError(f"a row of the data has no value in column {name!r}")
    return values


def field_of(value: Any, path: str, name: str) -> Any:
    """The field of an object in a data column, as `a.b` of `column.a.b`.

    Raises:
        ValueError: there is no such field, or it is null; `name` is the whole name, for messages.
    """
    for key in path.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise ValueError(f"a row of the data has no value in column {name!r}")
        value = value[key]
    return value
