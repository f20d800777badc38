"""What the start of a process and the fork server say to each other, over a Unix socket.

A request is one frame of JSON with file descriptors beside it. The answer is one line: READY and
the process id, which the asker answers by GO, or the reason why nothing was started. Standard
library only.
"""

from __future__ import annotations

import array
import json
import socket
from typing import Any

SOCKET = "ALIGNTUNE_FORKS"  # the variable that names the server's socket, or says "off"
READY, GO = b"ready", b"go\n"
_LENGTH = 4  # bytes before a frame: its length
_MOST_BYTES = 8 * 2**20
_MOST_FILES = 250  # of one message, by Linux


class Broken(OSError):
    """The other side closed, was too slow or said what is no request."""


def send(to: socket.socket, request: dict[str, Any], files: list[int]) -> None:
    """Send one request with open files; at most 250 of them."""
    if len(files) > _MOST_FILES:
        raise Broken(f"{len(files)} open files are more than a message takes")
    body = json.dumps(request).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    to.sendmsg([len(body).to_bytes(_LENGTH, "big")], ancillary)
    to.sendall(body)


def receive(of: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request and its files, which are closed on exec; None where there is none more.

    Raises Broken. The socket's timeout is the longest wait for each part.
    """
    head, ancillary, _, _ = of.recvmsg(_LENGTH, socket.CMSG_SPACE(_MOST_FILES * 4))
    files = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(data[: len(data) - len(data) % files.itemsize])
    if not head:
        return None
    while len(head) < _LENGTH:
        head += _some(of, _LENGTH - len(head))
    left = int.from_bytes(head, "big")
    if left > _MOST_BYTES:
        raise Broken(f"a request of {left} bytes")
    body = b""
    while len(body) < left:
        body += _some(of, left - len(body))
    return json.loads(body), list(files)


def line(of: socket.socket) -> bytes:
    """One line, with its end; less where the other side closes."""
    said = b""
    while not said.endswith(b"\n"):
        more = of.recv(4096)
        if not more:
            break
        said += more
    return said


def _some(of: socket.socket, most: int) -> bytes:
    data = of.recv(min(most, 2**16))
    if not data:
        raise Broken("the other side closed in the middle of a request")
    return data
