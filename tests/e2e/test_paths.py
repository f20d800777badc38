"""Commands that are called in a folder of the user's, with relative names: the workers of Ray work
in others, of a Ray that is started for the run and of a head that was there before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aligntune.runs.jsonl import read_lines
from tests import drivers
from tests.stand_ins import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMON = "--model models/qwen train.steps=2 tracking.trackers=[] checkpoint.every_steps=1"
PAIRS = f"--dataset ./pairs.jsonl data.eval_path=held.jsonl train.pairs_per_worker=4 {COMMON}"
PROMPTS = (
    f"--dataset questions.jsonl data.eval_path=./asked.jsonl {COMMON} algorithm.beta=0.1 "
    "reference.model=./models/qwen rollout.engine=transformers rollout.max_completion_length=4 "
    "train.groups_per_step=2 train.completions_per_group=2 checkpoint.storage=kept"
)
COMMANDS = {
    "dpo": f"--algorithm dpo {PAIRS} checkpoint.storage=kept",
    "reward_model": f"--algorithm reward_model {PAIRS}",
    "sft": f"--algorithm sft data.completion_column=chosen algorithm.packing=true {PAIRS}",
    "grpo": f"--algorithm grpo --reward own:digits {PROMPTS}",
}
LONG = ("dpo", "sft", "grpo")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The user's folder: a model, data and a reward, all by relative names."""
    place = tmp_path / "called-in"
    (place / "models").mkdir(parents=True)
    (place / "models/qwen").symlink_to(tiny_model, target_is_directory=True)
    pairs = [{"prompt": f"{i}+1", "chosen": "24", "rejected": "13"} for i in range(16)]
    questions = [{"prompt": f"{10 + i}+1"} for i in range(8)]
    made = {"pairs": pairs, "held": pairs[:4], "questions": questions, "asked": questions[:4]}
    for name, rows in made.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text)
    (place / "own.py").write_text((REPOSITORY / "tests/e2e/rewards.py").read_text())
    return place


def train(folder: Path, kind: str, address: str | None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("RAY_ADDRESS", None)
    if address is not None:
        environment["RAY_ADDRESS"] = address
    line = ["-m", "aligntune", "train", *COMMANDS[kind].split(), "--out", "runs/own"]
    done = drivers.run(line, cwd=folder, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs/own"
    assert (run / "model" / "model.safetensors").is_file()
    rows = read_lines(run / "metrics.jsonl")
    if (run / "evals.jsonl").is_file():  # of an online run; a job's are among its figures
        rows += read_lines(run / "evals.jsonl")
    assert {row["step"] for row in rows} == {0, 1, 2}
    if "storage=kept" in COMMANDS[kind]:
        assert (folder / "kept/checkpoints/step-000002").is_dir()
    else:
        assert (run / "checkpoints/step-000002").is_dir()


@pytest.mark.parametrize(
    "kind",
    [
        "reward_model",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in LONG),
    ],
)
def test_relative_names_with_a_given_head(ray_session: None, folder: Path, kind: str) -> None:
    import ray

    train(folder, kind, ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize("kind", ["dpo", pytest.param("grpo", marks=pytest.mark.long)])
def test_relative_names_with_a_ray_of_the_run_s_own(folder: Path, kind: str) -> None:
    train(folder, kind, None)
