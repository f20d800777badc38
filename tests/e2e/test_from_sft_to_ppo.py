"""The whole way by commands alone, from a folder of the user's: supervised warm-up, a reward model
of what it left, and PPO of the same under that reward model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aligntune.runs.jsonl import read_lines
from tests.stand_ins import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

COMMON = "train.steps=2 tracking.trackers=[]"
COMMANDS = (
    "--algorithm sft --model models/qwen --dataset chats.jsonl train.pairs_per_worker=4 "
    f"--out runs/sft {COMMON}",
    "--algorithm reward_model --model runs/sft/model --dataset pairs.jsonl "
    f"train.pairs_per_worker=4 --out runs/reward {COMMON}",
    "--algorithm ppo --model runs/sft/model --reward-model runs/reward/model "
    "--dataset pairs.jsonl --out runs/ppo rollout.engine=transformers "
    f"rollout.max_completion_length=4 train.groups_per_step=4 {COMMON}",
)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The user's folder: a model and data, by relative names."""
    place = tmp_path / "called-in"
    (place / "models").mkdir(parents=True)
    (place / "models/qwen").symlink_to(tiny_model, target_is_directory=True)
    pairs = [{"prompt": f"{i}+1", "chosen": f"{i + 1}", "rejected": "7a"} for i in range(16)]
    chats = [
        {
            "conversations": [
                {"from": "human", "value": pair["prompt"]},
                {"from": "gpt", "value": pair["chosen"]},
            ]
        }
        for pair in pairs
    ]
    for name, rows in (("pairs", pairs), ("chats", chats)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def go(folder: Path, address: str | None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("RAY_ADDRESS", None)
    if address is not None:
        environment["RAY_ADDRESS"] = address
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "aligntune", "train", *command.split()],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        sys.stdout.write(done.stdout)
    for name in ("sft", "reward", "ppo"):
        run = folder / "runs" / name
        assert [row["step"] for row in read_lines(run / "metrics.jsonl")][-1] == 2
        assert (run / "model" / "model.safetensors").is_file()
    steps = read_lines(folder / "runs/ppo/metrics.jsonl")
    assert all(step["reward/mean"] != 0 for step in steps if step["step"])


def test_with_a_ray_of_the_runs_own(folder: Path) -> None:
    go(folder, None)


def test_with_a_given_head(ray_session: None, folder: Path) -> None:
    import ray

    go(folder, ray.get_runtime_context().gcs_address)
