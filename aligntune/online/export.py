"""Makes a model of a checkpoint: the policy's ranks take its state and write it, and end."""

from __future__ import annotations

from pathlib import Path

from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.ranks import Ranks
from aligntune.online.role_table import ROLES
from aligntune.online.roles import Roles
from aligntune.runs.checkpoint import POLICY, Checkpoint, Checkpoints
from aligntune.runs.modes import as_usual


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
            f"--step {step}: there is no whole checkpoint of this step in "
            f"{checkpoints.directory}; there are those of: {kept}"
        )
    return found


async def export_checkpoint(
    config: RunConfig, roles: Roles, checkpoint: Checkpoint, target: Path
) -> None:
    """Write `checkpoint`'s policy to `target` (safetensors, tokenizer, generation config)."""
    policy = Ranks(config.policy, roles.maker(ROLES["policy"]))
    try:
        await policy.start()
        await policy.all("load", str(checkpoint.path / POLICY))
        await policy.all("save_model", str(target))
    finally:
        policy.kill()
    as_usual(target)
