"""Weights that go from GPU to GPU, or stay on one: the engine samples with those of the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aligntune.quickstart.run import run_quickstart
from aligntune.runs.jsonl import read_lines

STEPS = 3
SETTINGS = [
    f"train.steps={STEPS}",
    "model.dtype=bfloat16",
    "policy.learning_rate=1e-4",
    "policy.resources.gpus=1",
    "rollout.engine={name: vllm, gpu_memory_utilization: 0.3}",
    "rollout.resources.gpus=1",
]
APART = "cluster.colocate=[]"
TOGETHER = "cluster.colocate=[[policy, rollout]]"
TWO_RANKS = ["policy.strategy=fsdp", "policy.ranks=2"]
TWO_GPUS = "rollout.engine={name: vllm, tensor_parallel_size: 2}"
CASES = {  # weight_sync, the GPUs that are needed, and other settings
    "nccl to one replica": ("nccl", 2, [APART]),
    "nccl, and the next update after it": ("nccl", 2, [APART, "train.max_staleness=1"]),
    "nccl to two replicas": ("nccl", 3, [APART, "rollout.replicas=2"]),
    "nccl to a replica of two GPUs": ("nccl", 3, [APART, TWO_GPUS]),
    "nccl from two ranks": ("nccl", 3, [APART, *TWO_RANKS]),
    "ipc on one GPU": ("ipc", 1, [TOGETHER]),
    "ipc, and the next update after it": ("ipc", 1, [TOGETHER, "train.max_staleness=1"]),
    "ipc on two GPUs": ("ipc", 2, [TOGETHER, *TWO_RANKS, "rollout.replicas=2"]),
}


def apart(folder: Path, overrides: list[str]) -> list[float]:
    """How far the engine is from the policy at each step, in nats per token."""
    run_quickstart("grpo", folder, overrides=[*SETTINGS, *overrides])
    rows = list(read_lines(folder / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [abs(row["kl/rollout_vs_policy"]) for row in rows]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES)
def test_the_engine_samples_with_the_weights_that_the_ranks_send(case: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    sync, gpus, more = CASES[case]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs are needed, and there are {torch.cuda.device_count()}")
    wanted = apart(tmp_path / "full", [*more, "rollout.weight_sync=full"])
    got = apart(tmp_path / sync, [*more, f"rollout.weight_sync={sync}"])
    print(f"engine and policy are apart by {got} nats with {sync}, {wanted} with full")
    assert max(got) < 2 * max(wanted) + 1e-3
