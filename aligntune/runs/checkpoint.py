"""Checkpoints: complete or absent, whatever is killed while one is written.

Invariant: a folder `step-NNNNNN` is whole. It is written under another name, forced to disk, and
renamed last; its manifest lists every file with its size, and one that does not match is passed
over.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "controller.json"
POLICY = "policy"
CRITIC = "critic"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the controller's state, and below `path` what the ranks wrote."""

    step: int
    path: Path
    state: dict[str, Any]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, never a part."""
    staging = path.with_name(path.name + ".partial")
    staging.write_text(text, encoding="utf-8")
    _sync(staging)
    os.replace(staging, path)
    _sync(path.parent)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


class Checkpoints:
    """The `checkpoints/` folder of a run; it is made when the first one is written."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last
        for leftover in directory.glob("*.partial"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def exists(self, step: int) -> bool:
        """Whether there is a complete checkpoint of this step."""
        return self._read(self._folder(step)) is not None

    def begin(self, step: int) -> Path:
        """A staging folder; policy ranks write into its `policy/`, critic ranks into `critic/`."""
        staging = self._folder(step).with_suffix(".partial")
        if staging.exists():
            shutil.rmtree(staging)
        (staging / POLICY).mkdir(parents=True)
        return staging

    def commit(self, step: int, state: dict[str, Any]) -> Checkpoint:
        """Make what `begin` staged the checkpoint of `step`, and forget the oldest ones.

        Later steps come again after this one, so whatever there is of them goes.
        """
        final = self._folder(step)
        staging = final.with_suffix(".partial")
        (staging / STATE).write_text(json.dumps(state), encoding="utf-8")
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        sizes = {str(p.relative_to(staging)): p.stat().st_size for p in files}
        (staging / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        for path in [*files, staging / MANIFEST, *(p for p in staging.rglob("*") if p.is_dir())]:
            _sync(path)
        _sync(staging)
        if final.exists():  # a damaged one of the same step; a whole one is never written twice
            shutil.rmtree(final)
        os.rename(staging, final)
        _sync(self.directory)
        write_atomically(self.directory / "latest", final.name + "\n")
        folders = self._folders()
        own = folders.index(final) + 1
        for other in (*folders[: max(0, own - self.keep_last)], *folders[own:]):
            shutil.rmtree(other)
        return Checkpoint(step, final, state)

    def adopt(self, checkpoint: Checkpoint) -> Checkpoint:
        """Make a checkpoint that the user chose the newest one: those of later steps go, for these
        steps come again. One that lies elsewhere is copied in and takes the place of all."""
        final = self._folder(checkpoint.step)
        stays = checkpoint.path.resolve() == final.resolve()
        if not stays:
            staging = final.with_suffix(".partial")
            shutil.copytree(checkpoint.path, staging)
            if final.exists():
                shutil.rmtree(final)
            os.rename(staging, final)
        for other in self._folders():
            if other != final and (_step_of(other) > checkpoint.step or not stays):
                shutil.rmtree(other)
        write_atomically(self.directory / "latest", final.name + "\n")
        return Checkpoint(checkpoint.step, final, checkpoint.state)

    def _folders(self) -> list[Path]:
        """By step, whole or not."""
        found = (p for p in self.directory.glob("step-*") if p.suffix != ".partial")
        return sorted(found, key=_step_of)

    def damaged(self) -> list[str]:
        """The names of the folders that `latest` passes over, newest first."""
        names = []
        for folder in reversed(self._folders()):
            if self._read(folder):
                break
            names.append(folder.name)
        return names

    def _read(self, folder: Path) -> Checkpoint | None:
        manifest = folder / MANIFEST
        if not manifest.is_file():
            return None
        for name, size in json.loads(manifest.read_text(encoding="utf-8")).items():
            part = folder / name
            if not part.is_file() or part.stat().st_size != size:
                return None
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return Checkpoint(state["step"], folder, state)

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None. Damaged ones are passed over."""
        for folder in reversed(self._folders()):
            if checkpoint := self._read(folder):
                return checkpoint
        return None

    def at(self, path: Path) -> Checkpoint:
        """The checkpoint in a folder the user names. Raises ValueError if it is not whole."""
        checkpoint = self._read(path)
        if checkpoint is None:
            raise ValueError(f"{path} is not a complete checkpoint")
        return checkpoint
