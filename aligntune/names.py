"""Names of algorithms as people spell them, without loading any algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFERENCE = ("dpo", "reward_model", "sft")
"""The algorithms that are Ray Train jobs over TRL; the others are online."""


def canonical(name: str) -> str:
    """Case, blanks and punctuation do not tell names apart: `Dr. GRPO` is `drgrpo`."""
    return "".join(c for c in name.lower() if c.isalnum())


def same_choice(one: Any, other: str) -> bool:
    """Whether two names choose the same, in whatever spelling; `module:Class` paths do exactly."""
    if not isinstance(one, str) or ":" in one or ":" in other:
        return bool(one == other)
    return canonical(one) == canonical(other)


def preference_name(name: Any) -> str | None:
    """The name of one of PREFERENCE for that name in any spelling, else None."""
    spelled = canonical(name) if isinstance(name, str) else ""
    return next((known for known in PREFERENCE if canonical(known) == spelled), None)


def algorithm_of(tree: Mapping[str, Any]) -> Any:
    """What a config tree names as its algorithm, in either form."""
    algorithm = tree.get("algorithm")
    return algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm


def is_preference(tree: Mapping[str, Any]) -> bool:
    """Whether a config tree is that of a preference job."""
    return preference_name(algorithm_of(tree)) is not None
