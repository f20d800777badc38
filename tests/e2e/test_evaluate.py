"""`aligntune evaluate` and `compare` of a real run, under Ray and with vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aligntune.evaluation.store import read_rows, read_summary
from tests.e2e.conftest import read

REWARD = "eval/reward/mean"


def call(folder: Path, *arguments: str) -> str:
    line = [sys.executable, "-m", "aligntune.cli", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_with_vllm_is_evaluated_as_it_evaluated_itself_and_so_is_a_job_over_a_table(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(16)]
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.0},
        "model": {"name": str(tiny_model)},
        "data": {"path": "sums.jsonl", "split": "train[:8]", "eval_split": "train[8:]"},
        "rewards": [{"function": "length", "options": {"target": 3}}],
        "output_dir": "run",
        "train": {"steps": 2, "groups_per_step": 2, "completions_per_group": 2},
        "rollout": {"engine": "vllm", "max_completion_length": 6, "max_prompt_length": 16},
        "eval": {"every_steps": 2},
        "policy": {"learning_rate": 1e-2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    call(tmp_path, "train", "run.yaml")
    run = tmp_path / "run"
    before, after = read(run / "evals.jsonl")

    call(tmp_path, "evaluate", "run", "--samples", "2")
    ended = read_summary(run / "evaluations" / "export-000002")
    assert ended.decodings["greedy"].figures["reward"].value == pytest.approx(after[REWARD])
    kept = read_rows(run / "evaluations" / "export-000002")
    assert [(row["decoding"], len(row["completions"])) for row in kept] == [
        *[("greedy", 1)] * 8,
        *[("sampled", 2)] * 8,
    ]

    # A job over a table that has written the starting model.
    job = tmp_path / "sft"
    job.mkdir()
    (job / "config.yaml").write_text(f"algorithm: sft\nmodel: {{name: {tiny_model}}}\n")
    (job / "metrics.jsonl").write_text('{"step": 1}\n')
    (job / "events.jsonl").write_text('{"kind": "run_finished", "step": 1}\n')
    shutil.copytree(tiny_model, job / "model")
    call(tmp_path, "evaluate", "sft", "--config", "run.yaml")
    began = read_summary(job / "evaluations" / "export-000001")
    assert began.decodings["greedy"].figures["reward"].value == pytest.approx(before[REWARD])

    found = json.loads(call(tmp_path, "compare", "sft", "run", "--json"))
    assert found["prompts"] == 8


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_the_model_of_a_dpo_job_writes_is_scored_by_the_config_of_a_run_that_samples(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2), "answer": str(i + 1)}
        for i in range(16)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    job = {
        "algorithm": "dpo",
        "model": {"name": str(tiny_model)},
        "data": {"path": "sums.jsonl", "max_length": 32},
        "output_dir": "dpo",
        "train": {"steps": 2, "pairs_per_worker": 4},
    }
    online = {
        "algorithm": "grpo",
        "model": {"name": "of/another-run"},
        "data": {"path": "sums.jsonl", "eval_split": "train[8:]"},
        "rewards": ["exact_match"],
        "output_dir": "online",
        "rollout": {"engine": "transformers", "max_completion_length": 6, "max_prompt_length": 16},
    }
    for name, tree in {"dpo": job, "online": online}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    call(tmp_path, "train", "dpo.yaml")
    said = call(tmp_path, "evaluate", "dpo", "--config", "online.yaml")
    model = str(tmp_path / "dpo" / "model")
    assert said.startswith(f"export-000002: {model} (export, step 2), 8 prompts")
    kept = tmp_path / "dpo" / "evaluations" / "export-000002"
    assert (read_summary(kept).model, read_summary(kept).step) == (model, 2)
    assert [(row["source"], len(row["completions"])) for row in read_rows(kept)] == [
        (row["prompt"], 1) for row in rows[8:]
    ]
    assert not (tmp_path / "online").exists()
