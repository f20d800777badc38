"""Models by URI, brought to a node once: `s3://bucket/model` becomes a folder its processes share.

Invariant: a staged folder is whole, for it gets its name last. One process of a node fetches it
while the others wait, as long as that one lives and no longer than a deadline. A model that changes
at its URI is another folder: sizes and times of its files are part of the name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from actors.locks import NoLocks, locked
from actors.specs import ModelSpec
from actors.storage import Store

FETCH_SECONDS = 3600.0
POLL_SECONDS = 0.2


class StagingFailed(OSError):
    """A model could not be brought to this node; the message says why and what to do."""


def is_uri(name: str) -> bool:
    """Whether a model's name is a URI, not a folder or a hub name."""
    return "://" in name


def on_this_node(spec: ModelSpec) -> ModelSpec:
    """`spec` with a URI replaced by the folder it is staged in; others as they are.

    Raises:
        StagingFailed: nothing there, no access, or not here within `FETCH_SECONDS`.
    """
    if not is_uri(spec.name):
        return spec
    return spec.model_copy(update={"name": str(staged(spec.name)), "revision": None})


def cache_folder() -> Path:
    """Where staged models lie: ALIGNTUNE_CACHE, else ~/.cache/aligntune."""
    return Path(os.environ.get("ALIGNTUNE_CACHE") or "~/.cache/aligntune").expanduser() / "models"


@cache
def staged(uri: str) -> Path:
    """The folder of this node that holds what is at `uri`, fetched by the first who asks.

    Raises:
        StagingFailed: see `on_this_node`.
    """
    try:
        target = cache_folder() / _key(uri)
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():
                _fetch(uri, target)
        return target
    except StagingFailed:
        raise
    except NoLocks as error:
        raise StagingFailed(
            f"model {uri} cannot be brought to this node: {error}, or name a folder elsewhere with "
            "ALIGNTUNE_CACHE"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise StagingFailed(
            f"model {uri} cannot be brought to this node: {reason}; see that the address is right, "
            "its client is installed, and this node may read it"
        ) from error


def _key(uri: str) -> str:
    """The name of the staged folder: the URI and the state of what is there."""
    from pyarrow.fs import FileSelector

    filesystem, path = Store(uri).place
    files = filesystem.get_file_info(FileSelector(path, recursive=True))
    state = sorted((file.path, file.size, file.mtime_ns) for file in files if file.is_file)
    if not state:
        raise StagingFailed(f"model {uri} has no files; name the folder of a saved model")
    digest = hashlib.sha256(repr((uri, state)).encode()).hexdigest()[:16]
    return f"{path.rpartition('/')[2]}-{digest}"


def _fetch(uri: str, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that died amid this
    Store(uri).get("", partial)
    os.rename(partial, target)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """A lock among the processes of this node that ends with its holder."""
    end = time.monotonic() + FETCH_SECONDS
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not locked(lock, path):
            if time.monotonic() > end:
                raise StagingFailed(
                    f"another process holds {path} and has not fetched the model in "
                    f"{FETCH_SECONDS:g} s"
                )
            time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(lock)
