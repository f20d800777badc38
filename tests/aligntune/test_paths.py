"""A path in a config is taken from the folder the command is called in, whatever folder a worker
works in: what leaves the driver names local folders by their absolute paths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import PreferenceConfig
from aligntune.online.roles import Roles
from aligntune.online.trainer import OnlineTrainer
from aligntune.preference.trainer import PreferenceTrainer
from aligntune.runs.mirror import mirror_of
from tests.stand_ins import write_reward_model

ONLINE = {
    "model.name": "model",
    "reference.model": "./reference",
    "critic.model": "models/critic",
    "rewards.0.model": "models/reward",
    "data.path": "data/train.jsonl",
    "data.eval_path": "./data/held.jsonl",
    "output_dir": "runs/own",
    "checkpoint.storage": "kept/online",
}
PREFERENCE = {
    "model.name": "models/qwen",
    "data.path": "pairs.jsonl",
    "data.eval_path": "./held-pairs.jsonl",
    "output_dir": "runs/job",
    "checkpoint.storage": "kept/job",
}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the command is called in, with everything a config may name."""
    place = tmp_path / "called-in"
    (place / "models").mkdir(parents=True)
    (place / "data").mkdir()
    for name in ("model", "reference", "models/critic", "models/qwen"):
        (place / name).symlink_to(tiny_model, target_is_directory=True)
    write_reward_model(place / "models/reward", tiny_model)
    question = json.dumps({"prompt": "1+1", "answer": "2"}) + "\n"
    pair = json.dumps({"prompt": "1+1", "chosen": "2", "rejected": "3"}) + "\n"
    for name in ("train", "held"):
        (place / "data" / f"{name}.jsonl").write_text(question)
    for name in ("pairs", "held-pairs"):
        (place / f"{name}.jsonl").write_text(pair)
    monkeypatch.chdir(place)
    return place


def tree(keys: dict[str, str], algorithm: str) -> dict[str, Any]:
    made: dict[str, Any] = {"algorithm": algorithm}
    for path, value in keys.items():
        match path.split("."):
            case ["rewards", _, key]:
                made["rewards"] = [{key: value}]
            case [section, key]:
                made.setdefault(section, {})[key] = value
            case [key]:
                made[key] = value
    return made


def strings(value: Any) -> Iterator[str]:
    """Every string in what is sent to a worker."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
    elif isinstance(value, BaseModel):
        yield from strings(value.model_dump())
    elif is_dataclass(value):
        for field in fields(value):
            yield from strings(getattr(value, field.name))


def relative_names(value: Any, keys: dict[str, str]) -> set[str]:
    return set(keys.values()) & set(strings(value))


@pytest.mark.parametrize("algorithm", ["dpo", "reward_model", "sft"])
def test_a_preference_job_names_every_folder_absolutely(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    columns = ["data.completion_column=chosen"] if algorithm == "sft" else []
    config = load_config(tree(PREFERENCE, algorithm), columns)
    assert isinstance(config, PreferenceConfig)
    trainer = PreferenceTrainer(config)
    rundir = trainer.check()
    storage = trainer._storage(rundir)
    job = trainer._job(1, export=storage.export)
    place = storage.ray_arguments()
    assert len(trainer.pairs) == 1
    assert relative_names([job, place], PREFERENCE) == set()
    monkeypatch.chdir(tmp_path)  # as Ray Train's workers do
    assert (Path(job.model.name) / "config.json").is_file()
    assert job.model.name == str(folder / "models/qwen")
    assert rundir.path == folder / "runs/job"
    assert Path(job.export) == folder / "kept/job/model"
    assert Path(place["storage_path"]) == folder / "kept/job"


def test_without_a_storage_the_model_is_left_in_the_run_directory(folder: Path) -> None:
    keys = {k: v for k, v in PREFERENCE.items() if k != "checkpoint.storage"}
    config = load_config(tree(keys, "dpo"))
    assert isinstance(config, PreferenceConfig)
    trainer = PreferenceTrainer(config)
    storage = trainer._storage(trainer.check())
    assert Path(storage.export).parent == folder / "runs/job"
    assert Path(storage.ray_arguments()["storage_path"]) == folder / "runs/job"


def test_an_online_run_names_every_folder_absolutely(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["algorithm.beta=0.1", "train.groups_per_step=1"]
    config = load_config(tree(ONLINE, "ppo"), [*overrides, "train.groups_per_minibatch=1"])
    assert isinstance(config, RunConfig)
    trainer = OnlineTrainer(config)
    rundir = trainer.check()
    mirror = mirror_of(config.checkpoint, rundir.path)
    assert mirror is not None
    roles = Roles(config, None, trainer.criteria, 1)  # type: ignore[arg-type]  # none is made here
    at_work = roles._config
    sent = [at_work.model, at_work.reference, at_work.critic, roles._criteria]
    assert relative_names(sent, ONLINE) == set()
    assert len(trainer.prompts) == len(trainer.eval_prompts) == 1
    monkeypatch.chdir(tmp_path)
    for name in (at_work.model.name, at_work.reference.model, at_work.critic.model):
        assert (Path(str(name)) / "config.json").is_file()
    assert rundir.path == folder / "runs/own"
    assert mirror.uri == str(folder / "kept/online")


@pytest.mark.parametrize(
    ("config", "keys"), [(RunConfig, ONLINE), (PreferenceConfig, PREFERENCE)], ids=["run", "job"]
)
def test_every_key_that_names_a_folder_or_file_is_tried_here(
    config: type[BaseModel], keys: dict[str, str]
) -> None:
    named = {
        path
        for path, description in descriptions(config)
        if any(
            word in description for word in ("folder", "file", "run directory", "starting model")
        )
    }
    assert named - {"data.name"} <= {*keys}, "a new key for a path: name it here, and see it work"


def descriptions(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in config.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from descriptions(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""
