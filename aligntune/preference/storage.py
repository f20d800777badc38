"""Where a preference job keeps its checkpoints and leaves its model: the run directory, or an
fsspec URI that the workers share. What is there is Ray Train's; `rewind` and `mend` alone change
it. Ray Train writes its list of checkpoints in place, so a crash may leave it empty or torn: a copy
of the last whole one lies beside it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from actors.storage import Store, filesystem_of
from aligntune.config.tree import dump, tree_of_a_run
from aligntune.errors import RunFailed, UserError
from aligntune.paths import located_storage
from aligntune.runs.deadline import answered
from aligntune.runs.disk import sync, sync_below, write_atomically
from aligntune.runs.rundir import changes

CONFIG = "config.yaml"  # of the run whose checkpoints these are
ROWS = "rows.digest"  # of the rows it goes over, as `RowTokens.digest` has it
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of the checkpoints that are whole
KEPT = "snapshot.last"  # a copy of that list as it was last whole
FOLDER = "checkpoints"


def step_of(name: str) -> int:
    """The step of a checkpoint folder, as its name says it."""
    return int(name.removeprefix("step-"))


class JobStorage:
    """The storage of one run; `uri` is `checkpoint.storage`, `rundir` the run directory."""

    def __init__(self, uri: str | None, rundir: Path) -> None:
        self._uri = located_storage(uri.rstrip("/")) if uri else None
        self._rundir = rundir.absolute()
        self._root = self._uri or str(self._rundir)
        self._checkpoints = Store(f"{self._root}/{FOLDER}")

    @property
    def export(self) -> str:
        """Where the workers leave the model: beside its place, or in the storage they share."""
        return f"{self._uri}/model" if self._uri else str(self._rundir / "model.partial")

    def ray_arguments(self) -> dict[str, Any]:
        """What Ray Train's RunConfig is told of it."""
        if self._uri is None:
            return {"storage_path": self._root, "name": FOLDER}
        filesystem, path = Store(self._root).place
        return {"storage_path": path, "storage_filesystem": filesystem, "name": FOLDER}

    def check(self, config: BaseModel, resume: str, fresh: bool) -> dict[str, tuple[Any, Any]]:
        """Whether the storage answers and is this run's; reads only. Returns what has changed since
        the run that is there, as `changes` does.

        `fresh` says that the run directory knows of no run: what is in the storage must then say
        that it is this run, which has lost its run directory.

        Raises:
            UserError: a scheme that is not known, no answer in time, another run's checkpoints, or
                any run's under resume=never.
        """
        if self._uri is None:
            return {}
        if self._uri.startswith("file://") and not self._uri.startswith("file:///"):
            raise UserError(
                f"checkpoint.storage {self._uri} cannot be used: the path of a file URI is "
                "absolute, as in file:///shared/run"
            )
        names = answered(self._uri, self.names)
        if not names:
            return {}
        if fresh and resume == "never":
            raise UserError(
                f"checkpoint.storage {self._uri} holds a run and resume=never; name another "
                "folder, or use --resume auto to go on with it"
            )
        known = self.config()
        if known is not None:
            return changes(known, config, f"checkpoint.storage {self._uri}")
        if fresh:
            raise UserError(
                f"checkpoint.storage {self._uri} holds checkpoints of a run that is not known "
                f"({', '.join(names)}), and this would go on with them; name a folder of this "
                "run's own"
            )
        return {}

    def check_left(self, reached: int) -> None:
        """Whether a run that had its checkpoints here may go on elsewhere, from step `reached`.

        Raises UserError where the checkpoints here are ahead, or cannot be read.
        """
        there = f"output_dir {self._rundir}" if self._uri is None else self._uri
        try:
            newest = self.newest_step()
        except UserError as error:
            raise UserError(
                f"checkpoint.storage has changed, and the place of before does not answer: {error}"
                "; to go on from a copy of its checkpoints, name a folder of them with --resume"
            ) from error
        if newest > reached:
            before = "remove checkpoint.storage" if self._uri is None else "set it to that"
            raise UserError(
                f"the checkpoints of this run are in {there}, up to step {newest}, and "
                f"checkpoint.storage names another place, where the newest is of step {reached}; "
                f"{before}, or copy {FOLDER}/ from there first"
            )

    def config(self) -> dict[str, Any] | None:
        """The config tree of the run whose checkpoints are in the storage; None without one.

        Raises UserError where nothing answers.
        """
        if self._uri is None:
            return None
        known = answered(self._uri, lambda: Store(self._root).read(CONFIG))
        where = f"{CONFIG} in checkpoint.storage {self._uri}"
        return None if known is None else tree_of_a_run(known, where)

    def describe(self, config: BaseModel, rows: str) -> None:
        """Leave the digest of the rows in the run directory, and beside the checkpoints with the
        config, for a run that has lost its run directory.

        Raises UserError where the storage does not take it in time.
        """
        write_atomically(self._rundir / ROWS, rows)
        if self._uri is None:
            return
        store, content = Store(self._root), dump(config).encode()

        def write() -> None:
            filesystem, folder = store.place
            filesystem.create_dir(folder, recursive=True)
            store.write(CONFIG, content)
            store.write(ROWS, rows.encode())

        answered(self._uri, write)

    def check_rows(self, rows: str, reached: int, fresh: bool) -> None:
        """Whether the rows are those of which the checkpoint of step `reached` has seen some.

        `rows` is their digest; `fresh` is as in `check`. A run of before there were digests goes
        on. Raises UserError.
        """
        known = None if fresh else Store(str(self._rundir)).read(ROWS)
        if self._uri is not None:
            known = answered(self._uri, lambda: Store(self._root).read(ROWS)) or known
        if known is not None and known.decode(errors="replace") != rows:
            raise UserError(
                "the training rows, their columns, order or rendering have changed since the "
                f"checkpoint of step {reached}, so the run cannot go on where it was; restore the "
                "data, or name another output_dir"
            )

    def newest_step(self) -> int:
        """The step of the newest checkpoint that is whole; 0 where there is none."""
        names = self.names() if self._uri is None else answered(self._uri, self.names)
        return step_of(names[-1]) if names else 0

    def names(self) -> list[str]:
        """The folders of the checkpoints that are whole, oldest first."""
        snapshot = self._read()
        results = snapshot["checkpoint_results"] if snapshot else []
        return [str(result["checkpoint_dir_name"]) for result in results]

    def named(self, resume: str) -> str:
        """The name of the checkpoint folder that `--resume` gives.

        Raises UserError where that is no whole checkpoint of this run.
        """
        _, folder = self._checkpoints.place
        try:
            _, given = filesystem_of(resume.rstrip("/"))
        except (ValueError, OSError, ImportError) as error:
            raise UserError(f"--resume: {resume} cannot be read: {error}") from error
        name, names = given.rpartition("/")[2], self.names()
        if name not in names or os.path.normpath(given) != f"{folder}/{name}":
            there = f"there are {', '.join(names)}" if names else "there is none yet"
            raise UserError(
                f"--resume: {resume} is not a complete checkpoint of this run; in "
                f"{self._root}/{FOLDER} {there}; use auto, never or one of these folders"
            )
        return name

    def before(self, name: str) -> str | None:
        """The folder of the checkpoint before `name`, as `--resume` takes it; None without one."""
        older = [known for known in self.names() if step_of(known) < step_of(name)]
        return f"{self._root}/{FOLDER}/{older[-1]}" if older else None

    def rewind(self, name: str) -> None:
        """Make the checkpoint `name` the newest: later ones are removed, for their steps come
        again."""
        snapshot = self._read()
        if snapshot is None:
            raise RunFailed(f"{self._root}/{FOLDER} has lost its list of checkpoints")
        names = self.names()
        kept = names.index(name) + 1
        for key in ("checkpoint_results", "checkpoint_report_indices"):
            snapshot[key] = snapshot[key][:kept]
        snapshot["latest_checkpoint_result"] = snapshot["checkpoint_results"][-1]
        self._checkpoints.write(SNAPSHOT, json.dumps(snapshot).encode())
        for later in names[kept:]:
            self._checkpoints.remove(later)

    def keep_list(self) -> None:
        """Copy Ray Train's list of the checkpoints, unless it is just being written. Raises
        OSError."""
        content = self._checkpoints.read(SNAPSHOT)
        if content is None or _parsed(content) is None:
            return
        if self._uri is None:
            write_atomically(self._rundir / FOLDER / KEPT, content)
        else:
            self._checkpoints.write(KEPT, content)

    def mend(self) -> str | None:
        """Put the copy in the place of a list that a crash has left empty or torn, for Ray Train
        reads no other; returns the damaged file then. Raises UserError as `names` does."""

        def put() -> str | None:
            content = self._checkpoints.read(SNAPSHOT)
            if content is None or _parsed(content) is not None:
                return None
            self._checkpoints.write(SNAPSHOT, json.dumps(self._read()).encode())
            return f"{self._root}/{FOLDER}/{SNAPSHOT}"

        return put() if self._uri is None else answered(self._uri, put)

    def _read(self) -> Any:
        """Ray Train's list, or where that is damaged its copy as far as the checkpoints are there.

        Raises UserError where neither can be read."""
        content = self._checkpoints.read(SNAPSHOT)
        if content is None:
            return None
        if (found := _parsed(content)) is not None:
            return found
        known = _parsed(self._checkpoints.read(KEPT) or b"")
        left = None if known is None else _as_far_as(known, self._checkpoints.names())
        if left is None:
            raise UserError(
                f"{self._root}/{FOLDER}/{SNAPSHOT}, which lists the run's checkpoints, is damaged; "
                f"restore it from a copy, or remove {self._root}/{FOLDER} to begin again"
            )
        return left

    def fetch(self, target: Path) -> None:
        """Put the model that a worker left in place, in one rename, and see it on disk. Raises
        RunFailed."""
        store = Store(self.export)
        if not store.has_folder():
            raise RunFailed(
                f"the workers left no model at {self.export}: on several nodes output_dir must be "
                "a folder that all of them see, or set checkpoint.storage"
            )
        staged = target.with_name(target.name + ".partial")
        if self._uri is not None:
            shutil.rmtree(staged, ignore_errors=True)
            store.get("", staged)
        sync_below(staged)
        old = target.with_name(f".{target.name}-{secrets.token_hex(4)}.old")
        if target.exists():  # one that somebody reads cannot always be removed, on NFS for example
            os.rename(target, old)
        os.rename(staged, target)
        sync(target.parent)
        for left in target.parent.glob(f".{target.name}-*.old"):
            shutil.rmtree(left, ignore_errors=True)


def _parsed(content: bytes) -> dict[str, Any] | None:
    """Ray Train's list of checkpoints; None where that is no whole one."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and isinstance(found.get("checkpoint_results"), list)
    return found if whole else None


def _as_far_as(known: dict[str, Any], there: Collection[str]) -> dict[str, Any] | None:
    """A list of checkpoints without those that are gone; None where all are."""
    pairs = zip(known["checkpoint_results"], known["checkpoint_report_indices"], strict=True)
    left = [(one, index) for one, index in pairs if one["checkpoint_dir_name"] in there]
    if not left:
        return None
    results, indices = map(list, zip(*left, strict=True))
    return {
        **known,
        "checkpoint_results": results,
        "checkpoint_report_indices": indices,
        "latest_checkpoint_result": results[-1],
    }
