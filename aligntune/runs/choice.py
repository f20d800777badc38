"""Which model of a run is meant: its newest, its best, that of a step, its export or its start.

What is chosen is said to a person before anything is done with it.
"""

from __future__ import annotations

from aligntune.errors import UserError
from aligntune.runs.best import Best, best_checkpoint
from aligntune.runs.checkpoint import Checkpoint, Checkpoints
from aligntune.runs.ended import Origin, Scored, finished_at
from aligntune.runs.rundir import RunDir

NEWEST, BEST, EXPORT, START = "newest", "best", "export", "start"


def checkpoint_of(checkpoints: Checkpoints, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest whole one. Raises UserError where there is none."""
    if step is None:
        newest = checkpoints.latest()
        if newest is None:
            raise UserError(f"there is no whole checkpoint in {checkpoints.directory}")
        return newest
    found = checkpoints.of(step)
    if found is None:
        kept = ", ".join(map(str, checkpoints.steps())) or "none"
        raise UserError(
            f"step {step}: there is no whole checkpoint of this step in "
            f"{checkpoints.directory}; there are those of: {kept}"
        )
    return found


def chosen_model(
    rundir: RunDir, start: str, which: str = NEWEST, best: Best | None = None
) -> Scored:
    """The model that `which` means: newest, best, export, start or a step.

    The newest is the export where the run has ended, else its newest checkpoint, and before the
    first step `start`, the model that the run begins with. Raises UserError where it is not there.
    """
    exported, trained = finished_at(rundir), rundir.last_step()
    if which == START:
        return Scored(start, 0, "start")
    if which == EXPORT or (
        which == NEWEST and rundir.model.is_dir() and exported is not None and exported >= trained
    ):
        if not rundir.model.is_dir() or exported is None:
            raise UserError(
                f"the run in {rundir.path} has not ended, so it has exported no model; "
                "take --checkpoint newest, best or a step"
            )
        return Scored(str(rundir.model), exported, "export")
    if which == NEWEST and not rundir.trained:
        return Scored(start, 0, "start")
    checkpoint, origin, said = checkpoint_named(rundir, which, best)
    return Scored(str(checkpoint.path), checkpoint.step, origin, said)


def checkpoint_named(
    rundir: RunDir, which: str, best: Best | None
) -> tuple[Checkpoint, Origin, str]:
    """The checkpoint that newest, best or a step means, where it came from, and what there is to
    say of it. Raises UserError."""
    if which == BEST:
        checkpoint, said = best_checkpoint(rundir, best)
        return checkpoint, "best", said
    if which != NEWEST and not which.isdecimal():
        raise UserError(f"{which!r} is no checkpoint; name newest, best or a step, as in 40")
    checkpoints = Checkpoints(rundir.file("checkpoints"), keep_last=1, to_read=True)
    checkpoint = checkpoint_of(checkpoints, None if which == NEWEST else int(which))
    return checkpoint, "checkpoint", ""
