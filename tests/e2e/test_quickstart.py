"""The quickstart learns, with each engine and algorithm; and the control shows learning is real."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aligntune.config.load import load_config
from aligntune.errors import UserError
from aligntune.online.trainer import OnlineTrainer
from aligntune.quickstart.run import run_quickstart
from aligntune.quickstart.settings import quickstart_settings
from aligntune.quickstart.task import SETTLED, accuracy, make_task, write_assets
from aligntune.quickstart.tiny import Assets
from aligntune.trainers import create_rl_trainer
from tests import drivers
from tests.e2e.conftest import read

pytestmark = pytest.mark.slow

ACCURACY = "eval/reward/exact_match/mean"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the quickstart that the command makes."""
    return tmp_path_factory.mktemp("home") / "quickstart"


@pytest.fixture(scope="module")
def assets(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """The task and the warmed-up model: the command's, where it has been called."""
    of_command = Assets(home / "assets")
    if of_command.accuracy.is_file():
        return of_command
    return write_assets(tmp_path_factory.mktemp("quickstart"), seed=0)


def command(out: Path, *arguments: str, timeout: float = 280) -> tuple[dict[str, Any], str]:
    """`aligntune quickstart` in a process of its own; returns result.json and what it printed."""
    line = ["-m", "aligntune.cli", "quickstart", "--out", str(out), *arguments]
    done = drivers.run(line, env=os.environ, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "result.json").read_text()), done.stdout


def run(assets: Assets, out: Path, algorithm: str, *overrides: str) -> list[Any]:
    """Train on the quickstart's task with its settings; rows of metrics.jsonl and evals.jsonl."""
    settings = quickstart_settings(algorithm if algorithm.isalpha() else "grpo")
    tree = {
        "algorithm": {"name": algorithm},
        "model": {"name": str(assets.model)},
        "data": {"path": str(assets.train), "eval_path": str(assets.eval)},
        "rewards": ["exact_match"],
        "output_dir": str(out),
    }
    tuned = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
    config = load_config(tree, [*tuned, "rollout.engine=transformers", *overrides])
    trainer = OnlineTrainer(config)
    folder = trainer.train().output_dir
    return [*read(folder / "metrics.jsonl"), *read(folder / "evals.jsonl")]


def accuracies(rows: list[Any]) -> tuple[float, float]:
    """Held-out greedy accuracy before and after."""
    found = [row[ACCURACY] for row in rows if ACCURACY in row]
    return found[0], found[-1]


def test_the_command_learns_with_vllm_and_says_so(home: Path) -> None:
    result, printed = command(home)
    assert 0.3 <= result["accuracy_before"] <= 0.7
    assert result["accuracy_after"] >= 0.9
    assert result["engine"] == "vllm"
    assert result["seconds"] > 0
    rewards = [row["reward/mean"] for row in read(home / "run" / "metrics.jsonl")]
    assert result["steps"] == len(rewards)
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert f"{result['accuracy_after']:.3f}" in printed
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (home / "assets" / "model", home / "run" / "model")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(name, marks=pytest.mark.long) for name in ("grpo", "drgrpo", "dapo", "gspo")],
)
def test_each_algorithm_learns(assets: Assets, tmp_path: Path, algorithm: str) -> None:
    rows = run(assets, tmp_path / "run", algorithm)
    before, after = accuracies(rows)
    assert 0.3 <= before <= 0.7
    assert after >= 0.85
    own = {
        "dapo": "dapo/draws_per_kept_group",
        "gspo": "gspo/sequence_clip_fraction",
    }
    assert all(own.get(algorithm, "reward/mean") in row for row in rows if "reward/mean" in row)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ppo_learns_from_a_reward_model_that_was_trained_on_pairs(tmp_path: Path) -> None:
    result, _ = command(tmp_path / "ppo", "--algorithm", "ppo", "rollout.engine=transformers")
    assert result["reward_model_accuracy"] >= 0.9
    assert 0.3 <= result["accuracy_before"] <= 0.7
    assert result["accuracy_after"] >= 0.85
    assert result["engine"] == "transformers"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "drgrpo", "dapo", "gspo"])
def test_every_quickstart_learns_with_every_seed(
    algorithm: str, seed: int, tmp_path: Path, record_property: Any
) -> None:
    result, _ = command(
        tmp_path / "out", "--algorithm", algorithm, "--seed", str(seed), timeout=480
    )
    record_property("result", result)
    assert 0.3 <= result["accuracy_before"] <= 0.7
    assert result["accuracy_after"] >= 0.85
    assert result.get("reward_model_accuracy", 1.0) >= 0.9


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("algorithm", "engine"),
    [("grpo", "transformers"), *((a, "vllm") for a in ("grpo", "drgrpo", "dapo", "gspo", "ppo"))],
)
def test_an_agent_learns_to_call_its_tool_as_often_as_it_must(
    tmp_path: Path, algorithm: str, engine: str
) -> None:
    out = tmp_path / "agent"
    line = ("--task", "agent", "--algorithm", algorithm, f"rollout.engine={engine}")
    result, printed = command(out, *line, timeout=590)
    print(result)
    assert (result["algorithm"], result["engine"]) == (algorithm, engine)
    assert 0.3 <= result["accuracy_before"] <= 0.6
    assert result["accuracy_after"] >= 0.9
    assert f"{result['accuracy_after']:.3f}" in printed
    before, *_, after = read(out / "run" / "evals.jsonl")
    assert before["eval/turns/mean"] < after["eval/turns/mean"] <= 3.1


def test_written_assets_load_and_have_the_accuracy_they_say(assets: Assets) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = make_task(0)
    model = AutoModelForCausalLM.from_pretrained(assets.model)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    measured = accuracy(model, tokenizer, task.held_out)
    assert measured.right == json.loads(assets.accuracy.read_text())
    assert 0.3 <= measured.right <= 0.7
    assert measured.settled >= SETTLED
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    lines = assets.eval.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": q.prompt, "answer": q.answer} for q in task.held_out
    ]
    assert len(assets.train.read_text().splitlines()) == len(task.train)
    assert set(json.loads(assets.pairs.read_text().splitlines()[0])) == {
        "prompt",
        "chosen",
        "rejected",
    }


@pytest.mark.usefixtures("ray_session")
def test_a_short_quickstart_with_the_transformers_engine_learns(
    assets: Assets, tmp_path: Path
) -> None:
    rows = run(assets, tmp_path / "run", "grpo", "train.steps=10")
    before, after = accuracies(rows)
    assert after > before + 0.1
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    trained = create_rl_trainer(config=tmp_path / "run" / "config.yaml")
    assert trained.evaluate()[ACCURACY] == after, "the model that was written is the one trained"

    assert isinstance(trained, OnlineTrainer)
    assert trained.export(tmp_path / "exported") == 10
    weights = [
        folder / "model.safetensors"
        for folder in (tmp_path / "exported", tmp_path / "run" / "model")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    files = [{path.name for path in weight.parent.iterdir()} for weight in weights]
    assert files[0] == files[1]


@pytest.mark.usefixtures("ray_session")
def test_the_control_with_flipped_advantages_gets_worse(assets: Assets, tmp_path: Path) -> None:
    rows = run(assets, tmp_path / "run", "tests.e2e.algorithms:FlippedGRPO", "train.steps=10")
    before, after = accuracies(rows)
    assert after < before - 0.1


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than a quickstart"):
        run_quickstart("grpo", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_unknown_algorithm_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grpo"):
        run_quickstart("grop", tmp_path / "new")
    assert not (tmp_path / "new").exists()
