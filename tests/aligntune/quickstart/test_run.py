"""What a quickstart refuses, and when: before it makes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aligntune.algorithms import registry
from aligntune.errors import UserError
from aligntune.quickstart import run

TASKS = [*((name, "sum") for name in registry.names()), ("grpo", "agent")]


class Begun(Exception):
    """It makes its assets."""


@pytest.mark.parametrize(("algorithm", "task"), TASKS)
def test_a_wrong_setting_is_told_before_the_warm_up_and_a_right_one_comes_to_it(
    algorithm: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: Any) -> None:
        raise Begun

    for made in ("_assets", "_agent_assets"):
        monkeypatch.setattr(run, made, begin)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"train\.steps"):
        run.run_quickstart(algorithm, out, 0, ["train.steps=many"], task)
    assert not out.exists()
    with pytest.raises(Begun):
        run.run_quickstart(algorithm, out, 0, ["train.steps=2"], task)
    assert out.is_dir()
