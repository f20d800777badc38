"""Work of a run, as the tests of plans take it."""

from __future__ import annotations

from typing import Any

from actors.strategies.specs import DeepSpeedSpec, StrategySpec, TorchSpec
from aligntune.online.work import kept_of, others_of
from cluster.bundles import RoleRequest
from cluster.gpus import gpu_type
from cluster.plan.shapes import from_table
from cluster.plan.work import Frozen, Rollout, Step, Trained, Work

SMALL, LARGE = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"
H100 = gpu_type("h100-80gb")


def keeping(strategy: StrategySpec) -> dict[str, Any]:
    """What `Trained` says of a strategy."""
    return {
        "kept": kept_of(strategy),
        "others": others_of(strategy),
        "several": strategy.several,
    }


def zero(stage: int, offload: bool = False) -> dict[str, Any]:
    """Of ZeRO."""
    return keeping(DeepSpeedSpec(stage=stage, offload=offload))  # type: ignore[arg-type]


def work_of(model: str = SMALL, ranks: int = 1, replicas: int = 1, gpus: float = 1.0) -> Work:
    """A run of equal parts on GPUs (or without): policy, rollouts, a reference."""
    shape = from_table(model)
    step = Step(32, 8, 512, 1024, passes=1, updates=1, max_staleness=0)
    kept = keeping(TorchSpec() if ranks == 1 else DeepSpeedSpec())
    return Work(
        step,
        Trained(
            "policy",
            shape,
            ranks,
            dtype_bytes=2,
            tokens=15360,
            longest=1536,
            checkpointing=True,
            head_rows=1024,
            **kept,
        ),
        Rollout(shape, replicas, "vllm", 2, 32),
        (
            RoleRequest("policy", ranks, 1, gpus),
            RoleRequest("rollout", replicas, 1, gpus),
            RoleRequest("reward", 1, 0.5),
            RoleRequest("reference", 1, 1, gpus),
        ),
        frozen=(Frozen("reference", shape, 1, 2, 12288, 1024),),
    )
