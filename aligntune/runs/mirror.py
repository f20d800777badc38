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

from actors.storage import Store
from aligntune.config.tree import tree_of_a_run
from aligntune.errors import UserError
from aligntune.runs.checkpoint import NAME, Checkpoints, intact
from aligntune.runs.deadline import answered
from aligntune.runs.segments import LogCopy, read_log

CHECKPOINTS = "checkpoints"
LATEST = "latest"
CONFIG = "config.yaml"
LOGS = tuple(
    f"{name}.jsonl" for name in ("ledger", "metrics", "evals", "samples", "eval_samples", "events")
)


class Mirror:
    """The storage of one run; `uri` is `checkpoint.storage`."""

    def __init__(self, uri: str, rundir: Path, keep_last: int, copy_seconds: float) -> None:
        """`copy_seconds`: the longest that fetching a checkpoint may take."""
        self._store = Store(uri)
        self._rundir = rundir
        self._keep_last = keep_last
        self._copy_seconds = copy_seconds
        self._logs = [LogCopy(self._store, rundir / name) for name in LOGS]

    @property
    def uri(self) -> str:
        """As the user gave it."""
        return self._store.uri

    def _latest(self) -> int | None:
        name = self._store.read(f"{CHECKPOINTS}/{LATEST}")
        match = NAME.fullmatch(name.decode(errors="replace").strip()) if name else None
        if name and not match:
            raise OSError(f"{CHECKPOINTS}/{LATEST} names no checkpoint, but {name[:40]!r}")
        return int(match[1]) if match else None

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
        """The config tree of the run that is there. Raises UserError where nothing answers."""
        content = answered(self.uri, lambda: self._store.read(CONFIG))
        return tree_of_a_run(content or b"{}", f"{CONFIG} in checkpoint.storage {self.uri}")

    def fetch(self) -> None:
        """Make the run directory what the storage holds: its newest checkpoint, and the logs.

        Raises UserError where that fails or takes too long; the next start fetches again.
        """
        answered(self.uri, self._fetch, self._copy_seconds)

    def _fetch(self) -> None:
        step = self._latest()
        assert step is not None, "there is something to fetch"
        folder = self._rundir / CHECKPOINTS / f"step-{step:06d}"
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._store.get(f"{CHECKPOINTS}/{folder.name}", partial)
        if not intact(partial):
            shutil.rmtree(partial)
            raise OSError(
                f"{CHECKPOINTS}/{folder.name} there is damaged: a file is missing or has not the "
                "content it was written with; restore it, or name an older one in "
                f"{CHECKPOINTS}/{LATEST}"
            )
        contents = {name: read_log(self._store, name) for name in LOGS}
        for name, content in {CONFIG: self._store.read(CONFIG), **contents}.items():
            if content is not None:
                (self._rundir / name).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)

    def push(self, checkpoint: Path) -> None:
        """Copy a checkpoint and the logs, name it the newest, and forget the oldest.

        Raises OSError where the storage does not take it; what it had before is still named.
        """
        self._store.put(checkpoint, f"{CHECKPOINTS}/{checkpoint.name}")
        self._push_logs()
        self._store.write(f"{CHECKPOINTS}/{LATEST}", checkpoint.name.encode())
        steps = [name for name in self._store.names(CHECKPOINTS) if name.startswith("step-")]
        others = [name for name in steps if name != checkpoint.name]
        for old in others[: max(0, len(steps) - self._keep_last)]:
            self._store.remove(f"{CHECKPOINTS}/{old}")

    def push_model(self, folder: Path) -> None:
        """Copy the final export and the logs."""
        self._store.put(folder, "model")
        self._push_logs()

    def _push_logs(self) -> None:
        """What is new of the logs, and the config they belong to."""
        for log in self._logs:
            log.push()
        self._store.write(CONFIG, (self._rundir / CONFIG).read_bytes())
