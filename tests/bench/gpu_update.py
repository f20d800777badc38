"""A policy update on one GPU: tokens/s, MFU and memory of each choice, and where the time goes.

Qwen2.5 shapes of random weights in bfloat16, ragged rows, one GRPO step a time. The choices are
padding or packing, a chunked head or whole logits, checkpointing or none; each is a process of its
own, so that a peak is its own. MFU is of a bfloat16 product measured in the same call.

    python -m tests.bench gpu_update        also as: make bench NAME=gpu_update
    python -m tests.bench.gpu_update CASE SIZE FOLDER [profile]     one case, JSON on the last line
    python -m tests.bench.gpu_update attention              one layer's attention, by each way
    python -m tests.bench.gpu_update shared RATIO           a group's prompt once, or repeated
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tests.bench.report import REPOSITORY, Measured, Target

NAMES = ("hidden", "layers", "mlp", "heads", "kv_heads", "vocabulary")
SIZES: dict[str, dict[str, int]] = {
    size: dict(zip(NAMES, numbers, strict=True))
    for size, numbers in {
        "tiny": (64, 2, 96, 4, 2, 512),
        "0.5B": (896, 24, 4864, 14, 2, 151_936),
        "1.5B": (1536, 28, 8960, 12, 2, 151_936),
        "3B": (2048, 36, 11008, 16, 2, 151_936),
    }.items()
}
PROMPT, ROWS, LONGEST, BUDGET = 256, 32, 3840, 8192
CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "dense": {"packing": True, "dense": True},  # packed under SDPA's mask, as it was
    "masked": {"packing": False, "masked": True},  # padded under a dense mask, as it was
    "whole_logits": {"tokens_per_chunk": BUDGET},
    "checkpointing": {"checkpointing": True},
}
LIMIT_S = 300


def small() -> dict[str, Any]:
    """Where there is no GPU only the tiny model runs, to see that the code does."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {"rows": ROWS, "longest": LONGEST} if on_gpu else {"rows": 16, "longest": 96}


