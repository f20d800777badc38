"""A Ray that is started here, for one run: what it needs of this machine, and whom it lets in.

Invariant: it listens on loopback, its token is for its owner alone, and it packs and uploads
nothing, for its workers run where the driver does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

MOST_BYTES = 103 if sys.platform == "darwin" else 107  # of the path of a Unix socket
# What Ray puts below its folder for temporary files; the process id may have 7 digits.
SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


def socket_trouble() -> str | None:
    """Why Ray could make no socket in its folder for temporary files, with the cure; or None."""
    from ray._common.utils import get_default_ray_temp_dir

    folder = get_default_ray_temp_dir()
    room = MOST_BYTES - len(os.fsencode(os.path.join(os.sep, SOCKET)))
    length = len(os.fsencode(folder))
    if length <= room:
        return None
    return (
        f"Ray's folder for temporary files, {folder}, has a name of {length} bytes; a socket in it "
        f"has room for {room}: set TMPDIR to a shorter folder, as in TMPDIR=/tmp, or RAY_TMPDIR "
        "for Ray alone"
    )


def keep_token_private() -> None:
    """Have the token of the Rays that start here in a file that its owner alone can read.

    Ray would make it with the rights that the umask leaves; it stands in for a password.
    """
    from ray._private.authentication import authentication_token_setup as of_ray

    path = of_ray._get_default_token_path()
    if path.is_file():
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
        return
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another process has made it meanwhile
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as token:
            token.write(of_ray.generate_new_authentication_token())


@contextmanager
def alone() -> Iterator[None]:
    """Ray starts on loopback, as it does on a Mac, and packs no working directory.

    Under `uv run` it would send the current folder to its workers, which are in it already.
    """
    from ray._private import ray_constants

    with (
        _as(ray_constants, "ENABLE_RAY_CLUSTER", False),
        _as(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False),
    ):
        yield


@contextmanager
def unread_logs() -> Iterator[None]:
    """Ray starts no process that reads its workers' logs ten times a second, for whoever is shown
    them."""
    from ray._private.node import Node

    with _as(Node, "start_log_monitor", lambda node: None):
        yield


@contextmanager
def _as(where: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)
