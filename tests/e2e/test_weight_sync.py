"""Real runs by each way of sending weights: what the engine samples with is the policy, exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligntune.trainers import create_rl_trainer
from tests.e2e.conftest import read

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

STEPS, HELD_OUT = 3, 8


def trained(tree: dict[str, Any], folder: Path, sync: str) -> Path:
    """The folder of a run of a few large steps."""
    tree = copy.deepcopy(tree)
    tree["output_dir"] = str(folder)
    tree["rollout"]["weight_sync"] = sync
    tree["train"] |= {"steps": STEPS, "max_staleness": 0, "groups_per_minibatch": 2}
    tree["policy"]["learning_rate"] = 1e-2
    tree["data"] |= {"split": f"train[{HELD_OUT}:]", "eval_split": f"train[:{HELD_OUT}]"}
    return create_rl_trainer(config=tree).train().output_dir


def figures(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and what was sent."""
    other = ("time/", "throughput/", "rollout/", "weights/")
    return [
        {name: value for name, value in row.items() if not name.startswith(other)}
        for row in read(run / "metrics.jsonl")
    ]


def greedy(run: Path, prompts: list[str], tokens: int) -> list[str]:
    """What the exported model says, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    said = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1] :]
        said.append(tokenizer.decode(out).removesuffix(tokenizer.eos_token))
    return said


def test_changes_alone_make_the_run_that_whole_versions_make_bit_for_bit(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    full, delta = (trained(tree, tmp_path / sync, sync) for sync in ("full", "delta"))
    assert len(figures(full)) == STEPS
    assert figures(delta) == figures(full)
    answers, weights = "eval_samples.jsonl", Path("model") / "model.safetensors"
    assert read(delta / answers) == read(full / answers)
    assert (delta / weights).read_bytes() == (full / weights).read_bytes()
    sent = [row["weights/sent_fraction"] for row in read(delta / "metrics.jsonl")[1:]]
    assert all(0 < share <= 1 for share in sent)


@pytest.mark.parametrize("sync", ["delta", "adapter"])
def test_vllm_samples_with_the_policy_that_was_sent(
    tree: dict[str, Any], tmp_path: Path, sync: str
) -> None:
    """Its log-probs are the policy's at every step, and its answers at temperature 0 are those of
    the model that the run exports."""
    pytest.importorskip("vllm")
    tree["rollout"]["engine"] = {"name": "vllm", "kv_cache_gib": 0.25}
    if sync == "adapter":
        tree["model"]["lora"] = {"r": 4, "alpha": 8.0}
    run = trained(tree, tmp_path / sync, sync)

    rows = read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    apart = [row["kl/rollout_vs_policy"] for row in rows]
    moved = [row["kl/update"] for row in rows]  # by the first half of each update
    assert max(map(abs, apart)) < 1e-8, apart
    assert min(moved) > 1e-6, f"nothing could be seen of what was sent: {moved}"
    rows = [row for row in read(run / "eval_samples.jsonl") if row["step"] == STEPS]
    assert len(rows) == HELD_OUT
    tokens = tree["rollout"]["max_completion_length"]
    answers = [row["completions"][0]["text"] for row in rows]
    assert answers == greedy(run, [row["prompt"] for row in rows], tokens)
