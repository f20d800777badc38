"""What a run starts from where its storage holds checkpoints too."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.ledger import Ledger
from aligntune.online.starting import Start, starting_point
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.mirror import Mirror
from aligntune.runs.rundir import RunDir
from tests.aligntune.online.test_settle_resources import config


def start(config: RunConfig, folder: Path, storage: Path, step: int, copy: bool = False) -> Start:
    """Where a run goes on that has a checkpoint of `step`; with `copy` it is on storage first."""
    rundir, checkpoints = RunDir(folder), Checkpoints(folder / "checkpoints", 2)
    mirror = Mirror(str(storage), folder, 2, 60.0)
    checkpoints.begin(step)
    rundir.describe(config)
    state = {"step": step, "prompts": "f", "ledger": Ledger.beginning()}
    checkpoint = checkpoints.commit(step, state)
    if copy:
        mirror.push(checkpoint.path)
    return starting_point(config, rundir, checkpoints, mirror, "auto", 20, "f")


def test_a_run_is_not_copied_over_another_that_is_behind_it(tmp_path: Path) -> None:
    storage = tmp_path / "bucket"
    other = start(config("train.seed=1"), tmp_path / "other", storage, 5, copy=True)
    assert other.checkpoint is not None
    for step in (4, 5, 10):
        with pytest.raises(UserError, match=r"bucket holds another run: train\.seed was 1 there"):
            start(config(), tmp_path / f"run-{step}", storage, step)
    same = start(config("train.seed=1"), tmp_path / "run", storage, 10)
    assert same.checkpoint is not None
    assert same.checkpoint.step == 10
