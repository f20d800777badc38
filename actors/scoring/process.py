"""What a criterion is, and the child process that runs it: import, call, check, answer.

Invariant: what leaves this process is one finite float per completion, or a reason why there is
none. Standard library only: a child imports this, the user's function, and nothing else. The user's
code runs in the main thread (signals work there); its prints go to the actor's log, never to the
channel.
"""

from __future__ import annotations

import asyncio
import copy
import ctypes
import difflib
import importlib
import inspect
import math
import os
import pickle
import pkgutil
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, BinaryIO, cast

TRACEBACK_CHARACTERS = 2000
_LENGTH = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
_GIVEN = ("prompts", "completions")


class RewardFailure(StrEnum):
    """Why a criterion has no scores for a group."""

    IMPORT = "import"  # the function could not be imported where it runs
    RAISED = "raised"
    TIMEOUT = "timeout"
    DIED = "died"  # its process ended: os._exit, a signal, out of memory
    WRONG_COUNT = "wrong_count"
    NOT_A_NUMBER = "not_a_number"
    NOT_FINITE = "not_finite"
    TOO_LONG = "too_long"  # for a reward model, which never scores a part of a text


class RewardFailed(RuntimeError):
    """A criterion gave no scores for a group; `detail` ends with the user's traceback if any."""

    def __init__(self, criterion: str, reason: RewardFailure, detail: str) -> None:
        super().__init__(f"reward {criterion!r} failed ({reason}): {detail}")
        self.criterion = criterion
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, RewardFailure, str]]:
        return type(self), (self.criterion, self.reason, self.detail)


class FunctionNotFound(ValueError):
    """A function cannot be had from its import path; the message says what failed and where."""


@dataclass(frozen=True)
class RewardCriterion:
    """One Python function that scores completions, as reward actors get it.

    `search_path` is the driver's `sys.path`; the child looks there first, then on the actor's own.
    """

    name: str  # in metrics
    target: str | bytes  # "module:function", or the function pickled by cloudpickle
    timeout_s: float  # per call, one group a call; importing the function is not counted
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of every call
    search_path: tuple[str, ...] = ()


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
            f"{target!r}: importing module {module_name!r} failed: {_traceback_tail(error)}"
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
    without `**kwargs` gets only what it names.

    Raises:
        ValueError: a name stands for two things, or the function needs one that nobody gives.
    """
    for name in (*columns, *options):
        if name in _GIVEN or (name in columns and name in options):
            raise ValueError(
                f"{name!r} is both a {'data column' if name in columns else 'reward option'} and "
                f"{'an argument every reward gets' if name in _GIVEN else 'a reward option'}; "
                "rename one of them"
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


def checked(criterion: str, values: Any, count: int) -> list[float]:
    """`values` as `count` finite floats; anything else is `RewardFailed`, never mended."""
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
    return [_checked_number(criterion, index, value) for index, value in enumerate(found)]


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


def _traceback_tail(error: BaseException) -> str:
    """The end of `error`'s traceback, without the frames of this file and of importlib."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen importlib")
    ]
    lines = traceback.format_exception_only(type(error), error)
    return "".join([*traceback.format_list(frames), *lines]).strip()[-TRACEBACK_CHARACTERS:]


# The channel: 8 bytes of length, then a pickle. The first message to the child is its criterion,
# the others are (source, completions, columns); the child answers each with an Answer.

Answer = list[float] | RewardFailed


def frame(message: Any) -> bytes:
    """`message` as it goes over the channel."""
    body = pickle.dumps(message)
    return _LENGTH.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Bytes of the body that follows a header of `HEADER_BYTES` bytes."""
    return int(_LENGTH.unpack(header)[0])


HEADER_BYTES = _LENGTH.size


def _receive(channel: BinaryIO) -> bytes | None:
    """The next message, or None when the actor is gone."""
    header = channel.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    body = channel.read(frame_length(header))
    return body if len(body) == frame_length(header) else None


def _send(channel: BinaryIO, answer: Answer) -> None:
    channel.write(frame(answer))
    channel.flush()


def _die_with(parent: int) -> None:
    """End this process when the actor ends, however the actor ends and whatever runs here.

    Where the kernel cannot (outside Linux), the closed channel ends it, between two calls.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Serve one criterion over socket `descriptor` until the actor, process `parent`, closes it."""
    _die_with(parent)
    os.set_inheritable(descriptor, False)
    channel = cast(BinaryIO, socket.socket(fileno=descriptor).makefile("rwb"))
    setup = _receive(channel)
    if setup is None:
        os._exit(1)
    # One loop for the life of the process: clients that async functions keep stay usable.
    with asyncio.Runner() as runner:
        criterion: RewardCriterion = pickle.loads(setup)
        function = _load(criterion)
        _send(channel, [] if callable(function) else function)
        while callable(function) and (request := _receive(channel)) is not None:
            _send(channel, _answer(runner, criterion, function, request))
    os._exit(0)  # threads the user's code left behind must not keep the process


def _load(criterion: RewardCriterion) -> Callable[..., Any] | RewardFailed:
    try:
        if isinstance(criterion.target, bytes):
            loaded: Callable[..., Any] = pickle.loads(criterion.target)
            return loaded
        return import_function(criterion.target)
    except FunctionNotFound as error:
        return RewardFailed(criterion.name, RewardFailure.IMPORT, str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - unpickling imports the user's modules
        return RewardFailed(criterion.name, RewardFailure.IMPORT, _traceback_tail(error))


def _answer(
    runner: asyncio.Runner, criterion: RewardCriterion, function: Callable[..., Any], request: bytes
) -> Answer:
    try:
        source, completions, columns = pickle.loads(request)
        values = function(**arguments(function, source, completions, columns, criterion.options))
        if inspect.isawaitable(values):
            values = runner.run(_awaited(values))
        return checked(criterion.name, values, len(completions))
    except RewardFailed as failure:
        return failure
    except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:  # noqa: BLE001 - the user's code may raise anything; all of it is the answer
        return RewardFailed(criterion.name, RewardFailure.RAISED, _traceback_tail(error))


async def _awaited(values: Any) -> Any:
    return await values
