"""Storage of the user's that must answer in time: clients of object stores retry for minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from aligntune.errors import UserError

ANSWER_SECONDS = 10.0

T = TypeVar("T")


def answered(uri: str, ask: Callable[[], T], seconds: float | None = None) -> T:
    """What `ask()` gives within `seconds`, by default `ANSWER_SECONDS`.

    Raises UserError.
    """
    limit = ANSWER_SECONDS if seconds is None else seconds
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001  # of whatever client the URI is for; told below
            errors.append(error)

    thread = threading.Thread(target=run, name="storage", daemon=True)
    thread.start()
    thread.join(limit)
    if answers:
        return answers[0]
    if thread.is_alive():
        _end_without_it()
    reason = (
        " ".join(str(errors[0]).split()) or type(errors[0]).__name__
        if errors
        else f"no answer within {limit:g} s"
    )
    raise UserError(
        f"checkpoint.storage {uri} cannot be used: {reason}; give a folder that every node sees, "
        "or a URI whose client is installed and that answers"
    )


def _end_without_it() -> None:
    """Let the process end while a client of S3 still tries: at exit pyarrow waits for it."""
    import atexit

    from pyarrow import fs

    if (finish := getattr(fs, "ensure_s3_finalized", None)) is not None:
        atexit.unregister(finish)
