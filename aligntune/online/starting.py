"""What a process of a run starts from, as the disk was left.

Invariant: a run starts from a checkpoint of its own kind that is whole, with books that can go back
to it. What was damaged is passed over, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.ignoring import ignore
from aligntune.online.ledger import Ledger, adopt, take_up
from aligntune.runs.checkpoint import Checkpoint, Checkpoints
from aligntune.runs.ended import check_ends
from aligntune.runs.jsonl import long_read
from aligntune.runs.mirror import Mirror
from aligntune.runs.rundir import RunDir, changes, run_of
from aligntune.tracking.metrics import EventKind

if TYPE_CHECKING:
    from aligntune.runs.recorder import Recorder

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Start:
    """Where a run goes on."""

    checkpoint: Checkpoint | None  # None: at the beginning
    damaged: tuple[str, ...] = ()  # checkpoints that were passed over
    ledger: str | None = None  # what was wrong with the books

    def tell(self, recorder: Recorder) -> None:
        """Write what was passed over, and what is missing of the steps before, as events."""
        for name in self.damaged:
            recorder.event(EventKind.CHECKPOINT_DAMAGED, path=name)
        if self.ledger is not None:
            recorder.event(EventKind.LEDGER_DAMAGED, reason=self.ledger)
        if missing := _missing(recorder.known, self.checkpoint.step if self.checkpoint else 0):
            steps = ", ".join(map(str, missing[:20]))
            recorder.event(EventKind.LINES_DAMAGED, file=METRICS, missing=f"steps {steps}")


def starting_point(
    config: RunConfig,
    rundir: RunDir,
    checkpoints: Checkpoints,
    mirror: Mirror | None,
    resume: str,
    total_steps: int,
    fingerprint: str,
) -> Start:
    """The checkpoint to start from, once the copy on storage is fetched where it is ahead. Nothing
    else is changed: see `begin_from`.

    `fingerprint` is of the prompts. Raises UserError where the run cannot go on from there.
    """
    damaged: list[str] = []
    if mirror is not None and mirror.newest(resume) is not None:
        # A run that is further than the other one there would copy itself over it.
        changed = changes(mirror.config(), config, f"checkpoint.storage {mirror.uri}")
        if mirror.is_ahead_of(checkpoints, resume):
            rundir.changed = changed
            damaged += mirror.fetch(checkpoints)
    damaged += checkpoints.damaged()
    checkpoint = rundir.start_from(checkpoints, resume)
    if checkpoint and checkpoints.is_from_elsewhere(checkpoint):
        rundir.changed = _changed_since(checkpoint, config, f"--resume {resume}")
    if checkpoint:
        check_ends(config.train.steps, total_steps, checkpoint.step, rundir.changed)
    if checkpoint and checkpoint.state["prompts"] != fingerprint:
        raise UserError(
            f"the prompts, their columns, order or rendering have changed since the "
            f"checkpoint of step {checkpoint.step}, so the run cannot go on where it was; "
            "restore the data, or name another output_dir"
        )
    return Start(checkpoint, tuple(damaged))


def _changed_since(
    checkpoint: Checkpoint, config: RunConfig, where: str
) -> dict[str, tuple[Any, Any]]:
    """What differs between the run that made it, in another folder, and this one, as `changes`
    has it. Raises UserError where that run could not go on with `config`."""
    run = run_of(checkpoint.path)
    if run is None and isinstance(old := checkpoint.state.get("run"), dict):
        changes(old, config, where)  # an earlier version kept only what makes it the same run
        return {}
    if run is None:
        raise UserError(
            f"{where} does not say what run it is of; leave it in the checkpoints/ of that run, "
            "with its config.yaml beside them"
        )
    return changes(run, config, where)


def begin_from(
    start: Start,
    rundir: RunDir,
    checkpoints: Checkpoints,
    mirror: Mirror | None,
    resume: str,
    stage: Callable[[str], None] = ignore,
) -> Start:
    """Make books and checkpoints those of a run that goes on at `start`, here and on storage; the
    config is written before. Returns `start` with what was wrong. `stage` hears what takes long.

    Raises UserError where the storage does not take what the user chose: it would undo that.
    """
    checkpoint, path = start.checkpoint, rundir.file("ledger.jsonl")
    snapshot = checkpoint.state["ledger"] if checkpoint else Ledger.beginning()
    step = checkpoint.step if checkpoint else 0
    alone = checkpoint is not None and checkpoints.is_from_elsewhere(checkpoint)
    if alone:
        adopt(path, snapshot, step)
    if (told := long_read("the books", path)) is not None:
        stage(told)
    ledger = take_up(path, snapshot, step)
    if checkpoint and resume != "auto":
        checkpoint = checkpoints.adopt(checkpoint)
        if mirror is not None:
            mirror.go_back(checkpoint, alone)
    return replace(start, checkpoint=checkpoint, ledger=ledger)


def _missing(known: Collection[int], step: int) -> list[int]:
    """The steps up to `step` that have no figures, though one before them has."""
    first = min((each for each in known if each >= 1), default=step + 1)
    return [each for each in range(first, step + 1) if each not in known]
