"""`aligntune evaluate` with a real tiny model and real rewards, all in this process."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from actors.supervise import ReplicaSet
from aligntune import cli
from aligntune.commands import evaluations
from aligntune.commands.evaluations import Target, target_of
from aligntune.commands.model_cli import exported
from aligntune.config.online import RunConfig
from aligntune.evaluation import store
from aligntune.evaluation.store import COMPLETIONS, Summary, read_rows, read_summary
from aligntune.online import evaluating
from aligntune.online import trainer as trainers
from aligntune.online.role_table import Role, Start
from aligntune.runs.checkpoint import POLICY, Checkpoints
from tests.aligntune.online.hands import Hand


@dataclass
class InProcess:
    """The real actors of a config, without Ray."""

    config: RunConfig
    criteria: Any

    def maker(self, role: Role) -> Any:
        def make(index: int, name: str) -> Hand:
            start = Start(self.config, index, name, 1, self.criteria, None)
            module, _, cls = role.actor(self.config).partition(":")
            return Hand(getattr(importlib.import_module(module), cls)(*role.arguments(start)))

        return make

    def room(self, role: Role) -> Any:
        return lambda index: False

    def of_config(self, config: RunConfig) -> InProcess:
        return InProcess(config, self.criteria)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray; a checkpoint's model is a copy of what lies in its folder."""

    @contextmanager
    def roles(self: Any, stage: Any = print, only: Any = ()) -> Iterator[InProcess]:
        yield InProcess(self.config, self.criteria)

    async def export(config: Any, roles: Any, checkpoint: Path, target: Path) -> None:
        shutil.copytree(checkpoint / POLICY, target)

    own = functools.partial(
        ReplicaSet, kill=lambda hand: hand.kill(), drop=lambda reference: reference.drop()
    )
    monkeypatch.setattr(evaluating, "ReplicaSet", own)
    monkeypatch.setattr(evaluating, "export_checkpoint", export)
    monkeypatch.setattr(trainers.OnlineTrainer, "_roles", roles)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    """A run of two checkpoints that was stopped; the model of the first was the better one."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    folder.mkdir()
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.0},
        "model": {"name": str(tiny_model)},
        "data": {"path": str(questions), "split": "train[:3]", "eval_split": "train[3:]"},
        "rewards": [{"function": "length", "options": {"target": 3}}, "contains"],
        "output_dir": str(folder),
        "train": {"steps": 4, "groups_per_step": 2, "completions_per_group": 2},
        "rollout": {"engine": "transformers", "max_completion_length": 4, "max_prompt_length": 32},
        "checkpoint": {"best": {"metric": "eval/reward/mean"}},
        "eval": {"every_steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "events.jsonl").write_text('{"kind": "run_started"}\n')
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    evals = [{"step": step, "eval/reward/mean": 1.0 / (step + 1)} for step in range(3)]
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=3)
    for step in (1, 2):
        shutil.copytree(tiny_model, checkpoints.begin(step) / POLICY, dirs_exist_ok=True)
        checkpoints.commit(step, {"step": step, "prompts": "f"})
    return folder


def evaluate(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *map(str, arguments)])
    assert not ended.value.code


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_model_is_said_first_and_all_of_it_is_kept(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run, "--samples", "4", "--success", "length=-0.5", "--json")
    shown = capsys.readouterr()
    said = shown.err.splitlines()
    newest = run.absolute() / "checkpoints" / "step-000002"
    assert said[0] == f"[0:00] evaluating {newest} (checkpoint, step 2)"
    assert any("greedy: 3 of 3 prompts generated and scored" in line for line in said)
    assert any("sampled: 3 of 3 prompts generated and scored" in line for line in said)

    summary = Summary.model_validate_json(shown.out)
    folder = run / "evaluations" / "checkpoint-000002"
    assert read_summary(folder) == summary
    assert (summary.model, summary.origin, summary.step) == (str(newest), "checkpoint", 2)
    assert (summary.prompts, summary.failed) == (3, 0)
    assert {"greedy", "sampled"} == summary.decodings.keys()
    assert summary.decodings["greedy"].figures["pass@1"].interval == "wilson"
    assert {"pass@1", "pass@2", "pass@4", "maj@4"} <= summary.decodings["sampled"].figures.keys()

    rows = read_rows(folder)
    assert [(row["decoding"], len(row["completions"])) for row in rows] == [
        *[("greedy", 1)] * 3,
        *[("sampled", 4)] * 3,
    ]
    assert [row["source"] for row in rows[:3]] == ["3+1", "4+1", "5+1"]
    for row in rows:
        for completion in row["completions"]:
            assert completion["text"] is not None
            assert completion["scores"].keys() == {"length", "contains"}
            assert completion["passed"] == (completion["scores"]["length"] >= -0.5)
    assert {path.name for path in (run / "evaluations").iterdir()} == {folder.name}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "latest",
        "step-000001",
        "step-000002",
    }, "no model is left behind"


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_best_one_the_start_and_another_model_and_what_is_there_stays(
    run: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate(run, "--checkpoint", "best")
    shown = capsys.readouterr()
    assert "(best, step 1: eval/reward/mean 0.5; step 0 had 1, and there is no whole" in shown.err
    assert "pass@1" in shown.out
    evaluate(run, "--checkpoint", "best")
    evaluate(run / "config.yaml", "--checkpoint", "start")
    names = {path.name for path in (run / "evaluations").iterdir()}
    assert names == {"best-000001", "best-000001-2", "start-000000"}
    greedy = [read_rows(run / "evaluations" / name) for name in names]
    assert greedy[0] == greedy[1] == greedy[2], "the same weights say the same"

    evaluate(tiny_model, "--config", run / "config.yaml")
    mine = tmp_path / "evaluations" / tiny_model.name
    assert (mine / COMPLETIONS).is_file()
    summary = read_summary(mine)
    assert (summary.origin, summary.step, summary.run) == ("model", None, None)


def job(folder: Path, algorithm: str, model: Path) -> Path:
    """The directory of a job over a table that has ended at step 2 and written `model`."""
    folder.mkdir()
    tree = {
        "algorithm": {"name": algorithm},
        "model": {"name": "start"},
        "data": {"path": "p.jsonl"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "metrics.jsonl").write_text('{"step": 2}\n')
    (folder / "events.jsonl").write_text(
        '{"kind": "run_started"}\n{"kind": "run_finished", "step": 2}\n'
    )
    shutil.copytree(model, folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_the_model_of_a_job_over_a_table_is_evaluated_by_the_prompts_and_rewards_of_a_config(
    algorithm: str, run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    trained = job(tmp_path / algorithm, algorithm, tiny_model)
    evaluate(trained, "--config", run / "config.yaml")
    summary = read_summary(trained / "evaluations" / "export-000002")
    assert (summary.model, summary.origin, summary.step) == (str(trained / "model"), "export", 2)
    assert summary.run == str(trained)
    assert summary.prompts == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("reward_model --config run/config.yaml", "a reward model, which writes no completions"),
        ("dpo --config run/config.yaml --checkpoint 2", "has one model, the last one"),
        ("run --config run/config.yaml", "has data and rewards of its own"),
        ("start --config dpo/config.yaml", "dpo/config.yaml is of a job over a table"),
        ("run --out run/config.yaml/x", "config.yaml; name another folder by --out"),
        ("dpo --samples 2", "--config CONFIG.yaml with prompts and rewards scores"),
    ],
)
def test_what_cannot_be_evaluated_so_is_refused_with_what_can(
    line: str,
    said: str,
    run: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for algorithm in ("reward_model", "dpo"):
        job(tmp_path / algorithm, algorithm, tiny_model)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *line.split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1, error


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_figures_that_the_disk_does_not_take_are_shown_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_evaluation", full)
    monkeypatch.setattr(evaluating.os, "access", lambda *_: False)  # a run for reading alone
    monkeypatch.setattr(store, "check_place", lambda place: None)
    monkeypatch.setattr(evaluations, "check_place", lambda place: None)
    folders: list[Path | None] = []

    def beside(**given: Any) -> TemporaryDirectory[str]:
        folders.append(given["dir"])
        return TemporaryDirectory(**given)

    monkeypatch.setattr(evaluating, "TemporaryDirectory", beside)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(run), "--json"])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert Summary.model_validate_json(shown.out).prompts == 3
    assert "No space left on device; the figures above are all" in shown.err
    assert "resume with" not in shown.err
    assert folders == [None], "the model of the checkpoint is made elsewhere"


@pytest.mark.parametrize("name", ["try #2", "lr: 1e-6", "\U0001f600"])
def test_the_run_that_is_named_is_the_one_that_is_scored_and_exported_whatever_its_name(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = run.rename(tmp_path / name)
    trainer = target_of(str(there), None, []).trainer
    assert trainer.config.output_dir == str(there)
    assert _named(target_of(name, there / "config.yaml", [])) == (name, None)

    exported_from: list[str] = []

    def export(self: trainers.OnlineTrainer, out: Path, which: str | None) -> int:
        exported_from.append(self.config.output_dir)
        return 2

    monkeypatch.setattr(trainers.OnlineTrainer, "export", export)
    assert exported(there, tmp_path / "out", None) == 2
    assert exported_from == [str(there)]


def _named(target: Target) -> tuple[str, str | None]:
    model = target.trainer.config.model
    return model.name, model.revision


@pytest.mark.parametrize(
    ("model", "overrides", "revision"),
    [
        ("other/model", [], None),
        ("other/model", ["model.revision=v2"], "v2"),
        ("some/model", [], "v1"),
    ],
)
def test_a_revision_of_the_config_is_of_its_own_model(
    model: str, overrides: list[str], revision: str | None, run: Path
) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    config = run.parent / "other.yaml"
    config.write_text(yaml.safe_dump(tree | {"model": {"name": "some/model", "revision": "v1"}}))
    assert _named(target_of(model, config, overrides)) == (model, revision)
