"""Checkpoints: complete or absent, whatever is killed while one is written.

Invariant: a folder `step-NNNNNN` is whole. It is written under another name, forced to disk, and
renamed last; its manifest lists every file with its size and checksum, and a folder that does not
match is passed over. Folders with other names are somebody else's and are left alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aligntune.runs.deadline import asked
from aligntune.runs.disk import make_folder, sync, sync_below
from aligntune.runs.disk import write_atomically as write_atomically

MANIFEST = "manifest.json"
STATE = "controller.json"
POLICY = "policy"
CRITIC = "critic"
RUN = "config"
"""What `STATE` calls the config tree of the run that wrote it."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the controller's state, and below `path` what the ranks wrote."""

    step: int
    path: Path
    state: dict[str, Any]


NAME = re.compile(r"step-(\d{6,})", re.ASCII)
CHUNK = 2**22  # bytes read at a time for a checksum
READERS = 16  # files read side by side: one stream of a network's file system takes minutes a TB


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _ours(folder: Path) -> bool:
    """Whether the name is one that `Checkpoints` gives; `step-000050.bak` is not."""
    match = NAME.fullmatch(folder.name)
    return match is not None and folder.name == f"step-{int(match[1]):06d}" and folder.is_dir()


def _unheard(read: int) -> None: ...


Stand = tuple[tuple[str, int, int], ...]
"""Files as they stand: path, bytes and nanoseconds of the last change of each."""


