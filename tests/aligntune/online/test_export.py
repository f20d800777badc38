"""Which checkpoint a model is made of, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligntune.errors import UserError
from aligntune.runs.checkpoint import POLICY, Checkpoints
from aligntune.runs.choice import checkpoint_of


def save(checkpoints: Checkpoints, step: int) -> None:
    (checkpoints.begin(step) / POLICY / "weights").write_text(f"of {step}")
    checkpoints.commit(step, {"step": step})


def test_the_newest_whole_one_or_that_of_a_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (2, 4, 6):
        save(checkpoints, step)
    reader = Checkpoints(tmp_path, keep_last=1, to_read=True)
    assert checkpoint_of(reader, None).step == 6
    assert checkpoint_of(reader, 4).step == 4
    (tmp_path / "step-000006" / POLICY / "weights").write_text("of 7")
    assert checkpoint_of(reader, None).step == 4
    with pytest.raises(UserError, match=r"step 6: .* there are those of: 2, 4"):
        checkpoint_of(reader, 6)
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint_of(Checkpoints(tmp_path / "none", keep_last=1, to_read=True), None)


def test_what_a_run_is_writing_is_left_alone(tmp_path: Path) -> None:
    staging = Checkpoints(tmp_path, keep_last=2).begin(3)
    Checkpoints(tmp_path, keep_last=1, to_read=True)
    assert staging.is_dir()
