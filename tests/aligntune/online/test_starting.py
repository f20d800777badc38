"""What a run starts from where its storage holds checkpoints too, or where it goes back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aligntune import create_rl_trainer
from aligntune.config.auto import tree_of
from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.ledger import Ledger, LedgerLog, audit
from aligntune.online.starting import Start, begin_from, starting_point
from aligntune.online.trainer import OnlineTrainer
from aligntune.runs.checkpoint import RUN, Checkpoint, Checkpoints
from aligntune.runs.mirror import Mirror
from aligntune.runs.rundir import IDENTITY, RunDir, flatten, run_of
from tests.aligntune.online.test_settle_resources import config
from tests.aligntune.online.world import World, ahead


def save(folder: Path, step: int, **state: Any) -> Checkpoint:
    """A checkpoint of `step` of a run in `folder`, of `config()`'s kind."""
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    checkpoints.begin(step)
    kept = {"prompts": "f", "ledger": Ledger.beginning(), RUN: tree_of(config())}
    return checkpoints.commit(step, {"step": step, **kept, **state})


def start(config: RunConfig, folder: Path, storage: Path, resume: str = "auto") -> Start:
    """Where the run in `folder` goes on that has a copy on `storage`."""
    rundir, checkpoints = RunDir(folder), Checkpoints(folder / "checkpoints", 2)
    mirror = Mirror(str(storage), folder, 2, 60.0)
    if rundir.config.is_file():
        rundir.check(config, resume)
    found = starting_point(config, rundir, checkpoints, mirror, resume, 20, "f")
    rundir.describe(config)
    return begin_from(found, rundir, checkpoints, mirror, resume)


def copied(config: RunConfig, folder: Path, storage: Path, *steps: int) -> None:
    """A run that has saved these steps, each of them on storage too."""
    folder.mkdir()
    RunDir(folder).describe(config)
    mirror = Mirror(str(storage), folder, 2, 60.0)
    for step in steps:
        mirror.push(save(folder, step).path)


def test_a_run_is_not_copied_over_another_that_is_behind_it(tmp_path: Path) -> None:
    storage = tmp_path / "bucket"
    copied(config("train.seed=1"), tmp_path / "other", storage, 5)
    for step in (4, 5, 10):
        save(tmp_path / f"run-{step}", step)
        with pytest.raises(UserError, match=r"bucket holds another run: train\.seed was 1 there"):
            start(config(), tmp_path / f"run-{step}", storage)
    save(tmp_path / "run", 10)
    same = start(config("train.seed=1"), tmp_path / "run", storage)
    assert same.checkpoint is not None
    assert same.checkpoint.step == 10


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_went_back_stays_there_though_its_storage_was_ahead(
    tmp_path: Path, elsewhere: bool
) -> None:
    storage, run = tmp_path / "bucket", tmp_path / "run"
    copied(config(), run, storage, 5, 10)
    chosen = save(tmp_path / "other", 5).path if elsewhere else run / "checkpoints" / "step-000005"
    back = start(config(), run, storage, str(chosen))
    assert back.checkpoint is not None
    assert back.checkpoint.step == 5
    assert {path.name for path in (storage / "checkpoints").glob("step-*")} == {"step-000005"}
    again = start(config(), run, storage)
    assert again.checkpoint is not None
    assert again.checkpoint.step == 5
    anew = start(config(), tmp_path / "new", storage)
    assert anew.checkpoint is not None
    assert anew.checkpoint.step == 5


