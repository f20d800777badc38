"""Values that no setting can have, whatever its key: pydantic would take some and make them another
type, and files or processes would choke on the others long after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aligntune.errors import UserError

LARGEST = 2**63 - 1  # of an integer: of arrays, of YAML readers, of most that is counted
DEEPEST = 100  # levels of mappings and lists


def refuse_impossible(tree: Mapping[str, Any]) -> None:
    """Raises UserError for bytes, a text with NUL, too large a number, or endless depth."""
    for path, value in _leaves(tree, ""):
        if isinstance(value, bytes | bytearray):
            raise UserError(f"{path}: a text is wanted, not bytes; decode them")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{path}: the text has a NUL character in it; take it out")
        if _halved(path) or (isinstance(value, str) and _halved(value)):
            raise UserError(f"{path}: the text has half a character in it; write it in UTF-8")
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise UserError(f"{path}: the number is too large; {LARGEST} is the largest")


def _halved(text: str) -> bool:
    """Whether it holds a surrogate, which no file takes."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def refuse_truth_for_a_number(given: Any, taken: Any, path: str = "") -> None:
    """Raises UserError where `true` or `false` was given and a number was made of it.

    `given` is the tree as written, `taken` what the settings made of it.
    """
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        raise UserError(f"{path}: a number is wanted, not {str(given).lower()}")
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        pairs = [(key, given[key], taken[key]) for key in given if key in taken]
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        pairs = [(i, *pair) for i, pair in enumerate(zip(given, taken, strict=False))]
    else:
        return
    for key, one, other in pairs:
        refuse_truth_for_a_number(one, other, f"{path}.{key}" if path else str(key))


def _leaves(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a tree that is no mapping or list."""
    if depth > DEEPEST:
        raise UserError(f"{path[:60]}...: it is nested too deeply for settings")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}", depth + 1)
    else:
        yield path, value
