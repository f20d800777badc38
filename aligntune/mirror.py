"""A copy of an online run on object storage, or on a folder that outlives the node: brought up to
date with every checkpoint, and fetched where the run directory is empty or behind.

Invariant: what `latest` names there is whole. A checkpoint is copied first and named last, and one
that is named is removed only after another is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from actors.storage import filesystem_of
from aligntune.checkpoint import Checkpoints
from aligntune.errors import UserError
from aligntune.preference_storage import answered

CHECKPOINTS = "checkpoints"
LATEST = "latest"
CONFIG = "config.yaml"
FILES = (CONFIG, "ledger.jsonl", "metrics.jsonl", "samples.jsonl", "events.jsonl")


class Mirror:
    """The storage of one run; `uri` is `checkpoint.storage`."""

    def __init__(self, uri: str, rundir: Path, keep_last: int) -> None:
        self.uri = uri.rstrip("/")
        self._rundir = rundir
        self._keep_last = keep_last

    @property
    def _storage(self) -> tuple[Any, str]:
        return filesystem_of(self.uri)

    def _latest(self) -> int | None:
        name = self._read(f"{CHECKPOINTS}/{LATEST}")
        return int(name.decode().strip().removeprefix("step-")) if name else None

    def is_ahead_of(self, checkpoints: Checkpoints, resume: str) -> bool:
        """Whether the run there has gone further than the one here.

        Raises UserError where nothing answers, or a run is there and `resume` is never.
        """
        there, here = answered(self.uri, self._latest), checkpoints.latest()
        if there is not None and resume == "never":
            raise UserError(
                f"checkpoint.storage {self.uri} holds a run and resume=never; name another "
                "folder, or use --resume auto to go on with it"
            )
        return there is not None and (here is None or there > here.step)

    def config(self) -> dict[str, Any]:
        """The config tree of the run that is there."""
        tree: dict[str, Any] = yaml.safe_load(self._read(CONFIG) or b"{}")
        return tree

    def fetch(self) -> None:
        """Make the run directory what the storage holds: its newest checkpoint, and the logs."""
        from pyarrow.fs import copy_files

        filesystem, root = self._storage
        step = self._latest()
        assert step is not None, "there is something to fetch"
        folder = self._rundir / CHECKPOINTS / f"step-{step:06d}"
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_files(
            f"{root}/{CHECKPOINTS}/{folder.name}", str(partial), source_filesystem=filesystem
        )
        for name in FILES:
            found = self._read(name)
            if found is not None:
                (self._rundir / name).write_bytes(found)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)

    def push(self, checkpoint: Path) -> None:
        """Copy a checkpoint and the logs, name it the newest, and forget the oldest.

        Raises OSError where the storage does not take it; what it had before is still named.
        """
        from pyarrow.fs import FileSelector, copy_files

        filesystem, root = self._storage
        target = f"{root}/{CHECKPOINTS}/{checkpoint.name}"
        filesystem.create_dir(target, recursive=True)
        filesystem.delete_dir_contents(target)
        copy_files(str(checkpoint), target, destination_filesystem=filesystem)
        for name in FILES:
            path = self._rundir / name
            if path.is_file():
                self._write(name, path.read_bytes())
        self._write(f"{CHECKPOINTS}/{LATEST}", checkpoint.name.encode())
        listed = filesystem.get_file_info(FileSelector(f"{root}/{CHECKPOINTS}"))
        steps = sorted(
            item.base_name
            for item in listed
            if item.base_name.startswith("step-") and item.base_name != checkpoint.name
        )
        for old in steps[: len(steps) + 1 - self._keep_last]:
            filesystem.delete_dir(f"{root}/{CHECKPOINTS}/{old}")

    def push_model(self, folder: Path) -> None:
        """Copy the final export and the logs."""
        from actors.storage import upload

        upload(folder, f"{self.uri}/model")
        for name in FILES:
            path = self._rundir / name
            if path.is_file():
                self._write(name, path.read_bytes())

    def _read(self, name: str) -> bytes | None:
        from pyarrow.fs import FileType

        filesystem, root = self._storage
        if filesystem.get_file_info(f"{root}/{name}").type != FileType.File:
            return None
        with filesystem.open_input_stream(f"{root}/{name}") as file:
            content: bytes = file.read()
            return content

    def _write(self, name: str, content: bytes) -> None:
        filesystem, root = self._storage
        with filesystem.open_output_stream(f"{root}/{name}") as file:
            file.write(content)
