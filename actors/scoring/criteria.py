"""What a criterion is, and why it may have no scores for a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class RewardFailure(StrEnum):
    """Why a criterion has no scores for a group."""

    IMPORT = "import"  # the function could not be imported where it runs
    RAISED = "raised"
    UNREACHED = "unreached"  # what it asks is away, which says nothing of the group
    TIMEOUT = "timeout"
    DIED = "died"  # its process ended: os._exit, a signal, out of memory
    GARBLED = "garbled"  # what came over its process's channel is no answer to a call
    WRONG_COUNT = "wrong_count"
    NOT_A_NUMBER = "not_a_number"
    NOT_FINITE = "not_finite"
    TOO_LONG = "too_long"  # for a reward model, which never scores a part of a text


class Unreached(RuntimeError):
    """A function raises it where a service that it asks is away: the failure is `UNREACHED`."""


class RewardFailed(RuntimeError):
    """A criterion gave no scores for a group; `detail` ends with the user's traceback if any."""

    def __init__(self, criterion: str, reason: RewardFailure, detail: str) -> None:
        super().__init__(f"reward {criterion!r} failed ({reason}): {detail}")
        self.criterion = criterion
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, RewardFailure, str]]:
        return type(self), (self.criterion, self.reason, self.detail)


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
    workers: int | None = None  # calls at once, each in a child process unless it is async
    hidden: tuple[str, ...] = ()  # data columns it never gets: they are named as its own options
    thoughts: bool = False  # a completion has the `<think>` that its prompt ends with


@dataclass(frozen=True)
class EpisodeCriterion:
    """What is said of an episode where it is played: by its environment or agent itself, or by a
    function that wants the living environment. No reward actor runs it."""

    name: str  # in metrics
    key: str  # of `Episode.rewards`
