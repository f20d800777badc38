"""Which checkpoint a model is made of, and what is refused before anything starts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from aligntune import cli
from aligntune.config.load import load_config
from aligntune.errors import UserError
from aligntune.online.export import export_checkpoint
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


class Ranks:
    """Ranks that write a model where this node sees it, or where it does not."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.ended = False

    async def start(self) -> None: ...

    async def all(self, what: str, folder: str) -> None:
        if what == "save_model" and self.shared:
            (Path(folder) / "config.json").touch()

    def kill(self) -> None:
        self.ended = True


def export_by(ranks: Ranks, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligntune.online.export.Ranks", lambda *_: ranks)
    config, roles = SimpleNamespace(policy=None), SimpleNamespace(maker=lambda role: None)
    asyncio.run(export_checkpoint(config, roles, target.parent / "step-000001", target))


def test_a_model_that_was_written_on_another_node_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_by(Ranks(shared=True), tmp_path / "shared" / "model", monkeypatch)
    assert (tmp_path / "shared" / "model" / "config.json").is_file()
    elsewhere = Ranks(shared=False)
    with pytest.raises(UserError, match=r"written on another node.* that all nodes share"):
        export_by(elsewhere, tmp_path / "model", monkeypatch)
    assert elsewhere.ended
    assert not (tmp_path / "model").exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint, of which the model, the data, the rewards, the storage and the
    cluster are not to be had any more."""
    tree = {
        "algorithm": "grpo",
        "model": {"name": str(tmp_path / "no-model")},
        "data": {"path": str(tmp_path / "no-data.jsonl")},
        "rewards": [{"function": "__main__:nothing", "name": "nothing"}],
        "output_dir": "elsewhere",
        "train": {"epochs": 2},
        "rollout": {"max_prompt_length": 32, "max_completion_length": 8},
        "checkpoint": {"storage": "s3://gone/runs"},
        "cluster": {"address": "ray://gone:10001"},
    }
    folder = tmp_path / "run"
    folder.mkdir()
    settled = load_config(tree).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(settled))
    save(Checkpoints(folder / "checkpoints", keep_last=3), 4)
    return folder


def test_a_model_is_made_of_the_runs_checkpoint_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reserved_for: list[tuple[Any, Any]] = []

    @contextmanager
    def reserved(config: Any, *_: Any, only: Any) -> Iterator[None]:
        reserved_for.append((config.cluster.address, tuple(only)))
        yield

    async def export(config: Any, roles: Any, checkpoint: Path, target: Path) -> None:
        assert checkpoint == run / "checkpoints" / "step-000004"
        os.mkdir(target)

    monkeypatch.setattr("aligntune.online.running.reserved", reserved)
    monkeypatch.setattr("aligntune.online.export.export_checkpoint", export)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(run), "cluster.address=local", "--out", str(tmp_path / "out")])
    assert not ended.value.code, capsys.readouterr().err
    assert reserved_for == [("local", (POLICY,))]
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_reward_of_a_script_is_asked_for_by_its_file_where_it_is_needed(
    run: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(run), f"model.name={tiny_model}"])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "rewards.0.function=FILE.py:nothing, or call the trainer there" in line
