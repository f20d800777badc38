"""How a reward function is called and believed. Standard library only: a child imports this.

Invariant: what is believed is one finite float per completion, or None where the function abstains.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Set
from typing import Any

from actors.scoring.criteria import RewardFailed, RewardFailure

GIVEN = ("prompts", "completions")


def arguments(
    function: Callable[..., Any],
    source: Any,
    completions: list[Any],
    columns: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The keyword arguments of one call for one group of G completions (TRL's convention).

    `prompts` and every column become lists of length G, each entry its own copy. Completions are
    strings; or messages: what an episode has said, and where the prompt is a list of messages one
    with the text. A function without `**kwargs` gets only what it names. An option stands before a
    column of its name.

    Raises:
        ValueError: a name stands for two things, or the function needs one that nobody gives.
    """
    for name in (*columns, *options):
        if name in GIVEN:
            raise ValueError(
                f"{name!r} is both a {'data column' if name in columns else 'reward option'} and "
                "an argument every reward gets; rename it"
            )
    conversational = not isinstance(source, str)
    repeat = range(len(completions))
    given: dict[str, Any] = {
        "prompts": [copy.deepcopy(source) for _ in repeat],
        "completions": [
            [{"role": "assistant", "content": said}]
            if conversational and isinstance(said, str)
            else said
            for said in completions
        ],
    }
    given |= {name: [copy.deepcopy(value) for _ in repeat] for name, value in columns.items()}
    given |= options
    accepted, takes_all = named_parameters(function)
    missing = [name for name, required in accepted.items() if required and name not in given]
    if missing:
        raise ValueError(
            f"the reward needs {missing[0]!r}, which is neither a data column nor a reward option; "
            f"the columns are {', '.join(map(repr, columns)) or 'none'}"
        )
    return given if takes_all else {name: given[name] for name in accepted if name in given}


def named_parameters(function: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """The keyword parameters of `function`, each with whether it is required, and whether
    `**kwargs` takes any other."""
    parameters = inspect.signature(function).parameters.values()
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p.default is p.empty for p in parameters if p.kind in by_keyword}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def checked(criterion: str, values: Any, count: int) -> list[float | None]:
    """`values` as `count` finite floats, None where the function abstains (TRL's convention).

    Anything else is `RewardFailed`, never mended.
    """
    try:
        if isinstance(values, (str, bytes, Mapping, Set)) or not hasattr(values, "__len__"):
            raise TypeError
        found = list(values)  # refuses arrays without a dimension
    except TypeError:
        raise RewardFailed(
            criterion,
            RewardFailure.WRONG_COUNT,
            f"it returned a {type(values).__name__}, not a list of {count} numbers",
        ) from None
    if len(found) != count:
        raise RewardFailed(
            criterion,
            RewardFailure.WRONG_COUNT,
            f"it returned {len(found)} values for {count} completions",
        )
    return [
        None if value is None else _checked_number(criterion, index, value)
        for index, value in enumerate(found)
    ]


def _checked_number(criterion: str, index: int, value: Any) -> float:
    try:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise RewardFailed(
            criterion,
            RewardFailure.NOT_A_NUMBER,
            f"its value for completion {index} is {_short(value)}, a {type(value).__name__}",
        ) from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardFailed(
            criterion, RewardFailure.NOT_FINITE, f"its value for completion {index} is {number}"
        )
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
