"""Starts and ends the fork server of a Ray that runs on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.forks import wire

SERVER = Path(__file__).with_name("server.py")
# Its name is not that of Ray's own, setup_worker.py, which a raylet leaves out where it can.
SCRIPT = Path(__file__).with_name("start_worker.py")
# So they do, and read then which raylet they belong to.
IMPORT_RAY = {"ray", "actors", "aligntune", "vllm.v1.engine.core", "vllm.v1.engine.async_llm"}
END_S = 5.0


def with_ray(module: str) -> bool:
    """Whether a module imports Ray, or may."""
    return module.partition(".")[0] in IMPORT_RAY or module in IMPORT_RAY


@contextmanager
def workers() -> Iterator[None]:
    """A Ray that starts in here has its workers forked, where there is a fork server."""
    if os.environ.get(wire.SOCKET, "off") == "off":
        yield
        return
    from ray._private import ray_constants

    # A worker may have to wait until the server has imported.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "180")
    before = ray_constants.SETUP_WORKER_FILENAME
    # Joined to a folder of Ray's, as an absolute path it stays what it is.
    ray_constants.SETUP_WORKER_FILENAME = str(SCRIPT)
    try:
        yield
    finally:
        ray_constants.SETUP_WORKER_FILENAME = before


@contextmanager
def server(modules: Sequence[str]) -> Iterator[None]:
    """While this lasts, workers of a Ray that is started here are forked from one process, which
    imports `modules` once: those that import Ray, once for each raylet.

    It ends with this process, whatever ends that. Where ALIGNTUNE_FORKS names a server already, or
    says off, none is started.
    """
    if sys.platform != "linux" or os.environ.get(wire.SOCKET) or not modules:
        yield
        return
    late = [name for name in modules if with_ray(name)]
    early = [name for name in modules if not with_ray(name)]
    folder = tempfile.mkdtemp(prefix="aligntune-forks-")
    path = os.path.join(folder, "socket")
    with open(os.path.join(folder, "log"), "wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                str(SERVER),
                path,
                ",".join(early),
                ",".join(late),
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    os.environ[wire.SOCKET] = path
    try:
        yield
    finally:
        os.environ.pop(wire.SOCKET, None)
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
