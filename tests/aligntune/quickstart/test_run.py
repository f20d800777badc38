"""What a quickstart refuses, and when: before it makes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aligntune.algorithms import registry
from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.quickstart import run
from aligntune.quickstart.tiny import Assets

TASKS = [*((name, "sum") for name in registry.names()), ("grpo", "agent")]


class Begun(Exception):
    """It makes its assets."""


@pytest.mark.parametrize(("algorithm", "task"), TASKS)
def test_a_wrong_setting_is_told_before_the_warm_up_and_a_right_one_comes_to_it(
    algorithm: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: Any) -> None:
        raise Begun

    for write in ("write_assets", "write_agent_assets"):
        monkeypatch.setattr(run, write, begin)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"train\.steps"):
        run.run_quickstart(algorithm, out, 0, ["train.steps=many"], task)
    assert not out.exists()
    with pytest.raises(Begun):
        run.run_quickstart(algorithm, out, 0, ["train.steps=2"], task)
    assert out.is_dir()


@pytest.mark.parametrize(
    "change",
    [
        "eval.at_start=false",
        "eval.at_end=false",
        "data.eval_path=null",
        "rewards=[length]",
        "rewards.0.name=right",
        "output_dir=elsewhere",
    ],
)
def test_a_setting_that_takes_away_what_is_shown_at_the_end_is_refused_at_the_start(
    change: str, tmp_path: Path
) -> None:
    """It was found out when the run had ended."""
    key = change.partition("=")[0].removesuffix(".0.name")
    with pytest.raises(UserError, match=f"before and after, of a run in --out, and {key} takes"):
        run.run_quickstart("grpo", tmp_path / "out", 0, [change])
    assert not (tmp_path / "out").exists()


def test_an_override_to_an_algorithm_without_rollouts_is_refused(tmp_path: Path) -> None:
    overrides = [
        "algorithm=dpo",
        *(f"{of}=null" for of in ("rewards", "train", "policy", "rollout")),
    ]
    with pytest.raises(UserError, match="the quickstart has no dpo"):
        run.run_quickstart("grpo", tmp_path / "out", 0, overrides)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_quickstart_keeps_assets_that_are_complete_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, complete, written = tmp_path / "out", [False, True, True], []

    def write(root: Path, seed: int) -> Assets:
        assert not root.exists(), "what was left there is removed"
        root.mkdir()
        assets = Assets(root)
        assets.train.write_text("")
        if complete[len(written)]:
            assets.accuracy.write_text("0.5")
        written.append(root)
        return assets

    def trainer(config: RunConfig) -> None:
        paths = (config.model.name, config.data.path, config.data.eval_path)
        made = Assets(written[-1])
        assert paths == tuple(map(str, (made.model, made.train, made.eval)))
        raise Begun

    monkeypatch.setattr(run, "write_assets", write)
    monkeypatch.setattr(run, "OnlineTrainer", trainer)
    for count in (1, 2, 2):
        with pytest.raises(Begun):
            run.run_quickstart("grpo", out)
        assert len(written) == count