def one(case: str, size: str, folder: str, profiled: bool = False) -> dict[str, Any]:
    """The figures of one case."""
    import torch

    from aligntune.selftest import work
    from aligntune.selftest.sections import ready

    chosen, limits = SIZES[size], small()
    path = Path(folder) / size
    if not (path / "config.json").is_file():
        work.make_model(path, chosen, spread=0.02)
    options = dict(CASES[case])
    dense, masked = options.pop("dense", False), options.pop("masked", False)
    model = {"gradient_checkpointing": options.pop("checkpointing", False)}
    with_mask(dense, masked)
    rank = work.started(path, model=model, tokens_per_microbatch=BUDGET, **options)
    lengths = work.ragged(limits["rows"], limits["longest"] // 3, limits["longest"])
    prompt = min(PROMPT, limits["longest"] // 4)
    groups = [
        work.group_of(index, prompt, lengths[8 * index : 8 * index + 8], chosen["vocabulary"])
        for index in range(limits["rows"] // 8)
    ]
    rows = [prompt + length for length in lengths]
    on_gpu = torch.cuda.is_available()
    took = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    figures: dict[str, float] = {}
    for step in range(1, 5):
        ready()
        began = time.perf_counter()
        figures = rank.update(work.job_of(groups, step)).metrics
        ready()
        took.append(time.perf_counter() - began)
    parameters = sum(p.numel() for p in rank._strategy.model.parameters())
    best = min(took[1:])
    found = {
        "attention": rank._attention,
        "tokens": sum(rows),
        "seconds": best,
        "first_s": took[0],
        "tokens_s": sum(rows) / best,
        "tflops": work.flops_of(parameters, chosen["layers"], chosen["hidden"], rows) / best / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "loss": figures["loss/total"],
        "grad_norm": figures["policy/grad_norm"],
    }
    if profiled:
        found |= profile(lambda: rank.update(work.job_of(groups, 5)))
    return found


def with_mask(dense: bool, masked: bool) -> None:
    """Have attention be as it was before there was any by variable length, to compare with."""
    import actors.models.logprobs as logprobs
    import actors.ranks as ranks

    if masked:
        logprobs.causal_alone = lambda model: False  # type: ignore[assignment]
    if dense:
        ranks.settle = lambda *given: (True, "packed rows, sdpa with a dense mask")


def profile(work: Any) -> dict[str, Any]:
    """Where one update's time goes: seconds on the GPU by kernel, and of the host's waits."""
    import torch
    from torch.profiler import ProfilerActivity

    from aligntune.selftest.sections import ready

    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        work()
        ready()
    events = seen.key_averages()
    on_gpu = sorted(events, key=lambda e: -e.self_device_time_total)
    on_cpu = sorted(events, key=lambda e: -e.self_cpu_time_total)

    def top(rows: Sequence[Any], key: str, count: int) -> list[list[Any]]:
        return [[e.key[:90], round(getattr(e, key) / 1e6, 4), e.count] for e in rows[:count]]

    return {
        "kernels": top(on_gpu, "self_device_time_total", 40),
        "host": top(on_cpu, "self_cpu_time_total", 20),
        "gpu_s": sum(e.self_device_time_total for e in events) / 1e6,
    }


def ceilings() -> dict[str, Any]:
    """What the card gives."""
    from aligntune.selftest.sections import ceilings

    return ceilings(Path("."))


def attention_alone(sizes: dict[str, int] | None = None) -> dict[str, float]:
    """Seconds of one layer's attention, forwards and backwards, over a pack of ragged rows of
    `BUDGET` tokens: by variable length, row by row, and under a dense mask; and what sharing a
    group's prompt gives, for prompts of 0.25, 1 and 4 completions."""
    import torch

    from actors.models.attention import attend
    from aligntune.selftest.sections import seconds
    from aligntune.selftest.work import ragged

    chosen = sizes or SIZES["1.5B"]
    heads, kv = chosen["heads"], chosen["kv_heads"]
    width = chosen["hidden"] // heads
    device = "cuda"
    lengths = []
    for length in ragged(200, LONGEST // 3, LONGEST):
        if sum(lengths) + length > BUDGET:
            break
        lengths.append(length)
    total = sum(lengths)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    def given(dtype: Any) -> list[torch.Tensor]:
        return [
            torch.randn(1, h, total, width, device=device, dtype=dtype, requires_grad=True)
            for h in (heads, kv, kv)
        ]

    found: dict[str, float] = {"tokens": total, "rows": len(lengths)}
    low = given(torch.bfloat16)

    def by_length() -> None:
        out, _ = attend(None, *low, None, cu_seq_lens_q=ends, max_length_q=max(lengths))
        out.sum().backward()

    found["varlen_ms"] = 1e3 * seconds(by_length, 10)
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )
    mask = (document[:, None] == document[None]).tril()[None, None]

    def dense() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            low[0],
            low[1].repeat_interleave(heads // kv, 1),
            low[2].repeat_interleave(heads // kv, 1),
            attn_mask=mask,
        ).sum().backward()

    found["dense_ms"] = 1e3 * seconds(dense, 5)

    def rows() -> None:
        from actors.models.attention import _row_by_row

        _row_by_row(*low, ends, None, None).sum().backward()

    found["row_by_row_ms"] = 1e3 * seconds(rows, 5)
    return found | {"gain": found["dense_ms"] / found["varlen_ms"]}


def shared_prompts(ratio: float, group: int = 8, tokens: int = 512) -> dict[str, float]:
    """A group's attention and linear work with its prompt once against `group` times: the largest
    difference of the answers in float32, and seconds of each in bfloat16, of one layer.

    The pack is the prompt, then the completions; a completion sees the prompt and itself.
    """
    import torch

    from actors.models.attention import Pieces, attend
    from aligntune.selftest.sections import seconds

    device, heads, kv, width = "cuda", 12, 2, 128
    prompt = int(ratio * tokens)
    pieces = Pieces((prompt,) + (tokens,) * group, (None,) + (0,) * group)
    total = sum(pieces.lengths)
    own = torch.tensor([0, *accumulate(pieces.lengths)], device=device, dtype=torch.int32)
    seen = torch.tensor([0, *accumulate(pieces.seen)], device=device, dtype=torch.int32)
    row = prompt + tokens
    ends = torch.arange(0, (group + 1) * row, row, device=device, dtype=torch.int32)

    def drawn(dtype: Any) -> list[Any]:
        torch.manual_seed(0)
        return [
            torch.randn(1, h, total, width, device=device).to(dtype).requires_grad_()
            for h in (heads, kv, kv)
        ]

    def repeated(parts: list[Any]) -> list[Any]:
        """Each completion after a prompt of its own."""
        return [
            torch.cat(
                [
                    piece
                    for index in range(group)
                    for piece in (
                        part[:, :, :prompt],
                        part[:, :, prompt + index * tokens : prompt + (index + 1) * tokens],
                    )
                ],
                dim=2,
            )
            .detach()
            .requires_grad_()
            for part in parts
        ]

    def shared(parts: list[Any]) -> Any:
        return attend(
            None,
            *parts,
            None,
            cu_seq_lens_q=own,
            cu_seq_lens_k=seen,
            max_length_q=row,
            pieces=pieces,
        )[0]

    def apart(parts: list[Any]) -> Any:
        return attend(None, *parts, None, cu_seq_lens_q=ends, max_length_q=row)[0]

    exact = drawn(torch.float32)
    one = shared(exact)[0][prompt:].reshape(group, tokens, heads, width)
    each = apart(repeated(exact))[0].reshape(group, row, heads, width)[:, prompt:]
    low = drawn(torch.bfloat16)
    many = repeated(low)
    linear = torch.randn(1536, 8960 * 3, device=device, dtype=torch.bfloat16, requires_grad=True)

    def layer(attention: Any, parts: list[Any]) -> None:
        attention(parts).sum().backward()
        work = torch.empty(parts[0].shape[2], 1536, device=device, dtype=torch.bfloat16)
        (work.normal_() @ linear).sum().backward()

    once = seconds(lambda: layer(shared, low), 8)
    times = seconds(lambda: layer(apart, many), 8)
    return {
        "tokens_once": total,
        "tokens_repeated": group * row,
        "difference": float((one - each).abs().max()),
        "attention_shared_ms": 1e3 * seconds(lambda: shared(low).sum().backward(), 8),
        "attention_repeated_ms": 1e3 * seconds(lambda: apart(many).sum().backward(), 8),
        "layer_shared_ms": 1e3 * once,
        "layer_repeated_ms": 1e3 * times,
        "gain": times / once,
    }


def launch(*arguments: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """One case in a process of its own; {"error": why} where there is none."""
    command = [sys.executable, "-m", "tests.bench.gpu_update", *arguments]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit_s:g} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": " | ".join(said[-4:])[-800:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure() -> Measured:
    """Every case of the 1.5B shape; packing and padding of the others."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_update: skipped, no GPU that torch can use")
    figures: dict[str, float] = {}
    details: dict[str, Any] = {"ceilings": launch("ceilings")}
    top = details["ceilings"].get("tflops", math.nan)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=os.environ.get("TMPDIR")) as folder:
        for size, cases in {"1.5B": tuple(CASES), "0.5B": ("packed", "padded")}.items():
            for case in cases:
                found = launch(case, size, folder)
                details[f"{size}/{case}"] = found
                if "error" in found:
                    continue
                name = f"{size}/{case}"
                figures |= {
                    f"{name}/tokens_s": found["tokens_s"],
                    f"{name}/mfu": found["tflops"] / top,
                    f"{name}/product_over_update": top / found["tflops"],
                    f"{name}/peak_gib": found["peak_gib"],
                }
    figures["matmul_tflops"] = top
    targets = (Target("1.5B/packed/product_over_update", 2.5),)
    return Measured(figures, targets, details)


def main(arguments: Sequence[str]) -> None:
    """One case, by name."""
    case, *rest = arguments
    if case == "ceilings":
        found = ceilings()
    elif case == "attention":
        found = attention_alone()
    elif case == "shared":
        found = shared_prompts(float(rest[0]))
    else:
        found = one(case, rest[0], rest[1], profiled="profile" in rest)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
