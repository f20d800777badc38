"""A copy of an online run on object storage, or on a folder that outlives the node: brought up to
date with every checkpoint, and fetched where the run directory is empty or behind.

Invariant: what `latest` names there is whole. A checkpoint is copied first and named last, and one
that is named is removed only after another is. Damage of the storage's own is passed over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from actors.storage import Store
from aligntune.config.records import OnlineCheckpointSpec
from aligntune.config.tree import tree_of_a_run
from aligntune.errors import UserError
from aligntune.paths import located_storage
from aligntune.runs.best import EVALS, Best, best_of
from aligntune.runs.checkpoint import NAME, Checkpoint, Checkpoints, intact
from aligntune.runs.deadline import answered
from aligntune.runs.disk import make_folder, sync, sync_below, write_atomically
from aligntune.runs.jsonl import readable
from aligntune.runs.segments import LogCopy, fetch_log

CHECKPOINTS = "checkpoints"
LATEST = "latest"
CONFIG = "config.yaml"
LOGS = tuple(
    f"{name}.jsonl" for name in ("ledger", "metrics", "evals", "samples", "eval_samples", "events")
)


class Mirror:
    """The storage of one run; `uri` is `checkpoint.storage`."""

    def __init__(
        self,
        uri: str,
        rundir: Path,
        keep_last: int,
        copy_seconds: float,
        best: Best | None = None,
    ) -> None:
        """`copy_seconds`: the longest that fetching a checkpoint may take; `best`: which checkpoint
        is kept beside the newest ones."""
        self._store = Store(uri)
        self._rundir = rundir
        self._keep_last = keep_last
        self._copy_seconds = copy_seconds
        self._best = best
        self._pushed: set[str] = set()  # checkpoints, by this process
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

    def newest(self, resume: str) -> int | None:
        """The step of the newest checkpoint there; None where there is none.

        Raises UserError where nothing answers, or a run is there and `resume` is never.
        """
        there = answered(self.uri, self._latest)
        if there is not None and resume == "never":
            raise UserError(
                f"checkpoint.storage {self.uri} holds a run and resume=never; name another "
                "folder, or use --resume auto to go on with it"
            )
        return there

    def is_ahead_of(self, checkpoints: Checkpoints, resume: str) -> bool:
        """Whether the run there has gone further than the one here. Raises as `newest` does."""
        there, here = self.newest(resume), checkpoints.latest()
        return there is not None and (here is None or there > here.step)

    def config(self) -> dict[str, Any]:
        """The config tree of the run that is there. Raises UserError where nothing answers."""
        content = answered(self.uri, lambda: self._store.read(CONFIG))
        return tree_of_a_run(content or b"{}", f"{CONFIG} in checkpoint.storage {self.uri}")

    def fetch(self, checkpoints: Checkpoints) -> list[str]:
        """Make the run directory what the storage holds: its newest checkpoint that is whole, and
        the logs; returns the names of damaged ones that are newer.

        Raises UserError where none is whole and there is none here, or where that fails or takes
        too long; the next start fetches again.
        """
        here = checkpoints.latest()
        step = here.step if here else -1
        return answered(self.uri, lambda: self._fetch(step), self._copy_seconds)

    def _fetch(self, here: int) -> list[str]:
        newest = self._latest()
        assert newest is not None, "there is something to fetch"
        there = {f"step-{newest:06d}", *self._store.names(CHECKPOINTS)} - {LATEST}
        steps = sorted((int(m[1]) for m in map(NAME.fullmatch, there) if m), reverse=True)
        damaged: list[str] = []
        for step in steps:
            if not here < step <= newest:
                continue
            if self._fetched(step):
                self._fetch_best([other for other in steps if other < step])
                return damaged
            damaged.append(f"{self.uri}/{CHECKPOINTS}/step-{step:06d}")
        if here < 0:
            raise OSError(
                f"{CHECKPOINTS}/step-{newest:06d} there is damaged, with all others: files are "
                "missing or have not the content they were written with; restore one from a copy"
            )
        return damaged

    def _fetch_best(self, steps: Sequence[int]) -> None:
        """Bring the best of the checkpoints of `steps` here, where that is kept and is not here."""
        if self._best is not None:
            checkpoints = Checkpoints(self._rundir / CHECKPOINTS, self._keep_last, to_read=True)
            self._best.among(
                self._best.values(readable(self._rundir / EVALS)),
                steps,
                lambda step: checkpoints.exists(step) or self._fetched(step, logs=False),
            )

    def _fetched(self, step: int, logs: bool = True) -> bool:
        """Whether the checkpoint of `step` was whole and is here now, with the logs."""
        folder = self._rundir / CHECKPOINTS / f"step-{step:06d}"
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial.parent)
        self._store.get(f"{CHECKPOINTS}/{folder.name}", partial)
        if not intact(partial):
            shutil.rmtree(partial)
            return False
        sync_below(partial)
        if logs:
            # The config first: a folder with logs and no config is nobody's run.
            if (config := self._store.read(CONFIG)) is not None:
                write_atomically(self._rundir / CONFIG, config)
            paths = {self._rundir / name: self._rundir / f"{name}.partial" for name in LOGS}
            there = [path for path in paths if fetch_log(self._store, path.name, paths[path])]
            for path in there:  # once all have come
                os.replace(paths[path], path)
            sync(self._rundir)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
        sync(folder.parent)
        return True

    def push(self, checkpoint: Path) -> None:
        """Copy a checkpoint and the logs, name it the newest, see that the best one is there too,
        and forget the oldest, with those of later steps, which come again.

        Raises OSError where the storage does not take it; what it had before is still named.
        """
        self._store.put(checkpoint, f"{CHECKPOINTS}/{checkpoint.name}")
        self._push_logs()
        self._store.write(f"{CHECKPOINTS}/{LATEST}", checkpoint.name.encode())
        self._pushed.add(checkpoint.name)
        new = int(checkpoint.name.removeprefix("step-"))
        best = self._push_best(checkpoint.parent, new)
        there = self._steps()
        earlier = [step for step in there if step < new]
        old = earlier[: max(0, len(earlier) + 1 - self._keep_last)]
        gone = [there[step] for step in there if step > new or step in old]
        self._forget(name for name in gone if name != best)

    def _steps(self) -> dict[int, str]:
        """The checkpoints there, whole or not: {step: name}, ascending."""
        names = map(NAME.fullmatch, self._store.names(CHECKPOINTS))
        return dict(sorted((int(match[1]), match[0]) for match in names if match))

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._store.remove(f"{CHECKPOINTS}/{name}")
            self._pushed.discard(name)

    def go_back(self, checkpoint: Checkpoint, alone: bool) -> None:
        """Make a checkpoint that the user chose the newest there too, where there is a run: those
        of later steps go. `alone`: it is of another folder, and takes the place of all.

        Raises UserError where the storage does not take it in time.
        """

        def back() -> None:
            there = self._latest()
            if there is not None and (alone or there > checkpoint.step):
                self.push(checkpoint.path)
                if alone:
                    names = self._steps().values()
                    self._forget(name for name in names if name != checkpoint.path.name)

        answered(self.uri, back, self._copy_seconds)

    def _push_best(self, folder: Path, newest: int) -> str | None:
        """The name of the best checkpoint, which is on the storage now. One that is whole in
        `folder` is put there; one that is not, of a step up to `newest`, stays there as it was."""
        if self._best is None:
            return None
        checkpoints = Checkpoints(folder, self._keep_last, to_read=True)
        there = [step for step in self._steps() if step <= newest]

        def kept(step: int) -> bool:
            name = f"step-{step:06d}"
            if name not in self._pushed and checkpoints.exists(step):
                self._store.put(folder / name, f"{CHECKPOINTS}/{name}")
                self._pushed.add(name)
            return name in self._pushed or step in there

        values = self._best.values(readable(self._rundir / EVALS))
        step = self._best.among(values, [*checkpoints.folders(), *there], kept)
        return None if step is None else f"step-{step:06d}"

    def push_model(self, folder: Path) -> None:
        """Copy the final export and the logs."""
        self._store.put(folder, "model")
        self._push_logs()

    def _push_logs(self) -> None:
        """What is new of the logs, and the config they belong to.

        A run writes samples before the figures that say that they are there. So it is here too,
        wherever a copy breaks off: sizes are taken in the order of `LOGS`, and logs are copied
        from the last to the first.
        """
        sizes = [log.size() for log in self._logs]
        for log, size in reversed(list(zip(self._logs, sizes, strict=True))):
            log.push(size)
        self._store.write(CONFIG, (self._rundir / CONFIG).read_bytes())


def mirror_of(checkpoint: OnlineCheckpointSpec, rundir: Path) -> Mirror | None:
    """The copy of the run in `rundir` on its storage; None where its config names none."""
    if checkpoint.storage is None:
        return None
    storage, longest = located_storage(checkpoint.storage), checkpoint.copy_timeout_s
    return Mirror(storage, rundir, checkpoint.keep_last, longest, best_of(checkpoint))