def _stand(folder: Path) -> Stand | None:
    """The files of a folder; None where the disk does not tell."""
    try:
        files = [(str(p), p.stat()) for p in sorted(folder.rglob("*")) if p.is_file()]
    except OSError:
        return None
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def checksum(path: Path, heard: Callable[[int], None]) -> int:
    """CRC-32 of a file, which finds every flipped bit; for damage, not for attackers. `heard` gets
    the bytes that were read, again and again."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            value = zlib.crc32(block, value)
            heard(len(block))
    return value


def intact(folder: Path, heard: Callable[[int], None] = _unheard) -> bool:
    """Whether every file of a checkpoint has the content that its manifest says; reads them all,
    as `checksum` does, some side by side. One that the disk does not give back is damaged too."""
    try:
        manifest = _manifest(folder)
    except OSError:
        return False
    if manifest is None:
        return False
    left = iter(manifest.items())
    damaged = threading.Event()

    def read() -> None:
        try:
            for name, entry in left:
                if damaged.is_set() or checksum(folder / name, heard) != entry["crc32"]:
                    break
            else:
                return
        except OSError:
            pass
        damaged.set()

    for reader in [asked(read) for _ in range(min(READERS, len(manifest)))]:
        reader.result()
    return not damaged.is_set()


def _manifest(folder: Path) -> dict[str, dict[str, int]] | None:
    """{file: {size, crc32}} where the manifest can be read and every file is there in its size."""
    files = _json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or STATE not in files:
        return None
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"size", "crc32"} <= entry.keys():
            return None
        part = folder / name
        if not part.is_file() or part.stat().st_size != entry["size"]:
            return None
    return files


def state_of(folder: Path) -> dict[str, Any]:
    """What the controller kept in a checkpoint; nothing where that cannot be read."""
    return _json(folder / STATE)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
        return {}
    return content if isinstance(content, dict) else {}


def _remove(folder: Path) -> None:
    """Let a folder be no checkpoint any more, and remove what can be removed of it. Raises OSError
    where it stays one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class Checkpoints:
    """The `checkpoints/` folder of a run; it is made when the first one is written."""

    def __init__(self, directory: Path, keep_last: int, *, to_read: bool = False) -> None:
        """`to_read` leaves alone what another process may be writing there."""
        self.directory = directory
        self.keep_last = keep_last
        self.bytes_read = 0  # by whatever reads files as a whole; for who watches that it moves
        self._reading = threading.Lock()
        self._checked: dict[Stand, bool] = {}
        self._committed: dict[str, Stand | None] = {}  # by this process, by their folders' names
        for leftover in () if to_read else directory.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()

    def _heard(self, read: int) -> None:
        with self._reading:
            self.bytes_read += read

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def exists(self, step: int) -> bool:
        """Whether there is a complete checkpoint of this step, down to the last bit. One that this
        process has made is read for it only where its files are others now; what a read has found
        damaged is not there."""
        folder = self._folder(step)
        if self._read(folder) is None:
            return False
        made = self._committed.get(folder.name)
        if made is not None and made == _stand(folder):
            return self._checked.get(made, True)
        return self._intact(folder)

    def begin(self, step: int) -> Path:
        """A staging folder; policy ranks write into its `policy/`, critic ranks into `critic/`."""
        staging = self._folder(step).with_suffix(".partial")
        if staging.exists():
            shutil.rmtree(staging)
        make_folder(self.directory)
        (staging / POLICY).mkdir(parents=True)
        return staging

    def commit(
        self,
        step: int,
        state: dict[str, Any],
        needed: Collection[str] = (),
        still: Callable[[], bool] = lambda: True,
        known: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> Checkpoint:
        """Make what `begin` staged the checkpoint of `step`, and forget the oldest ones, but for
        those of the names `needed`. `known` has bytes and CRC-32 of files, by their names below the
        folder, which need not be read then; those that are not there in this size are an OSError.

        Later steps come again after this one, so whatever there is of them goes. `still` is asked
        last of all: where it says no, what was staged is removed. Raises OSError then.
        """
        final = self._folder(step)
        staging = final.with_suffix(".partial")
        (staging / STATE).write_text(json.dumps(state), encoding="utf-8")
        found = {str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file()}
        listed = {name: self._listed(staging / name, known.get(name)) for name in sorted(found)}
        if lost := known.keys() - found:
            raise OSError(f"{staging / min(lost)} was written and is not there")
        (staging / MANIFEST).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")
        sync_below(staging)
        if not still():
            self.abandon(step)
            raise OSError("too late")
        if final.exists():  # a damaged one of the same step; a whole one is never written twice
            shutil.rmtree(final)
        os.rename(staging, final)
        sync(self.directory)
        write_atomically(self.directory / "latest", final.name + "\n")
        for later in self._folders():
            if _step_of(later) > step:
                _remove(later)
        self.forget_old({*needed, final.name})
        names = {folder.name for folder in self._folders()}
        self._committed = {n: each for n, each in self._committed.items() if n in names}
        self._committed[final.name] = _stand(final)
        return Checkpoint(step, final, state)

    def _listed(self, path: Path, known: tuple[int, int] | None) -> dict[str, int]:
        """What the manifest says of a file; it is read where nobody knows it."""
        size = path.stat().st_size
        if known is None:
            return {"size": size, "crc32": checksum(path, self._heard)}
        if size != known[0]:
            raise OSError(f"{path} has {size} bytes of the {known[0]} that were written")
        return {"size": size, "crc32": known[1]}

    def abandon(self, step: int) -> None:
        """Remove what `begin` staged, so that its room is free again; whatever can be removed."""
        shutil.rmtree(self._folder(step).with_suffix(".partial"), ignore_errors=True)

    def is_from_elsewhere(self, checkpoint: Checkpoint) -> bool:
        """Whether it lies in another folder than this one's."""
        return checkpoint.path.resolve().parent != self.directory.resolve()

    def forget_old(self, needed: Collection[str]) -> None:
        """Remove all but the newest ones, and those of the names `needed`; whatever can be removed.

        What is left of one, as on NFS where something reads it, goes at the next call.
        """
        folders = self._folders()
        kept = [folder for folder in folders if (folder / MANIFEST).exists()][-self.keep_last :]
        for old in folders:
            if old not in kept and old.name not in needed:
                shutil.rmtree(old, ignore_errors=True)

    def adopt(self, checkpoint: Checkpoint) -> Checkpoint:
        """Make a checkpoint that the user chose the newest one: those of later steps go, for these
        steps come again. One that lies elsewhere is copied in and takes the place of all."""
        final = self._folder(checkpoint.step)
        stays = checkpoint.path.resolve() == final.resolve()
        if not stays:
            staging = final.with_suffix(".partial")
            make_folder(self.directory)
            shutil.copytree(checkpoint.path, staging)
            sync_below(staging)
            if final.exists():
                shutil.rmtree(final)
            os.rename(staging, final)
            sync(self.directory)
        for other in self._folders():
            if other != final and (_step_of(other) > checkpoint.step or not stays):
                _remove(other)
        write_atomically(self.directory / "latest", final.name + "\n")
        return Checkpoint(checkpoint.step, final, checkpoint.state)

    def _folders(self) -> list[Path]:
        """By step, whole or not; what has another name is not ours."""
        return sorted(filter(_ours, self.directory.glob("step-*")), key=_step_of)

    def folders(self) -> list[int]:
        """The steps that have a folder, whole or not, ascending."""
        return [_step_of(folder) for folder in self._folders()]

    def steps(self) -> list[int]:
        """The steps of which there is a whole checkpoint, ascending."""
        return [_step_of(f) for f in self._folders() if self._read(f) and self._intact(f)]

    def of(self, step: int) -> Checkpoint | None:
        """The whole checkpoint of a step."""
        return self._read(self._folder(step)) if self.exists(step) else None

    def damaged(self) -> list[str]:
        """The names of the folders that `latest` passes over, newest first."""
        names = []
        for folder in reversed(self._folders()):
            if self._read(folder) and self._intact(folder):
                break
            names.append(folder.name)
        return names

    @staticmethod
    def _read(folder: Path) -> Checkpoint | None:
        """The checkpoint in a folder where all its files are there in their sizes."""
        try:
            if _manifest(folder) is None:
                return None
        except OSError:  # the disk does not give it back
            return None
        state = state_of(folder)
        step = state.get("step")
        return Checkpoint(step, folder, state) if isinstance(step, int) else None

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None. Damaged ones, by checksum too, are passed over;
        `damaged` names them."""
        for folder in reversed(self._folders()):
            checkpoint = self._read(folder)
            if checkpoint and self._intact(folder):
                return checkpoint
        return None

    def _intact(self, folder: Path) -> bool:
        """`intact`, read once as long as no file changes."""
        key = _stand(folder)
        if key is None:
            return False
        if key not in self._checked:
            self._checked[key] = intact(folder, self._heard)
        return self._checked[key]

    def at(self, path: Path) -> Checkpoint:
        """The checkpoint in a folder the user names. Raises ValueError if it is not whole."""
        checkpoint = self._read(path)
        if checkpoint is None:
            raise ValueError(f"{path} is not a complete checkpoint")
        if not intact(path):
            raise ValueError(f"{path} is damaged: a file has not the content it was written with")
        return checkpoint
