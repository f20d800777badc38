"""Keeps what a run has trained: checkpoints, their copies on storage, the final export.

Invariant: no disk stops the loop. Ranks copy their parts to memory while the step waits; writing
them, what makes a checkpoint of them (checksums, forcing files to disk, forgetting old ones) and
copies run beside the next steps. One checkpoint is written at a time, and it is complete or absent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.algorithms.base import Algorithm
from aligntune.config.auto import tree_of
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed, UserError
from aligntune.online.learner import Learner, PolicyLost
from aligntune.online.ledger import LedgerLog
from aligntune.online.recorder import OnlineRecorder
from aligntune.runs.best import best_of
from aligntune.runs.checkpoint import RUN, Checkpoint, Checkpoints
from aligntune.runs.copies import Copies
from aligntune.runs.deadline import asked
from aligntune.runs.disk import is_full
from aligntune.runs.mirror import Mirror
from aligntune.runs.modes import as_usual
from aligntune.runs.publish import write_card_of
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind

Stands = Callable[[int], Awaitable[bool]]  # (step): whether its checkpoint may be complete

MOST_TRIES = 10  # of steps whose checkpoint fails, one after the other
PAUSES = (0.0, 0.5, 2.0)  # seconds before each try at the end of a run


@dataclass(frozen=True)
class Boundary:
    """A run at the end of a step: what a checkpoint keeps, whenever it is written."""

    step: int
    ledger: dict[str, Any]  # its snapshot
    algorithm: Algorithm


def _is_cancelled() -> bool:
    """Whether the task that runs was asked to end at once."""
    asking = asyncio.current_task()
    return asking is not None and asking.cancelling() > 0


class Keeper:
    """Saves one run; `fingerprint` is of its prompts, `mirror` its storage beside `output_dir`."""

    def __init__(
        self,
        config: RunConfig,
        learner: Learner,
        log: LedgerLog,
        fingerprint: str,
        checkpoints: Checkpoints,
        mirror: Mirror | None,
        recorder: OnlineRecorder,
    ) -> None:
        self._learner = learner
        self._log = log
        self._fingerprint = fingerprint
        self._config = tree_of(config)
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._rundir = Path(config.output_dir).absolute()
        self._home = RunDir(self._rundir)
        self._timeout_s = config.policy.update_timeout_s
        self._when = config.checkpoint
        self._evaluated_every = config.eval.every_steps
        self._best = best_of(config.checkpoint)
        self._began = time.monotonic()  # the last one, or the run
        self._copying = False
        self._committing: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[Checkpoint] | None = None  # may go on beyond its deadline
        self._owed: tuple[int, str] | None = None  # step and reason of a failure, until a success
        self._tries = 0  # that failed since the last success
        self._seen = False  # by every rank, once
        self._copies: Copies | None = None
        if mirror is not None:
            self._copies = Copies(mirror, config.checkpoint.copy_timeout_s, self._not_copied)

    def _not_copied(self, **fields: str) -> None:
        self._recorder.event(EventKind.NOT_COPIED, **fields)

    async def check_sight(self) -> None:
        """Whether every rank sees the run directory, which it writes to.

        Ranks that come again are not asked where the disk has no room for the file that they are to
        see: the run goes on, as it does where a checkpoint finds none. Raises UserError, RunFailed.
        """
        try:
            blind = await self._learner.blind(self._rundir)
        except OSError as error:
            if self._seen and is_full(error):
                return
            why = " ".join(str(error).split())
            raise RunFailed(f"no file could be written to {self._rundir}: {why}") from error
        if blind:
            raise UserError(
                f"output_dir {self._rundir} is not seen by {', '.join(blind)}, which could "
                "write no checkpoint to it; put it on storage that every policy node shares, or "
                "keep the policy on one node (policy.resources.placement=STRICT_PACK)"
            )
        self._seen = True

    async def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, down to the last bit; none comes after it that was
        begun before. The ranks are not running.

        So a write beyond its deadline is waited for: one that came to disk later would be of steps
        that the run has left. `train.stall_timeout_s` ends a run whose disk hangs for good."""
        await self._committed()
        if self._writing is not None:  # beyond its deadline: it is dropped, or was just in time
            await asyncio.wait((self._writing,))
        return await asyncio.wrap_future(asked(self._checkpoints.latest))

    @property
    def progress(self) -> int:
        """Goes up as checkpoints are read."""
        return self._checkpoints.bytes_read

    @property
    def timed(self) -> bool:
        """Whether something runs that has a deadline of its own: a copy to storage, or a write up
        to its deadline."""
        tasks = (self._writing, self._committing)
        return self._copying or all(task is not None and not task.done() for task in tasks)

    @property
    def owes(self) -> bool:
        """Whether the last try to save failed: the next step's end is another."""
        return self._owed is not None

    def due(self, step: int) -> bool:
        """Whether the end of `step` makes a checkpoint: by steps, by time, after a failure, or
        where it may be the best one."""
        steps, minutes = self._when.every_steps, self._when.every_minutes
        by_steps = steps is not None and step % steps == 0
        by_time = minutes is not None and time.monotonic() - self._began >= 60 * minutes
        every = self._evaluated_every if self._best is not None else None
        may_be_best = every is not None and step % every == 0
        return by_steps or by_time or self.owes or may_be_best

    async def checkpoint(self, boundary: Boundary, stands: Stands | None) -> None:
        """Save the step that the ranks have just ended, once; returns when it is in their memory.

        It is complete when `stands`, asked beside the loop, says that it may; else it is given up.
        A disk that does not take it is an event, and `owes` is set. Raises RunFailed when that has
        happened `MOST_TRIES` times without a success.
        """
        await self._committed()
        step, self._began = boundary.step, time.monotonic()
        if self._writing is not None and not self._writing.done():
            self._not_saved(step, "the disk has not taken the one before yet")
            return
        try:
            staging = await asyncio.wrap_future(asked(lambda: self._begun(step)))
            if staging is None:
                self._owed, self._tries = None, 0
                return
            await self._learner.snapshot()
            self._log.flush()
        except OSError as error:
            await self._abandoned(step, error)
            return
        state = {
            "step": step,
            "ledger": boundary.ledger,
            "algorithm": boundary.algorithm.model_dump(mode="json"),
            "prompts": self._fingerprint,
            RUN: self._config,
        }
        commit = self._commit(state, staging, stands)
        self._committing = asyncio.create_task(commit, name="commit")

    async def last(self, boundary: Boundary, stands: Stands | None = None) -> None:
        """Save the end of a run, and see it on disk. Raises RunFailed where it cannot be."""
        for pause in PAUSES:
            await asyncio.sleep(pause)
            await self.checkpoint(boundary, stands)
            await self._committed()
            if not self.owes:
                return
        raise RunFailed(self._unsaved())

    def _begun(self, step: int) -> Path | None:
        """A folder for the ranks to write into, or None where the checkpoint is there already."""
        return None if self._checkpoints.exists(step) else self._checkpoints.begin(step)

    async def _commit(self, state: dict[str, Any], staging: Path, stands: Stands | None) -> None:
        """Make a checkpoint of what the ranks keep, up to the deadline."""
        step, wanted = state["step"], [True]
        if stands is not None and not await stands(step):
            await asyncio.wrap_future(asked(lambda: self._checkpoints.abandon(step)))
            return
        self._writing = asyncio.create_task(self._written(state, staging, wanted), name="write")
        await asyncio.wait((self._writing,), timeout=self._timeout_s)
        if not self._writing.done():
            wanted.clear()
            limit = f"policy.update_timeout_s={self._timeout_s:g} s"
            self._writing.add_done_callback(lambda late: late.cancelled() or late.exception())
            self._not_saved(step, f"not on the disk within {limit}")
            return
        try:
            checkpoint = self._writing.result()
        except (OSError, PolicyLost) as error:
            await self._abandoned(step, error)
            return
        self._owed, self._tries = None, 0
        self._recorder.event(EventKind.CHECKPOINT_SAVED, step=checkpoint.step)
        if self._copies is not None:
            self._copies.offer(checkpoint.path)

    async def _written(
        self, state: dict[str, Any], staging: Path, wanted: Sequence[bool]
    ) -> Checkpoint:
        """Figures and moves of the steps before are on disk when the checkpoint is. One that is not
        `wanted` any more is dropped: the run may have gone back before it."""
        copied = set() if self._copies is None else self._copies.needed
        known = await self._learner.write(staging)

        def commit() -> Checkpoint:
            self._recorder.wait()
            self._log.to_disk()
            step, needed = state["step"], copied | self._beside(state["step"])
            return self._checkpoints.commit(step, state, needed, lambda: bool(wanted), known)

        return await asyncio.wrap_future(asked(commit))

    def _beside(self, new: int | None = None) -> set[str]:
        """The names of the checkpoints to keep beside the newest ones: the best one, and those
        whose evaluation has not ended. `new` is the step of one that is about to be."""
        best, every, checkpoints = self._best, self._evaluated_every, self._checkpoints
        if best is None:
            return set()
        rows, steps = self._recorder.evaluations, checkpoints.folders()
        known = max((row["step"] for row in rows), default=-1)
        kept = {step for step in steps if step > known and every and step % every == 0}
        among = steps if new is None else [*steps, new]
        values = best.values(rows)
        first = best.among(values, among, lambda step: step == new or checkpoints.exists(step))
        return {f"step-{step:06d}" for step in (kept if first is None else {*kept, first})}

    async def _abandoned(self, step: int, error: Exception) -> None:
        """Give the room of a checkpoint that failed back; the one before stays as it is."""
        await asyncio.wrap_future(asked(lambda: self._checkpoints.abandon(step)))
        self._not_saved(step, " ".join(str(error).split()) or type(error).__name__)

    def _not_saved(self, step: int, reason: str) -> None:
        self._owed, self._tries = (step, reason), self._tries + 1
        self._recorder.event(EventKind.CHECKPOINT_FAILED, step=step, reason=reason)
        if self._tries >= MOST_TRIES:
            raise RunFailed(self._unsaved())

    def _unsaved(self) -> str:
        assert self._owed is not None
        step, reason = self._owed
        return (
            f"the checkpoint of step {step} could not be written to {self._rundir} in "
            f"{self._tries} tries: {reason}; make room or mend the disk, the run goes on from the "
            "newest checkpoint that is whole"
        )

    async def _committed(self) -> None:
        """Wait until the last checkpoint is on disk or has failed. Raises RunFailed."""
        if self._committing is not None:
            await asyncio.wait((self._committing,))
            self._committing.result()

    async def settled(self) -> None:
        """Wait for all that runs beside the loop: the last checkpoint, and its copy. A task that
        was cancelled waits for neither."""
        if _is_cancelled():
            return
        await self._committed()
        if self._copies is not None:
            self._copying = True
            await self._copies.settled()
            self._copying = False

    async def export(self) -> None:
        """Write the trained model."""
        try:
            await self._learner.save_model(self._rundir / "model")
            as_usual(self._rundir / "model")
        except OSError as error:
            raise RunFailed(
                f"the trained model could not be written to {self._rundir / 'model'}: "
                f"{' '.join(str(error).split())}"
            ) from error

    async def finish(self, step: int) -> None:
        """See all of a finished run on disk with its model's card, and copied, up to the deadline
        of copies."""
        await self._committed()
        await asyncio.wrap_future(asked(lambda: write_card_of(self._home, step, self._recorder)))
        if self._copies is not None:
            self._copying = True
            await self._copies.model(self._rundir / "model")
            self._copying = False
        if self._copies is not None or self._best is not None:
            await asyncio.wrap_future(asked(lambda: self._checkpoints.forget_old(self._beside())))

    async def close(self) -> None:
        """End what runs beside the loop, whatever ended the run, and then the ranks.

        They may be writing a checkpoint: it comes to disk first, within its deadline, unless the
        task that asks was cancelled.
        """
        try:
            if self._committing is not None and not _is_cancelled():
                await asyncio.wait((self._committing,))
        finally:
            self._learner.kill()
            if self._committing is not None:
                await asyncio.wait((self._committing,))
            self._log.close()
