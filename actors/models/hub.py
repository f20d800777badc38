"""Whether the hub answers, asked once by a process: without a network nothing is retried for long.

Each file of the hub would be tried six times, over most of a minute; what is cached needs no hub.
"""

from __future__ import annotations

import functools
import os

ANSWER_S = 10.0  # longest wait for the hub to take a connection


@functools.cache
def why_silent() -> str | None:
    """Why the hub does not answer, and from then on this process asks for cached files alone; None
    where it does, or where the user has said that there is none (HF_HUB_OFFLINE)."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
    except httpx.TransportError as error:
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {error})"
    return None


def switched_off() -> bool:
    """Whether the user has said that there is no hub (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE and not _was_silent()


def ask_again() -> None:
    """Let this process ask the hub again, which was silent once: days may have gone by."""
    from huggingface_hub import constants

    if _was_silent():
        constants.HF_HUB_OFFLINE = False
    why_silent.cache_clear()


def _was_silent() -> bool:
    return why_silent.cache_info().currsize > 0 and why_silent() is not None


def ask_once(name: str) -> None:
    """Before a model or data set is read that may be the hub's; a folder is not."""
    if not os.path.exists(name):
        why_silent()
