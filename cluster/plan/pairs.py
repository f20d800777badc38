"""What the workers of a preference job take where the config leaves it open. Pure.

A step has the same pairs however they are shared out: over workers, each with a whole model, and
over forward passes. Where that would make another loss of them, they stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.gpus import gpu_type
from cluster.placement import DoesNotFit
from cluster.plan.auto import HEADROOM, Decided
from cluster.plan.fit import gib
from cluster.plan.memory import FLOAT, frozen_memory, trained_memory, trained_parameters
from cluster.plan.shapes import ModelShape
from cluster.plan.work import Frozen, Kept, Trained
from cluster.resources import Cluster

SHARED_OUT = ("train.workers", "train.pairs_per_worker", "train.accumulation_steps")


@dataclass(frozen=True)
class PairWork:
    """A job as the config has it."""

    shape: ModelShape
    longest: int  # tokens of one side of a pair
    workers: int
    pairs: int  # of one forward pass of one worker
    passes: int  # forward passes of a step
    dtype_bytes: int
    checkpointing: bool
    lora_rank: int | None
    four_bit: bool
    logits: bool  # DPO; a reward model has one score a text
    reference: bool  # a second, frozen model
    sides: int = 2  # of a pair, which go through at once; 1 of what is taught
    fits: bool = True  # the memory is to be counted; not of weights that DeepSpeed shares out
    whole: bool = False  # the loss is one of all pairs of a forward pass, not a mean over them

    @property
    def bytes(self) -> int:
        """Memory of one worker's GPU at the peak of an update."""
        tokens = self.sides * self.pairs * self.longest
        rows = tokens if self.logits else 0
        trained = Trained(
            "policy",
            self.shape,
            1,
            Kept(),
            self.dtype_bytes,
            tokens,
            self.longest,
            lora_rank=self.lora_rank,
            checkpointing=self.checkpointing,
            head_rows=rows,
            plain_loss=True,
            four_bit=self.four_bit,
        )
        needed = trained_memory(trained, on_gpu=True).peak
        if self.workers > 1:  # DDP's buckets, beside the gradients that are copied into them
            needed += FLOAT * trained_parameters(trained)[0]
        if self.reference:  # in float32 like the policy, whatever they compute in
            frozen = Frozen("reference", self.shape, 1, FLOAT, tokens, rows)
            needed += frozen_memory(frozen, on_gpu=True).device["weights"]
        return needed


def choose_workers(
    work: PairWork, open_: frozenset[str], gpus: float, cluster: Cluster, cores: int
) -> tuple[Decided, ...]:
    """What is open, decided; `gpus` is what the config says of each worker.

    Raises DoesNotFit, one line, where a GPU does not hold what one worker needs.
    """
    there = sum(int(node.gpus) for node in cluster.nodes)
    open_gpus = "train.resources.gpus" in open_
    if not there or (not open_gpus and not gpus):
        return tuple(one for one in _on_cpus(work, cores) if one.path in open_)
    kinds = [gpu_type(n.gpu) for n in cluster.nodes if n.gpus >= 1 and n.gpu is not None]
    kind = min(kinds, key=lambda one: one.memory_bytes, default=None)
    if kind is None:
        if open_gpus:
            raise DoesNotFit(
                "the cluster's GPUs are of no type that is known by Ray's name of them, and "
                "nvidia-smi there did not tell their memory; set train.resources.gpus"
            )
        why = "as without a GPU, for the type of these is not known"
        return tuple(one for one in _as_it_is(work, why) if one.path in open_)
    has_bfloat16 = all(one.bfloat16 for one in kinds)
    if "model.dtype" in open_:
        work = replace(work, dtype_bytes=2 if has_bfloat16 else 4)
    ways = list(_ways(work, open_, there))
    room = [
        one for share in (HEADROOM, 1.0) for one in ways if one.bytes <= share * kind.memory_bytes
    ]
    if work.fits and not room:
        least = min(ways, key=lambda one: one.bytes)
        raise DoesNotFit(
            f"one worker needs {gib(least.bytes)} and a {kind.name} has {gib(kind.memory_bytes)}: "
            f"{gib(least.bytes - kind.memory_bytes)} short (with {least.pairs} pairs a pass); what "
            "may fit: model.lora={r: 16}, a smaller data.max_length, train.deepspeed with stage 3 "
            "on several workers, or GPUs with more memory"
        )
    chosen = room[0] if work.fits else ways[0]
    where = f"{chosen.workers} of {there} GPU ({kind.name})"
    pairs = chosen.workers * chosen.pairs * chosen.passes
    room_for = "which the loss has in one pass" if work.whole else "as the memory has room"
    steps = f"{pairs} pairs a step, {room_for}"
    dtype = _dtype(chosen)
    made = (
        Decided("model.dtype", dtype, f"{kind.name} has {'it' if has_bfloat16 else 'no bfloat16'}"),
        Decided("model.gradient_checkpointing", chosen.checkpointing, "the memory of activations"),
        Decided("train.resources.gpus", 1.0, where),
        Decided("train.workers", chosen.workers, where),
        Decided("train.pairs_per_worker", chosen.pairs, steps),
        Decided("train.accumulation_steps", chosen.passes, steps),
    )
    return tuple(one for one in made if one.path in open_)


def _dtype(work: PairWork) -> str:
    return "bfloat16" if work.dtype_bytes == 2 else "float32"


def _as_it_is(work: PairWork, why: str) -> Iterator[Decided]:
    yield Decided("model.dtype", _dtype(work), why)
    yield Decided("model.gradient_checkpointing", work.checkpointing, why)
    for key, value in zip(SHARED_OUT, (work.workers, work.pairs, work.passes), strict=True):
        yield Decided(key, value, why)


def _on_cpus(work: PairWork, cores: int) -> Iterator[Decided]:
    threads = max(1, cores // work.workers)
    yield Decided("model.dtype", "float32", "no GPU computes here")
    yield Decided("train.resources.gpus", 0.0, "no GPU")
    yield Decided("train.resources.threads", threads, "processors here")


def _ways(work: PairWork, open_: frozenset[str], gpus: int) -> Iterator[PairWork]:
    """The job shared out otherwise, the fastest first: more workers, fewer passes, no recompute."""
    fixed = (work.workers, work.pairs, work.passes)
    shared_out = [fixed]
    if open_.issuperset(SHARED_OUT) and not work.whole:
        pairs = math.prod(fixed)
        shared_out = [
            (workers, pairs // workers // passes, passes)
            for workers in range(min(gpus, pairs), 0, -1)
            for passes in range(1, pairs + 1)
            if pairs % (workers * passes) == 0
        ]
    checkpointings = [work.checkpointing]
    if "model.gradient_checkpointing" in open_:
        checkpointings = [False, True]
    for workers, pairs, passes in shared_out:
        for checkpointing in checkpointings:
            yield replace(
                work, workers=workers, pairs=pairs, passes=passes, checkpointing=checkpointing
            )
