"""The page's six examples as printed, where local stand-ins bear the names that they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aligntune import create_rl_trainer
from aligntune.quickstart.task import make_task, preference_pairs, write_assets
from tests.e2e.conftest import read
from tests.e2e.page import PACKED, WHOLE, write_page_data, write_page_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DATA = "Anthropic/hh-rlhf"
PAGE: dict[str, dict[str, Any]] = {
    "dpo": {
        "model_name": "Qwen/Qwen3-0.6B",
        "dataset_name": DATA,
        "algorithm": "dpo",
        "backend": "trl",
    },
    "ppo": {
        "model_name": PACKED,
        "dataset_name": DATA,
        "algorithm": "ppo",
        "backend": "unsloth",
        "reward_model_name": "your-reward-model",
    },
    "grpo": {
        "model_name": "Qwen/Qwen3-0.6B",
        "dataset_name": DATA,
        "algorithm": "grpo",
        "backend": "trl",
    },
    "gspo": {
        "model_name": "Qwen/Qwen2-1.5B-Instruct",
        "dataset_name": DATA,
        "algorithm": "gspo",
        "backend": "trl",
    },
    "dapo": {
        "model_name": "Qwen/Qwen2-1.5B-Instruct",
        "dataset_name": DATA,
        "algorithm": "dapo",
        "backend": "trl",
    },
    "drgrpo": {
        "model_name": "Qwen/Qwen3-0.6B",
        "dataset_name": DATA,
        "algorithm": "drgrpo",
        "backend": "trl",
    },
}
SHORT: dict[str, Any] = {"max_steps": 2, "batch_size": 2}
SHORT_ROLLOUTS = {"max_completion_length": 32}
QUIET = ["tracking.trackers=[]"]
CHEAP = ["rollout.engine=transformers", "train.groups_per_minibatch=2"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the examples are called in."""
    folder = tmp_path_factory.mktemp("page")
    write_page_models(folder)
    write_page_data(folder)
    return folder


@pytest.mark.parametrize("algorithm", PAGE)
def test_an_example_of_the_page_trains_as_printed(
    ray_session: None, page: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    monkeypatch.chdir(page)
    given, online = PAGE[algorithm], algorithm != "dpo"
    budgets = {**SHORT, **(SHORT_ROLLOUTS if online else {})}
    if online and algorithm != "ppo":
        budgets["num_generations"] = 4
    overrides = [*QUIET, *(CHEAP if online else [])]
    result = create_rl_trainer(**given, **budgets, overrides=overrides).train()

    assert result.steps == 2
    assert result.output_dir == page / "runs" / algorithm
    trained = WHOLE if given["model_name"] == PACKED else given["model_name"]
    before = load_file(page / trained / "model.safetensors")
    after = load_file(result.model / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    events = read(result.output_dir / "events.jsonl")
    started = [event for event in events if event["kind"] == "role_started"]
    assert [event["backend"] for event in started if "backend" in event] == [result.backend]
    plain = "transformers " if online else "trl "
    assert result.backend.startswith("unsloth " if given["backend"] == "unsloth" else plain)
    assert (
        f"# ran with backend: {result.backend}\n" in (result.output_dir / "config.yaml").read_text()
    )
    (dropped,) = [event for event in events if event["kind"] == "rows_dropped"]
    assert dropped["rows"] == 150
    assert dropped["dropped"].keys() == {"too long", "equal", "empty"}
    assert (dropped["dropped"]["equal"], dropped["dropped"]["empty"]) == (2, 1)
    settled = {event["path"]: event["value"] for event in events if event["kind"] == "settled"}
    written = yaml.safe_load((result.output_dir / "config.yaml").read_text())
    if not online:
        assert written["data"]["max_length"] == settled["data.max_length"] < 400
        return
    assert written["rollout"]["max_prompt_length"] == settled["rollout.max_prompt_length"] < 400
    if algorithm == "ppo":
        assert settled["model.name"] == written["model"]["name"] == WHOLE
        assert [reward["model"] for reward in written["rewards"]] == ["your-reward-model"]
        first = figures(result.output_dir)[0]  # Unsloth's policy is what the plain models are
        assert first["kl/reference"] == pytest.approx(0.0, abs=1e-8)
        assert first["kl/rollout_vs_policy"] == pytest.approx(0.0, abs=1e-5)
        return
    assert [reward["function"] for reward in written["rewards"]] == ["preference"]
    assert settled["rewards"] == ["preference"]
    assert all(-1 <= row["reward/preference/mean"] <= 1 for row in figures(result.output_dir))


def figures(run: Path) -> list[dict[str, Any]]:
    """The figures of the steps."""
    return [row for row in read(run / "metrics.jsonl") if row["step"]]


@pytest.mark.long
def test_the_preference_reward_rises_where_it_can(ray_session: None, tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets", seed=0)
    pairs = preference_pairs(make_task(0).train, 0)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    result = create_rl_trainer(
        model_name=str(assets.model),
        dataset_name=str(data),
        algorithm="grpo",
        output_dir=str(tmp_path / "run"),
        max_steps=30,
        batch_size=16,
        num_generations=8,
        learning_rate=2e-4,
        max_completion_length=8,
        overrides=[*QUIET, "rollout.engine=transformers", "policy.adam_betas=[0.9,0.99]"],
    ).train()
    rewards = [row["reward/preference/mean"] for row in figures(result.output_dir)]
    assert len(rewards) == 30
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > first + 0.05, (first, last)
