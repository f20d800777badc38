"""Whose a run directory is: one run's from its first step on, and whoever comes before that."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from aligntune.config.auto import tree_of
from aligntune.config.online import RunConfig, load_online_config
from aligntune.errors import UserError
from aligntune.runs.rundir import RunDir, changes, differences
from tests.aligntune.config.test_preference import config


@pytest.fixture
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that was described and never trained, called in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    made = RunDir(tmp_path / "o")
    made.claim()
    made.describe(config("train.pairs_per_worker=8", model={"name": "./m"}))
    made.release()
    return made


def train(rundir: RunDir, how: str) -> None:
    match how:
        case "figures":
            rows = [{"step": 0, "eval/loss": 1.0}, {"step": 1, "loss": 1.0}]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            rundir.file("metrics.jsonl").write_text(text)
        case "checkpoint":
            rundir.file("checkpoints/step-000002").mkdir(parents=True)
        case "model":
            rundir.model.mkdir()


def test_a_run_that_failed_at_its_start_keeps_no_folder(rundir: RunDir) -> None:
    rundir.file("events.jsonl").write_text('{"kind": "run_stopped"}\n')
    rundir.file("metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n')
    rundir.file("checkpoints/step-000002.partial").mkdir(parents=True)
    other = config("train.seed=5", model={"name": "other"})
    for resume in ("auto", "never"):
        rundir.check(other, resume)
        assert rundir.changed["train.seed"] == (0, 5)
        assert rundir.changed["model.name"] == ("./m", "other")


@pytest.mark.parametrize("how", ["figures", "checkpoint", "model"])
def test_a_run_that_trained_is_not_another_and_every_difference_is_named(
    rundir: RunDir, how: str
) -> None:
    train(rundir, how)
    with pytest.raises(UserError) as said:
        rundir.check(config("train.seed=5", "train.pairs_per_worker=2"), "auto")
    message = str(said.value)
    assert "\n" not in message
    for part in (
        "model.name was './m' there and is 'm' here",
        "train.pairs_per_worker was 8 there and is 2 here",
        "train.seed was 0 there and is 5 here",
    ):
        assert (part in message) == (not part.startswith("model")), message
    with pytest.raises(UserError, match="resume=never"):
        rundir.check(config(), "never")


def test_two_spellings_of_a_path_are_the_same_run(rundir: RunDir, tmp_path: Path) -> None:
    train(rundir, "figures")
    for name in ("m", "./m", "m/", str(tmp_path / "m")):
        rundir.check(config(model={"name": name}), "auto")
    with pytest.raises(UserError, match=r"model\.name was '\./m' there and is 'elsewhere/m' here"):
        rundir.check(config(model={"name": "elsewhere/m"}), "auto")
    tree = yaml.safe_load(rundir.config.read_text())
    assert tree["model"]["name"] == "./m", "as it was given"


def test_two_spellings_of_the_paths_of_several_sources_are_the_same_run(tmp_path: Path) -> None:
    def run(*sources: dict[str, Any]) -> RunConfig:
        tree = {"algorithm": "grpo", "model": {"name": "m"}, "data": {"train": [*sources]}}
        return load_online_config({**tree, "output_dir": str(tmp_path)})

    old = tree_of(run({"path": "./a.jsonl", "weight": 1.0}, {"path": "b", "weight": 2.0}))
    other_spelling = run(
        {"path": "a.jsonl", "weight": 1.0}, {"path": os.path.abspath("b"), "weight": 2.0}
    )
    assert changes(old, other_spelling, "here").keys() == {"data.train"}
    for sources in (
        [{"path": "a.jsonl", "weight": 1.0}, {"path": "c", "weight": 2.0}],
        [{"path": "a.jsonl", "weight": 1.0}, {"path": "b", "weight": 3.0}],
        [{"path": "a.jsonl", "weight": 1.0}],
    ):
        with pytest.raises(UserError, match=r"data\.train was .* there and is .* here"):
            changes(old, run(*sources), "here")


def test_a_key_that_came_with_an_upgrade_is_at_its_default_and_has_not_changed() -> None:
    def run(**changes: Any) -> RunConfig:
        tree = {"algorithm": "grpo", "model": {"name": "m"}, "data": {"path": "x.jsonl"}}
        return load_online_config({**tree, "output_dir": "o", "rewards": ["math"], **changes})

    old = tree_of(run())
    for section, key in (
        ("algorithm", "kl_in"),
        ("train", "seed"),
        ("tracking", "samples_per_step"),
    ):
        del old[section][key]
    del old["rewards"][0]["try_first"], old["hub"]
    assert changes(old, run(), "here") == {}
    other = run(tracking={"samples_per_step": 9})
    assert changes(old, other, "here") == {"tracking.samples_per_step": (4, 9)}
    with pytest.raises(UserError, match=r"train\.seed was 0 there and is 5 here"):
        changes(old, run(train={"seed": 5}), "here")
    gone = {**old, "a_section_that_was": {"key": 1}}  # no config any more: compared as it is
    assert differences(gone, run())["hub.timeout_s"] == (None, 3600.0)


def test_what_one_run_leaves_to_the_machines_has_not_changed_and_another_auto_has() -> None:
    def run(**changes: Any) -> RunConfig:
        tree = {"algorithm": "grpo", "model": {"name": "m"}, "data": {"path": "x.jsonl"}}
        return load_online_config({**tree, "output_dir": "o", "tools": ["a:b"], **changes})

    old = run(episodes={"sandbox": "auto"}, model={"name": "m", "dtype": "bfloat16"})
    assert changes(tree_of(old), run(), "here") == {"episodes.sandbox": ("auto", "off")}


@pytest.mark.parametrize("strategy", ["deepspeed", "fsdp"])
def test_only_where_a_checkpoint_loads_on_them_ranks_may_be_more_or_fewer(
    tmp_path: Path, strategy: str
) -> None:
    def ranks(policy: int, critic: int) -> RunConfig:
        tree = {
            "algorithm": "ppo",
            "model": {"name": "m"},
            "data": {"path": "x.jsonl"},
            "output_dir": str(tmp_path),
            "rewards": [{"model": "scorer"}],
            "policy": {"strategy": strategy, "ranks": policy},
            "critic": {"strategy": strategy, "ranks": critic},
        }
        return load_online_config(tree)

    old = tree_of(ranks(2, 2))
    if strategy == "fsdp":
        changed = changes(old, ranks(1, 3), "here")
        assert changed == {"policy.ranks": (2, 1), "critic.ranks": (2, 3)}
        return
    with pytest.raises(UserError, match=r"critic.ranks was 2 there and is 3 here, policy.ranks"):
        changes(old, ranks(1, 3), "here")


def test_a_critic_or_a_commit_of_another_model_makes_another_run(tmp_path: Path) -> None:
    def run(model: dict[str, str], critic: str) -> RunConfig:
        tree = {
            "algorithm": "ppo",
            "model": model,
            "data": {"path": "x.jsonl"},
            "output_dir": str(tmp_path),
            "rewards": [{"model": "scorer"}],
            "critic": {"model": critic},
        }
        return load_online_config(tree)

    old = tree_of(run({"name": "a/b"}, "./c"))
    assert changes(old, run({"name": "a/b"}, "c"), "here") == {"critic.model": ("./c", "c")}
    wanted = (
        r"critic\.model was '\./c' there and is 'd' here, "
        r"model\.revision was None there and is 'v2' here"
    )
    with pytest.raises(UserError, match=wanted):
        changes(old, run({"name": "a/b", "revision": "v2"}, "d"), "here")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/below"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir .* cannot be used: ") as said:
        RunDir(tmp_path / name).check(config(), "auto")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_its_cure(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    gc.collect()  # or files that other tests have left are closed meanwhile
    open_before = os.listdir("/proc/self/fd")
    with pytest.raises(UserError) as refused:
        rundir.claim()
    mount = next(str(place) for place in rundir.path.parents if place.is_mount())
    assert f"the file system {mount} (" in str(refused.value)
    assert os.strerror(number) in str(refused.value)
    assert str(refused.value).endswith("(of Lustre: -o flock), or name a folder elsewhere")
    assert len(os.listdir("/proc/self/fd")) == len(open_before)
