"""PPO through the one controller: it learns, it resumes as if nothing had been, it loses no critic.

And the KL in the reward of an algorithm without a critic, which is prepared in the same way.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aligntune.online.ledger import audit
from tests.e2e.conftest import Run, read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIGURES = {
    "kl/reference",
    "kl/update",
    "kl/rollout_vs_policy",
    "loss/policy",
    "loss/value",
    "policy/clip_fraction",
    "policy/entropy",
    "policy/grad_norm",
    "policy/learning_rate",
    "critic/grad_norm",
    "critic/learning_rate",
    "ppo/beta",
    "ppo/explained_variance",
    "ppo/return_mean",
    "ppo/value_clip_fraction",
    "time/prepare",
    "time/update",
}


@pytest.fixture
def ppo(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` for PPO at one completion a prompt and its four epochs, in two mini-batches each."""
    tree["algorithm"] = {"name": "tests.e2e.algorithms:PPOOnFunctions"}
    tree["train"] = {"steps": 4, "groups_per_step": 8, "groups_per_minibatch": 4, "seed": 1}
    tree["policy"] = {"learning_rate": 2e-3}
    tree["critic"] = {"learning_rate": 3e-3}
    return tree


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without those that measure time."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "rollout/"))}
        for row in read(run_dir / "metrics.jsonl")
    ]


def critic_state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The critic's trained weights in a checkpoint."""
    path = run_dir / "checkpoints" / f"step-{step:06d}" / "critic" / "rank-0.pt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return state


def test_ppo_learns_an_easy_reward_and_says_how(
    ppo: dict[str, Any], launch: Callable[..., Run]
) -> None:
    ppo["algorithm"] |= {"kl_target": 0.5, "kl_horizon": 500}
    ppo["train"] |= {"steps": 15, "groups_per_step": 32, "groups_per_minibatch": 16}
    ppo["checkpoint"]["every_steps"] = 15
    run = launch()
    assert run.finish() == 0, run.output()
    rows = figures(run.output_dir)
    assert len(rows) == 15
    assert not FIGURES - set(read(run.output_dir / "metrics.jsonl")[-1])
    before, after = ([row["reward/mean"] for row in part] for part in (rows[:3], rows[-3:]))
    assert fmean(after) > fmean(before) + 0.2
    explained = [row["ppo/explained_variance"] for row in rows]
    assert explained[0] == pytest.approx(0.0, abs=1e-9), "a new critic says 0 everywhere"
    assert max(explained) > 0.05
    betas = [row["ppo/beta"] for row in rows]
    assert betas[0] == 0.05
    assert betas[1] < betas[0], "the KL starts below its target"
    started = {event["role"] for event in run.events("role_started")}
    assert {"policy-0", "critic-0"} <= started
    assert audit(run.output_dir / "ledger.jsonl").balanced


@pytest.mark.long
def test_a_killed_ppo_run_resumes_bit_for_bit(
    ppo: dict[str, Any], tmp_path: Path, launch: Callable[..., Run]
) -> None:
    ppo["algorithm"] |= {"kl_target": 0.5, "kl_horizon": 500}
    whole = launch()
    assert whole.finish() == 0, whole.output()

    ppo["output_dir"] = str(tmp_path / "killed")
    run = launch()
    run.wait_for(lambda: len(read(run.output_dir / "metrics.jsonl")) >= 2, 240)
    run.kill_group(signal.SIGKILL)
    run.finish()
    run = launch()
    assert run.finish() == 0, run.output()

    assert len(run.events("resumed")) == 1
    first, second = whole.output_dir, run.output_dir
    assert figures(first) == figures(second)
    for name, (wanted, got) in {
        "policy": [load_file(d / "model" / "model.safetensors") for d in (first, second)],
        "critic": [critic_state(d, 4) for d in (first, second)],
    }.items():
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[key], got[key]) for key in wanted), name
    assert critic_state(first, 4)["model.score.weight"].any()


@pytest.mark.long
def test_a_lost_critic_takes_the_policy_back_with_it(
    ppo: dict[str, Any], launch: Callable[..., Run]
) -> None:
    ppo["train"]["steps"] = 12
    ppo["checkpoint"]["every_steps"] = 3
    run = launch()
    run.wait_for(lambda: len(read(run.output_dir / "metrics.jsonl")) >= 4, 240)
    victim = next(e for e in run.events("role_started") if e["role"] == "critic-0")
    os.kill(victim["pid"], signal.SIGKILL)
    assert run.finish() == 0, run.output()
    (rebuilt,) = run.events("policy_rebuilt")
    assert rebuilt["to_version"] % 3 == 0
    assert rebuilt["to_version"] >= 3
    assert [row["step"] for row in figures(run.output_dir)] == list(range(1, 13))
    books = audit(run.output_dir / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (96, 0, True)


@pytest.mark.long
def test_a_group_algorithm_charges_its_kl_in_the_reward(
    tree: dict[str, Any], launch: Callable[..., Run]
) -> None:
    tree["algorithm"] = {"name": "grpo", "kl_in": "reward", "beta": 0.1}
    tree["train"] |= {"epochs_per_batch": 2, "groups_per_minibatch": 2}
    run = launch()
    assert run.finish() == 0, run.output()
    rows = figures(run.output_dir)
    assert rows[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl/reference"] > 1e-4
    assert "loss/value" not in rows[-1]
    assert not (run.output_dir / "checkpoints" / "step-000004" / "critic").exists()
