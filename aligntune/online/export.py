"""Makes a model of a checkpoint: the policy's ranks take its state and write it, and end."""

from __future__ import annotations

from pathlib import Path

from aligntune.config.online import RunConfig
from aligntune.online.ranks import Ranks
from aligntune.online.role_table import ROLES
from aligntune.online.roles import Roles
from aligntune.runs.checkpoint import POLICY
from aligntune.runs.modes import as_usual


async def export_checkpoint(
    config: RunConfig, roles: Roles, checkpoint: Path, target: Path
) -> None:
    """Write the policy of a checkpoint's folder to `target`: safetensors, tokenizer, generation
    config."""
    policy = Ranks(config.policy, roles.maker(ROLES["policy"]))
    try:
        await policy.start()
        await policy.all("load", str(checkpoint / POLICY))
        await policy.all("save_model", str(target))
    finally:
        policy.kill()
    as_usual(target)
