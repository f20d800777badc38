"""Makes a model of a checkpoint: the policy's ranks take its state and write it, and end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.ranks import Ranks
from aligntune.online.role_table import ROLES
from aligntune.online.roles import Roles
from aligntune.runs.checkpoint import POLICY
from aligntune.runs.modes import as_usual


async def export_checkpoint(
    config: RunConfig, roles: Roles, checkpoint: Path, target: Path
) -> None:
    """Write the policy of a checkpoint's folder to `target`, a new folder: safetensors, tokenizer,
    generation config. Raises UserError where a rank on another node wrote it there."""
    with _filled(target):
        policy = Ranks(config.policy, roles.maker(ROLES["policy"]))
        try:
            await policy.start()
            await policy.all("load", str(checkpoint / POLICY))
            await policy.all("save_model", str(target))
        finally:
            policy.kill()
    as_usual(target)


@contextmanager
def _filled(target: Path) -> Iterator[None]:
    """A new folder that others fill; it goes again where they do not. It is made here, as over NFS
    one that was looked for in vain may stay unseen."""
    target.mkdir(parents=True)
    try:
        yield
        if not any(target.iterdir()):
            raise UserError(
                f"{target} was written on another node, and is not on this one; name a folder that "
                "all nodes share"
            )
    finally:
        if not any(target.iterdir()):
            target.rmdir()
