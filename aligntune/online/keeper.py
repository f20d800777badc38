"""Keeps what a run has trained: checkpoints, their copies on storage, the final export."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from aligntune.algorithms.base import Algorithm
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online.learner import Learner
from aligntune.online.ledger import Ledger, LedgerLog
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.deadline import asked
from aligntune.runs.mirror import Mirror
from aligntune.runs.recorder import Recorder
from aligntune.tracking.metrics import EventKind


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
        recorder: Recorder,
    ) -> None:
        self._learner = learner
        self._log = log
        self._fingerprint = fingerprint
        self._checkpoints = checkpoints
        self._mirror = mirror
        self._recorder = recorder
        self._rundir = Path(config.output_dir).absolute()
        self._copying: Future[None] | None = None
        self._copy_seconds = config.policy.update_timeout_s

    async def checkpoint(
        self, step: int, ledger: Ledger, algorithm: Algorithm, more: Mapping[str, Any]
    ) -> None:
        """Save the state after `step`, and `more` of the controller's, once per step."""
        if self._checkpoints.exists(step):
            return
        staging = self._checkpoints.begin(step)
        await self._learner.save(staging)
        state = {
            "step": step,
            "ledger": ledger.snapshot(step),
            "algorithm": algorithm.model_dump(mode="json"),
            "prompts": self._fingerprint,
            **more,
        }
        self._log.sync()
        checkpoint = self._checkpoints.commit(step, state)
        self._recorder.event(EventKind.CHECKPOINT_SAVED, step=step)
        if self._mirror is not None:
            await self._copied(self._mirror.push, checkpoint.path)

    async def finish(self) -> None:
        """Write the final export. Raises RunFailed where the storage does not take it."""
        model = self._rundir / "model"
        await self._learner.save_model(model)
        if self._mirror is not None and not await self._copied(self._mirror.push_model, model):
            raise RunFailed(
                f"the run is complete in {self._rundir}, but checkpoint.storage {self._mirror.uri} "
                "did not take the model; the event not_copied in events.jsonl says why"
            )

    async def _copied(self, push: Callable[[Path], None], folder: Path) -> bool:
        """Copy a folder to the storage, one at a time. Where it is not taken, that is told, and the
        run goes on: the next checkpoint is copied again."""
        if self._copying is not None and not self._copying.done():
            reason = "an earlier copy has not ended yet"
        else:
            self._copying = asked(lambda: push(folder))
            try:
                await asyncio.wait_for(asyncio.wrap_future(self._copying), self._copy_seconds)
                return True
            except Exception as error:  # noqa: BLE001 - of whatever client the storage has
                reason = str(error) or f"no end within {self._copy_seconds:g} s"
        self._recorder.event(EventKind.NOT_COPIED, path=folder.name, reason=reason)
        return False
