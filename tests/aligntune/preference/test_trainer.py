"""What a preference job is refused before anything starts: its checkpoints left elsewhere, other
rows than those they have seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligntune.errors import UserError
from aligntune.preference.storage import FOLDER, JobStorage
from aligntune.preference.trainer import PreferenceTrainer
from aligntune.runs.rundir import RunDir
from tests.actors.scoring.test_classifiers import write as write_classifier
from tests.aligntune.config.test_preference import config
from tests.aligntune.preference.test_storage import write_checkpoints
from tests.e2e.page import byte_tokenizer

Job = Callable[..., PreferenceTrainer]
ANSWERS = range(12)


def write_pairs(path: Path, answers: range = ANSWERS) -> None:
    pairs = [{"prompt": f"1+{n}", "chosen": str(1 + n), "rejected": str(n)} for n in answers]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> Job:
    """A job on a few pairs with the overrides, and its run directory."""
    write_pairs(tmp_path / "pairs.jsonl")
    sections = {
        "model": {"name": str(tiny_model)},
        "data": {"path": str(tmp_path / "pairs.jsonl")},
        "output_dir": str(tmp_path / "run"),
        "train": {"steps": 20},
    }

    def make(*overrides: str, **changes: Any) -> PreferenceTrainer:
        return PreferenceTrainer(config(*overrides, **{**sections, **changes}))

    return make


def stop_at(trainer: PreferenceTrainer, step: int) -> None:
    """Leave what a run leaves that was stopped after the checkpoint of `step`."""
    rundir, storage = RunDir(Path(trainer.config.output_dir)), trainer.config.checkpoint.storage
    root = rundir.path if storage is None else Path(storage.removeprefix("file://"))
    rundir.path.mkdir(exist_ok=True)
    write_checkpoints(root, [step])
    rundir.describe(trainer.config)
    JobStorage(storage, rundir.path).describe(trainer.config, trainer.inputs.digest)
    rundir.file("metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")


@pytest.mark.slow
def test_a_run_whose_checkpoints_lie_elsewhere_does_not_begin_again(
    job: Job, tmp_path: Path
) -> None:
    stored = f"checkpoint.storage=file://{tmp_path}/shared"
    stop_at(job(stored), 10)
    job(stored).check()
    job(f"{stored}/").check()  # another spelling of the same place
    for option in ([], [f"checkpoint.storage=file://{tmp_path}/shraed"]):
        with pytest.raises(UserError, match=r"in file://.*/shared, up to step 10, .* set it to"):
            job(*option).check()
    write_checkpoints(tmp_path / "copy", [10])
    job(f"checkpoint.storage=file://{tmp_path}/copy").check()


def test_a_storage_that_is_added_must_have_the_checkpoints(job: Job, tmp_path: Path) -> None:
    stop_at(job(), 10)
    with pytest.raises(UserError, match=r"in output_dir .*/run, up to step 10, .* where .* step 0"):
        job(f"checkpoint.storage=file://{tmp_path}/new").check()
    write_checkpoints(tmp_path / "older", [5])
    older = job(f"checkpoint.storage=file://{tmp_path}/older")
    with pytest.raises(UserError, match="where the newest is of step 5"):
        older.check()
    older.check(resume=f"{tmp_path}/older/{FOLDER}/step-000005")  # said so


def test_a_place_of_before_that_does_not_answer_is_left_for_a_named_copy(
    job: Job, tmp_path: Path
) -> None:
    stop_at(job(), 10)
    rundir = RunDir(tmp_path / "run")
    rundir.describe(job("checkpoint.storage=nosuch://bucket/run").config)
    with pytest.raises(UserError, match=r"the place of before does not answer: .*nosuch"):
        job().check()
    job().check(resume=f"{tmp_path}/run/{FOLDER}/step-000010")


@pytest.mark.slow
def test_a_run_does_not_go_on_over_other_rows(job: Job, tmp_path: Path) -> None:
    stop_at(job(), 10)
    job("train.learning_rate=1e-5", "data.max_length=64").check()  # the same rows
    changed = "rows, their columns, order or rendering have changed since the checkpoint of step 10"
    for option in ("data.max_samples=4", "data.rejected_column=prompt"):
        with pytest.raises(UserError, match=changed):
            job(option).check()
    write_pairs(tmp_path / "pairs.jsonl", range(13))
    with pytest.raises(UserError, match=changed):
        job().check()


def test_a_reward_model_job_reads_no_more_than_the_table_of_positions_holds(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    long = {"prompt": "1+" * 50, "chosen": "1", "rejected": "2"}
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")

    model = write_classifier(tmp_path / "roberta", "roberta", num_labels=1)
    byte_tokenizer(template=None).save_pretrained(model)  # which knows an end, as RoBERTa's does

    def job(*overrides: str) -> PreferenceTrainer:
        given = config(
            *overrides,
            algorithm="reward_model",
            model={"name": model},
            data={"path": str(tmp_path / "pairs.jsonl")},
            output_dir=str(tmp_path / "run"),
        )
        return PreferenceTrainer(given)

    settled = job()
    settled.inputs.settle()
    assert settled.inputs.max_length == 63  # of 64 positions one is the padding's
    job("data.max_length=63").inputs.settle()
    with pytest.raises(UserError, match=r"data\.max_length=64, and the model reads 63 tokens"):
        job("data.max_length=64").inputs.settle()


@pytest.mark.slow
def test_a_run_that_goes_on_is_held_to_the_steps_of_its_own_batch(job: Job) -> None:
    """Which a config leaves to the machines that has none: 12 pairs are 12 steps of one."""
    one = [f"train.{key}=1" for key in ("workers", "pairs_per_worker", "accumulation_steps")]
    epoch = {"train": {"epochs": 1.0}}
    stop_at(job(*one, **epoch), 10)
    job(**epoch).check()
    assert "12 steps" in job(**epoch).summary()
    less = {"train": {"epochs": 0.5}}
    job(**less).check()
    with pytest.raises(UserError, match=r"train\.epochs makes 6 steps .* checkpoint is of step 10"):
        job(**less).summary()
    with pytest.raises(UserError, match=r"train\.steps makes 9 steps .* checkpoint is of step 10"):
        job(train={"steps": 9}).check()


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_a_job_of_which_all_steps_are_trained_takes_no_other_settings_of_training(
    job: Job, tmp_path: Path, stored: bool
) -> None:
    place = [f"checkpoint.storage=file://{tmp_path}/shared"] if stored else []
    stop_at(job(*place), 20)
    if stored:
        shutil.rmtree(tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("config.yaml")}
    for changed in ("train.learning_rate=1e-5", "algorithm.beta=0.5"):
        late = f"all 20 steps are trained, and {changed.partition('=')[0]} was"
        with pytest.raises(UserError, match=late):
            job(*place, changed).train()
        job(*place, changed, train={"steps": 30}).check()
    assert {path: path.read_bytes() for path in tmp_path.rglob("config.yaml")} == before
    job(*place, "model.dtype=bfloat16").check()


def test_what_the_cluster_cannot_be_asked_for_is_refused_before_it_starts(job: Job) -> None:
    with pytest.raises(UserError, match=r"cluster\.colocate: this run has no role 'policy'"):
        job("cluster.colocate=[[trainer, policy]]").check()


def test_rows_may_change_before_there_is_a_checkpoint(job: Job, tmp_path: Path) -> None:
    trainer = job()
    stop_at(trainer, 10)
    shutil.rmtree(tmp_path / "run" / FOLDER)
    write_pairs(tmp_path / "pairs.jsonl", range(13))
    job().check()
