"""The channel between an actor and its child process: messages there, lines of JSON back.

Invariant: an answer is parsed, never unpickled, and names its call by a word that nobody can guess:
bytes that anything else writes to the channel are no answer. Requests are pickled, as the child
trusts its actor. Standard library only: a child imports this.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

ANSWER_BYTES = 4 * 2**20  # of one answer, where nothing else is said
DETAIL_CHARACTERS = 4000  # of what a failure is told with
_LENGTH = struct.Struct("!Q")


class Garbled(ValueError):
    """What came over the channel is no answer to a call that waits."""


def request(message: Any) -> bytes:
    """`message` as it goes to a child: 8 bytes of length, then a pickle."""
    body = pickle.dumps(message)
    return _LENGTH.pack(len(body)) + body


HEADER_BYTES = _LENGTH.size


def request_length(header: bytes) -> int:
    """Bytes of the pickle that follows a header of `HEADER_BYTES` bytes."""
    return int(_LENGTH.unpack(header)[0])


def opened(channel: int) -> tuple[socket.socket, BinaryIO]:
    """The socket that the actor has left this child as descriptor `channel`, and its stream to
    read. Nothing that the user's code starts or forks holds it open, or can answer over it by
    chance."""
    os.set_inheritable(channel, False)
    connection = socket.socket(fileno=channel)
    os.register_at_fork(after_in_child=lambda: _close(channel))
    return connection, cast(BinaryIO, connection.makefile("rb", buffering=0x10000))


def _close(channel: int) -> None:
    with contextlib.suppress(OSError):
        os.close(channel)


def receive(channel: BinaryIO) -> Any | None:
    """The next message to this child, or None when the actor has closed the channel."""
    header = channel.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    body = channel.read(request_length(header))
    return pickle.loads(body) if len(body) == request_length(header) else None


def line(message: Mapping[str, Any]) -> bytes:
    """An answer as it goes to the actor."""
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\n"


def parsed(answer: bytes) -> dict[str, Any]:
    """The object that a line holds. Raises Garbled where it holds none."""
    try:
        message = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"it is not JSON: {answer[:80]!r}") from error
    if not isinstance(message, dict):
        raise Garbled(f"it is not an answer: {answer[:80]!r}")
    return message


def clean(text: str) -> str:
    """`text` without halves of characters, which no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")
