"""Storage and services of the user's that must answer in time: clients of object stores retry for
minutes, and a file system of the network may hang for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from aligntune.errors import UserError

ANSWER_SECONDS = 8.0
THREAD = "aligntune-beside"  # the name of every thread that may be left behind at a process's end

T = TypeVar("T")


def asked(ask: Callable[[], T]) -> Future[T]:
    """`ask()` in a thread that no process waits for at its end."""
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - for whoever waits
            answer.set_exception(error)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    return answer


def answered(uri: str, ask: Callable[[], T], seconds: float | None = None) -> T:
    """What `ask()` gives within `seconds`, by default `ANSWER_SECONDS`.

    Raises UserError; one that `ask` raises comes as it is.
    """
    limit = ANSWER_SECONDS if seconds is None else seconds
    answer = asked(ask)
    try:
        return answer.result(limit)
    except UserError:
        raise
    except Exception as error:
        reason = (
            " ".join(str(error).split()) or type(error).__name__
            if answer.done()
            else f"no answer within {limit:g} s"
        )
        raise UserError(
            f"checkpoint.storage {uri} cannot be used: {reason}; give a folder that every node "
            "sees, or a URI whose client is installed and that answers"
        ) from error


def hangs() -> bool:
    """Whether something still has not answered, though nobody waits any more."""
    return any(thread.name == THREAD for thread in threading.enumerate())
