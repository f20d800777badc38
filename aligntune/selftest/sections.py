"""What the self-test measures on a GPU, one section a process; the figures are JSON, last line.

    python -m aligntune.selftest.sections SECTION FOLDER

A section that raises or hangs costs itself alone. Nothing is judged here: see judge.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.messages import GroupTensors, Sampling
from actors.models.logprobs import rows_of
from aligntune.selftest.work import (
    LARGE,
    SMALL,
    flops_of,
    group_of,
    job_of,
    make_model,
    ragged,
    sampled_group,
    started,
)

Figures = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU only where tests try a section
BUDGET = 16_384  # tokens of a micro-batch


def ready() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of `work`, by the clock, after two calls that do not count."""
    work()
    work()
    ready()
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        ready()
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def ceilings(folder: Path, size: int = 8192, copied: int = 2**31) -> Figures:
    """What the card gives: TFLOP/s of a bfloat16 product of random matrices, GB/s of a copy (read
    and write counted)."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = seconds(lambda: a @ b, 15)
    source = torch.randint(0, 255, (copied,), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    moved = seconds(lambda: target.copy_(source), 15)
    card = torch.cuda.get_device_properties(0) if DEVICE == "cuda" else None
    return {
        "tflops": 2 * size**3 / product / 1e12,
        "copy_gb_s": 2 * copied / moved / 1e9,
        "card": card.name if card else "CPU",
        "gib": card.total_memory / 2**30 if card else 0,
        "torch": torch.__version__,
    }


def engine_of(name: str, folder: Path) -> Any:
    """A rollout engine of the small model in bfloat16."""
    from actors.engines.specs import TransformersSpec, VLLMSpec
    from actors.specs import ModelSpec, RolloutSpec

    model = ModelSpec(name=str(folder), dtype="bfloat16")
    limits = {"max_prompt_length": 64, "max_completion_length": 128}
    if name == "vllm":
        from actors.engines.vllm import VLLMEngine

        share = VLLMSpec(gpu_memory_utilization=0.3)
        return VLLMEngine(model, RolloutSpec(engine=share, **limits), 0, 8, 0)
    from actors.engines.transformers import TransformersEngine

    return TransformersEngine(model, RolloutSpec(engine=TransformersSpec(), **limits), 0, 8, 0)


def agreement(folder: Path, engine_name: str = "transformers") -> Figures:
    """Log-probs of what an engine samples, beside those of the policy, before and after an update
    whose weights cross to the engine; and the time that these took."""
    make_model(folder, SMALL)
    rank = started(folder, learning_rate=1e-3)
    prompt = np.random.default_rng(0).integers(2, 90, 48).astype(np.int32)
    sampling = Sampling(128, 1.0)

    def gap(group: GroupTensors) -> np.ndarray:
        found: np.ndarray = rank._passes({0: group}, rows_of({0: group}), 1.0)[0]
        return np.abs(found - group.logprobs)

    async def both() -> Figures:
        engine = engine_of(engine_name, folder)
        await engine.start()
        group = sampled_group(prompt, await engine.sample(prompt, sampling, 8, "0/0"))
        before = gap(group)
        for number in (1, 2, 3):
            rank.update(job_of([group], number, budget=128))
        began = time.perf_counter()
        size, bundle = rank.export_weights(1)
        packed = time.perf_counter() - began
        stale = gap(group)
        began = time.perf_counter()
        await engine.load_weights(bundle)
        loaded = time.perf_counter() - began
        after = gap(sampled_group(prompt, await engine.sample(prompt, sampling, 8, "0/1")))
        version = engine.version
        await engine.close()
        return {
            "engine": engine_name,
            "tokens": len(before),
            "mean": float(before.mean()),
            "largest": float(before.max()),
            "stale_mean": float(stale.mean()),
            "after_mean": float(after.mean()),
            "version": version,
            "weights_mb": size / 1e6,
            "pack_s": packed,
            "load_s": loaded,
        }

    return asyncio.run(both())


def agreement_vllm(folder: Path) -> Figures:
    """As `agreement`, of vLLM."""
    return agreement(folder, "vllm")


def update(
    folder: Path, sizes: dict[str, int] | None = None, rows: int = 64, longest: int = 3072
) -> Figures:
    """Tokens a second of a policy update and what it keeps in memory, beside the plan's figure."""
    from aligntune.online.work import kept_of
    from cluster.plan.memory import GPU_FRAMEWORK, trained_memory
    from cluster.plan.shapes import from_folder
    from cluster.plan.work import Trained

    chosen = LARGE if sizes is None else sizes
    make_model(folder, chosen, spread=0.02)
    budget = min(BUDGET, 4 * longest)
    rank = started(folder, tokens_per_microbatch=budget)
    lengths = ragged(rows, longest // 4, longest - 128)
    groups = [
        group_of(index, 128, lengths[8 * index : 8 * index + 8], chosen["vocabulary"])
        for index in range(rows // 8)
    ]
    model = rank._strategy.model
    parameters = sum(p.numel() for p in model.parameters())
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    took, own = [], 0.0
    for step in (1, 2, 3):
        ready()
        began = time.perf_counter()
        own = rank.update(job_of(groups, step)).metrics["policy/grad_norm"]
        ready()
        took.append(time.perf_counter() - began)
    tokens = [128 + length for length in lengths]
    work = Trained(
        "policy",
        from_folder(folder, "measured"),
        1,
        kept=kept_of(rank._spec.strategy),
        dtype_bytes=2,
        tokens=budget,
        longest=longest,
        head_rows=model.tokens_per_chunk,
    )
    planned = trained_memory(work, on_gpu=True)
    return {
        "parameters": parameters,
        "tokens": sum(tokens),
        "seconds": min(took[1:]),
        "first_s": took[0],
        "tokens_s": sum(tokens) / min(took[1:]),
        "tflops": flops_of(parameters, chosen["layers"], chosen["hidden"], tokens)
        / min(took[1:])
        / 1e12,
        "grad_norm": own,
        "attention": rank._attention,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0,
        "planned_gib": (planned.peak - GPU_FRAMEWORK) / 2**30,
        "planned": {kind: round(v / 2**30, 3) for kind, v in planned.device.items()},
    }


def step(folder: Path, strategy: str = "torch", dtype: str = "bfloat16") -> Figures:
    """One GRPO step: loss, gradient norm, and where the weights went."""
    make_model(folder, SMALL)
    rank = started(folder, dtype, strategy={"name": strategy}, tokens_per_microbatch=2048)
    groups = [group_of(i, 40, ragged(8, 160, 400, i), SMALL["vocabulary"]) for i in range(4)]
    metrics = rank.update(job_of(groups)).metrics
    again = rank.update(job_of(groups, 2)).metrics
    bundle = rank.export_weights(2)[1]
    sums = {name: float(tensor.double().sum()) for name, tensor in bundle.items()}
    found = {
        "strategy": strategy,
        "device": str(rank._strategy.device),
        "attention": rank._attention,
        "loss": metrics["loss/total"],
        "grad_norm": metrics["policy/grad_norm"],
        "second_grad_norm": again["policy/grad_norm"],
        "weights": len(sums),
        "finite": bool(np.isfinite(list(sums.values())).all()),
    }
    rank.close()
    return found


def step_torch(folder: Path) -> Figures:
    """One process, plain PyTorch."""
    return step(folder, "torch")


def step_fsdp(folder: Path) -> Figures:
    """FSDP2 over NCCL, on one rank."""
    return step(folder, "fsdp")


def step_deepspeed(folder: Path) -> Figures:
    """DeepSpeed ZeRO 2 over NCCL, on one rank."""
    return step(folder, "deepspeed")


def run(folder: Path) -> Figures:
    """Two steps of the quickstart in bfloat16 through Ray, on the GPU."""
    from aligntune.quickstart.run import run_quickstart

    began = time.perf_counter()
    overrides = ["train.steps=2", "model.dtype=bfloat16"]
    result = run_quickstart("grpo", folder / "quickstart", overrides=overrides)
    return {"seconds": time.perf_counter() - began, "engine": result["engine"]}


SECTIONS: dict[str, Callable[[Path], Figures]] = {
    made.__name__: made
    for made in (
        ceilings,
        agreement,
        agreement_vllm,
        update,
        step_torch,
        step_fsdp,
        step_deepspeed,
        run,
    )
}


if __name__ == "__main__":
    print(json.dumps(SECTIONS[sys.argv[1]](Path(sys.argv[2]))), flush=True)
