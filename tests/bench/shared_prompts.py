"""A policy update whose micro-batches hold each group's prompt once, over one that repeats it.

Two groups of 8 completions of 128 tokens in the mean (lognormal, sigma 0.5), prompts of 0.25, 1 and
4 times that, one optimiser step in float32 on one thread, micro-batches of at most 2,048 tokens.
The ways take turns; figures are medians of processor seconds. `tokens` are those that the model
reads, padding too.

    python -m tests.bench shared_prompts           also as: make bench NAME=shared_prompts
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.report import Measured, Target

SIZES = {"hidden": 128, "layers": 2, "mlp": 384, "heads": 4, "kv_heads": 2, "vocabulary": 512}
GROUPS, GROUP, TOKENS, BUDGET = 2, 8, 128, 2048
RATIOS = (0.25, 1.0, 4.0)
ROUNDS = 5
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "packed": {"packing": True},
    "shared": {"shared_prompts": True},
}


def lengths(seed: int) -> list[int]:
    """The completions of a group, in tokens."""
    draw = random.Random(seed)
    return [1 + int(TOKENS * draw.lognormvariate(-0.125, 0.5)) for _ in range(GROUP)]


def measure() -> Measured:
    """Processor seconds of an update by each way, and what sharing gains over padded rows."""
    import torch

    from aligntune.selftest import work

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-shared-") as folder:
        work.make_model(Path(folder), SIZES)
        ranks = {
            way: work.started(Path(folder), "float32", tokens_per_microbatch=BUDGET, **options)
            for way, options in WAYS.items()
        }
        for ratio in RATIOS:
            groups = [
                work.group_of(index, int(ratio * TOKENS), lengths(index), SIZES["vocabulary"])
                for index in range(GROUPS)
            ]
            took: dict[str, list[float]] = {way: [] for way in WAYS}
            read = dict.fromkeys(WAYS, 0)
            for step in range(1, ROUNDS + 2):  # the first warms up
                for way, rank in ranks.items():
                    began = time.process_time()
                    rank.update(work.job_of(groups, step))
                    took[way].append(time.process_time() - began)
            for way, rank in ranks.items():
                read[way] = tokens_read(rank, work.job_of(groups, 1))
                figures[f"{way}_{ratio:g}_s"] = statistics.median(took[way][1:])
                figures[f"{way}_{ratio:g}_tokens"] = read[way]
            for way in ("padded", "packed"):
                own = figures[f"shared_{ratio:g}_s"]
                figures[f"gain_over_{way}_{ratio:g}"] = figures[f"{way}_{ratio:g}_s"] / own
    torch.set_num_threads(threads)
    targets = [Target(f"gain_over_padded_{ratio:g}", 1.0, least=True) for ratio in RATIOS]
    return Measured(figures, tuple(targets))


def tokens_read(rank: Any, job: Any) -> int:
    """Tokens of the micro-batches of an update, padding too."""
    from actors.models.inputs import collate_rows

    groups = rank._fetch(job.groups)
    tensors = {index: group.tensors for index, group in groups.items()}
    batches = [batch for part in rank._plan(job, groups) for batch in part.batches]
    inputs = [collate_rows(tensors, batch, rank._packing, rank._shared) for batch in batches]
    return sum(part.input_ids.numel() for part in inputs)