def test_a_copied_checkpoint_of_a_version_that_kept_less_is_held_to_what_it_kept(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    whole = flatten(tree_of(config()))
    kept = {path: whole[path] for path in whole if path.startswith(IDENTITY)}
    chosen = str(save(tmp_path / "other", 5, **{RUN: None, "run": kept}).path)
    with pytest.raises(UserError, match=r"holds another run: train\.groups_per_step was"):
        start(config("train.groups_per_step=3"), run, tmp_path / "bucket", chosen)
    begun = start(config("policy.learning_rate=1e-3"), run, tmp_path / "bucket", chosen)
    assert begun.checkpoint is not None
    assert begun.checkpoint.step == 5


@pytest.mark.parametrize("version", ["this", "an older one"])
def test_a_checkpoint_of_another_kind_of_run_is_refused_and_nothing_is_changed(
    tmp_path: Path, version: str
) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    run.mkdir()
    state = {} if version == "this" else {RUN: None}
    chosen = str(save(other, 5, **state).path)
    if version != "this":
        with pytest.raises(UserError, match="does not say what run it is of; leave it in the"):
            start(config(), run, tmp_path / "bucket", chosen)
        RunDir(other).describe(config())
    now = ("train.groups_per_step=3", "model.lora={alpha: 7}", "policy.learning_rate=1e-3")
    with pytest.raises(UserError, match=f"{re.escape(chosen)} holds another run: ") as refused:
        start(config(*now), run, tmp_path / "bucket", chosen)
    said = str(refused.value)
    assert "\n" not in said
    assert "model.lora.alpha was None there and is 7.0 here" in said
    assert "train.groups_per_step was " in said
    assert "learning_rate" not in said
    assert not list(run.iterdir())
    begun = start(config(now[-1]), run, tmp_path / "bucket", chosen)
    assert begun.checkpoint is not None
    assert begun.checkpoint.step == 5


def test_a_checkpoint_that_was_copied_alone_says_what_run_made_it(
    world: World, tmp_path: Path
) -> None:
    world.run()
    made = Checkpoints(world.folder / "checkpoints", 2).latest()
    assert made is not None
    alone = shutil.copytree(made.path, tmp_path / "alone")
    assert run_of(alone) == tree_of(world.config)
    world.configure(train={**ahead(0), "seed": 5})
    with pytest.raises(UserError, match=r"holds another run: train\.seed was 0 there and is 5"):
        start(world.config, tmp_path / "new", tmp_path / "bucket", str(alone))


def test_a_run_tells_what_changed_since_the_run_whose_checkpoint_it_begins_with(
    tmp_path: Path,
) -> None:
    chosen = save(tmp_path / "other", 5)
    rundir, checkpoints = RunDir(tmp_path / "run"), Checkpoints(tmp_path / "run" / "checkpoints", 2)
    now = config("policy.learning_rate=1e-3", output_dir=str(rundir.path))
    starting_point(now, rundir, checkpoints, None, str(chosen.path), 20, "f")
    assert rundir.changed == {
        "output_dir": ("o", str(rundir.path)),
        "policy.learning_rate": (config().policy.learning_rate, 1e-3),
    }


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_of_which_all_steps_are_trained_takes_no_other_settings_of_training(
    tmp_path: Path, elsewhere: bool
) -> None:
    storage, run = tmp_path / "bucket", tmp_path / "run"
    copied(config(), run, storage, 20)
    if elsewhere:
        shutil.rmtree(run)
        run.mkdir()
    (before,) = {path.read_bytes() for path in tmp_path.rglob("config.yaml")}
    with pytest.raises(UserError, match=r"all 20 steps are trained, and policy\.learning_rate was"):
        start(config("policy.learning_rate=1e-3"), run, storage)
    assert {path.read_bytes() for path in tmp_path.rglob("config.yaml")} == {before}
    assert start(config("model.dtype=bfloat16"), run, storage).checkpoint is not None


def test_where_the_storage_does_not_take_it_a_run_that_goes_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, run = tmp_path / "bucket", tmp_path / "run"
    copied(config(), run, storage, 5, 10)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Mirror, "push", full)
    with pytest.raises(UserError, match=r"bucket cannot be used: no space left"):
        start(config(), run, storage, str(run / "checkpoints" / "step-000005"))


@pytest.fixture
def refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer in a new folder, whose reward raises when it is tried."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "odd_reward.py").write_text(
        "def score(completions, **columns):\n    print('hello')\n    raise KeyError('odd')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "1+1", "answer": "2"}) + "\n")

    def trainer() -> OnlineTrainer:
        made = create_rl_trainer(
            model_name=str(tiny_model),
            dataset_name=str(data),
            algorithm="grpo",
            output_dir=str(tmp_path / "run"),
            reward_functions="odd_reward:score",
        )
        assert isinstance(made, OnlineTrainer)
        return made

    return trainer


@pytest.mark.slow
def test_a_reward_that_fails_its_trial_leaves_the_folder_to_the_next_try(
    refused: Any, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="odd"):
            refused().train()
    assert (tmp_path / "run" / "logs" / "reward.log").is_file()
    (tmp_path / "run" / "logs" / "mine.txt").write_text("a user's")
    with pytest.raises(UserError, match="holds no aligntune run"):
        refused().train()


@pytest.mark.slow
def test_neither_does_one_of_a_run_that_begins_with_a_checkpoint_of_another(
    refused: Any, tmp_path: Path
) -> None:
    trainer = refused()
    trainer.check()
    other = tmp_path / "other"
    run = tree_of(trainer.config)
    chosen = save(other, 1, prompts=trainer.prompts.fingerprint, config=run)
    for _ in range(2):
        with pytest.raises(UserError, match="odd"):
            refused().train(str(chosen.path))
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_books_begin_with_the_checkpoint_of_another_run(tmp_path: Path) -> None:
    chosen, run = save(tmp_path / "other", 5), tmp_path / "run"
    run.mkdir()
    begun = start(config(), run, tmp_path / "bucket", str(chosen.path))
    assert begun.checkpoint is not None
    assert begun.checkpoint.path == run / "checkpoints" / "step-000005"
    assert audit(run / "ledger.jsonl").open == 0
    assert not (tmp_path / "bucket").exists(), "there was no run, and a copy comes with the first"


def test_a_resume_says_that_it_reads_books_that_take_long_and_nothing_of_short_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir, checkpoints = RunDir(tmp_path), Checkpoints(tmp_path / "checkpoints", 2)
    ledger = Ledger(LedgerLog(rundir.file("ledger.jsonl")))
    ledger.snapshot(5)
    found, said = Start(save(tmp_path, 5)), list[str]()
    begin_from(found, rundir, checkpoints, None, "auto", said.append)
    assert said == []
    monkeypatch.setattr("aligntune.runs.jsonl.LONG", 1)
    begun = begin_from(found, rundir, checkpoints, None, "auto", said.append)
    assert (said, begun.ledger) == (["reading the books (0.0 GB)"], None)


def test_figures_that_are_missing_before_the_checkpoint_are_told(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    recorder: Any = SimpleNamespace(known={2, 4, 6}, event=lambda kind, **what: told.append(what))
    Start(save(tmp_path, 5)).tell(recorder)
    assert told == [{"file": "metrics.jsonl", "missing": "steps 3, 5"}]
    Start(None).tell(recorder)
    assert len(told) == 1
