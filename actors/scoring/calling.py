"""How a reward function is found, called and believed. Standard library only: a child imports this.

Invariant: what is believed is one finite float per completion, or None where the function abstains.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import math
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from actors.scoring.criteria import RewardFailed, RewardFailure

TRACEBACK_CHARACTERS = 2000
GIVEN = ("prompts", "completions")


class FunctionNotFound(ValueError):
    """A function cannot be had from its import path; the message says what failed and where."""


def import_function(target: str) -> Callable[..., Any]:
    """The callable that `package.module:function` names.

    Raises:
        FunctionNotFound: no such module (with the nearest name and where it looked), an error
            inside the module (with its traceback), no such attribute (with the nearest), or an
            attribute that cannot be called.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise FunctionNotFound(f"{target!r} is not of the form package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise FunctionNotFound(
                f"{target!r}: there is no module {missing!r}{_did_you_mean_module(missing)}; "
                f"looked in {', '.join(_search_folders())}"
            ) from error
        raise FunctionNotFound(
            f"{target!r}: importing module {module_name!r} failed: {traceback_tail(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            where = getattr(found, "__file__", None) or module_name
            raise FunctionNotFound(
                f"{target!r}: {where} has no {part!r}{_did_you_mean(part, names)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise FunctionNotFound(f"{target!r} is a {type(found).__name__}, not a function")
    return found


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _did_you_mean_module(missing: str) -> str:
    package, _, leaf = missing.rpartition(".")
    path = getattr(sys.modules.get(package), "__path__", None) if package else None
    return _did_you_mean(leaf, (module.name for module in pkgutil.iter_modules(path)))


def _search_folders() -> list[str]:
    """The folders of `sys.path`, without the interpreter's own library."""
    library = os.path.dirname(os.__file__)
    own = {library, os.path.join(library, "lib-dynload")}
    return [path for path in sys.path if os.path.isdir(path) and path not in own]


def arguments(
    function: Callable[..., Any],
    source: Any,
    completions: list[str],
    columns: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The keyword arguments of one call for one group of G completions (TRL's convention).

    `prompts` and every column become lists of length G, each entry its own copy. Completions are
    strings, or one-message conversations where the prompt is a list of messages. A function
    without `**kwargs` gets only what it names. An option stands before a column of its name.

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
            [{"role": "assistant", "content": text}] if conversational else text
            for text in completions
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


def traceback_tail(error: BaseException) -> str:
    """The end of `error`'s traceback, without the frames of this folder and of importlib."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.dirname(frame.filename) != os.path.dirname(__file__)
        and not frame.filename.startswith("<frozen importlib")
    ]
    lines = traceback.format_exception_only(type(error), error)
    return "".join([*traceback.format_list(frames), *lines]).strip()[-TRACEBACK_CHARACTERS:]
