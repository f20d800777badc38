"""What the workers of a preference job take where the config leaves it open. Pure.

A step has the same pairs however they are shared out: over workers, each with a whole model, and
over forward passes. Where that would make another loss of them, they stay as they are. Held-out
figures are the same in passes of any size, but for such a loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cluster.gpus import GpuType, gpu_type
from cluster.placement import DoesNotFit
from cluster.plan.auto import HEADROOM, Decided
from cluster.plan.fit import gib
from cluster.plan.memory import (
    FLOAT,
    Memory,
    frozen_memory,
    layer_activations,
    logits,
    trained_memory,
    trained_parameters,
)
from cluster.plan.shapes import ModelShape
from cluster.plan.work import Frozen, Kept, Trained
from cluster.resources import Cluster

SHARED_OUT = ("train.workers", "train.pairs_per_worker", "train.accumulation_steps")
CHECKPOINTING = "model.gradient_checkpointing"
HELD_OUT = "eval.pairs_per_worker"
OWN = ("activations", "logits", "framework")
"""What a worker has for itself where DeepSpeed shares out or offloads the rest."""


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
    reference: bool  # a frozen pass beside each; of a second model, where there is no LoRA
    sides: int = 2  # of a pair, which go through at once; 1 of what is taught
    deepspeed: bool = False  # it says where weights, gradients and optimiser are: none is counted
    whole: bool = False  # the loss is one of all pairs of a forward pass, not a mean over them
    held_out: int = 0  # pairs of one forward pass of an evaluation; 0: there is none
    lora_experts: bool = True
    scores: bool = False  # attention keeps its matrix of scores, as eager attention does
    weighting: bool = False  # DPO's, for which the logits are doubled

    @property
    def bytes(self) -> int:
        """Memory of one worker's GPU at its peak, which an update or an evaluation has."""
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
            lora_experts=self.lora_experts,
            checkpointing=self.checkpointing,
            head_rows=rows,
            plain_loss=True,
            four_bit=self.four_bit,
            scores=self.scores,
        )
        device = trained_memory(trained, on_gpu=True).device
        if self.deepspeed:
            device = {kind: device[kind] for kind in OWN}
        needed = Memory(device).peak
        if self.held_out:
            needed = max(needed, Memory(device | self._evaluating).peak)
        if self.deepspeed:
            return needed
        if self.workers > 1:  # DDP's buckets, beside the gradients that are copied into them
            needed += FLOAT * trained_parameters(trained)[0]
        if self.reference and self.lora_rank is None:  # in float32, whatever it computes in
            frozen = Frozen("reference", self.shape, 1, FLOAT, tokens, rows)
            needed += frozen_memory(frozen, on_gpu=True).device["weights"]
        return needed

    @property
    def _evaluating(self) -> dict[str, int]:
        """Bytes by kind of a forward pass of an evaluation, in place of those of an update.

        One layer works at a time. The logits are those of TRL 1.13. DPO holds them in float32, the
        reference's too, and copies the policy's for their entropy, or twice for `weighting`. SFT
        holds them as they were computed and in float32, and their log-probs.
        """
        tokens = self.sides * self.held_out * self.longest
        one = layer_activations(self.shape, self.dtype_bytes, self.longest, False)
        rows = tokens if self.logits else 0
        computed = self.dtype_bytes if self.sides == 1 else FLOAT
        return {
            "gradients": 0,
            "activations": tokens * one,
            "logits": logits(self.shape, rows, computed, 2 + self.reference + self.weighting),
        }


def choose_workers(
    work: PairWork, open_: frozenset[str], gpus: float, cluster: Cluster, cores: int
) -> tuple[Decided, ...]:
    """What is open, decided; `gpus` is what the config says of each worker.

    Raises DoesNotFit, one line, where a GPU does not hold what one worker needs.
    """
    if not work.held_out:
        open_ -= {HELD_OUT}
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
    room = _with_room(ways, kind)
    if not room:
        least = min(ways, key=lambda one: one.bytes)
        beside = " beside what DeepSpeed shares out" if work.deepspeed else ""
        held_out = f", {least.held_out} in an evaluation" if least.held_out else ""
        raise DoesNotFit(
            f"one worker needs {gib(least.bytes)}{beside} and a {kind.name} has "
            f"{gib(kind.memory_bytes)}: {gib(least.bytes - kind.memory_bytes)} short (with "
            f"{least.pairs} pairs a pass{held_out}); {_cure(work, open_, there, kind)}"
        )
    chosen = room[0]
    where = workers = f"{chosen.workers} of {there} GPU ({cluster.called(kind.name)})"
    if chosen.workers < there and (work.whole or not open_.issuperset(SHARED_OUT)):
        more = there * chosen.pairs * chosen.passes
        workers += f"; with train.workers={there} all compute, and a step has {more} pairs"
    pairs = chosen.workers * chosen.pairs * chosen.passes
    room_for = "which the loss has in one pass" if work.whole else "as the memory has room"
    steps = f"{pairs} pairs a step, {room_for}"
    dtype = _dtype(chosen)
    made = (
        Decided("model.dtype", dtype, f"{kind.name} has {'it' if has_bfloat16 else 'no bfloat16'}"),
        Decided(CHECKPOINTING, chosen.checkpointing, "the memory of activations"),
        Decided("train.resources.gpus", 1.0, where),
        Decided("train.workers", chosen.workers, workers),
        Decided("train.pairs_per_worker", chosen.pairs, steps),
        Decided("train.accumulation_steps", chosen.passes, steps),
        Decided(HELD_OUT, chosen.held_out, "as the memory has room"),
    )
    return tuple(one for one in made if one.path in open_)


def _dtype(work: PairWork) -> str:
    return "bfloat16" if work.dtype_bytes == 2 else "float32"


def _as_it_is(work: PairWork, why: str) -> Iterator[Decided]:
    yield Decided("model.dtype", _dtype(work), why)
    for key, value in _settings(work).items():
        yield Decided(key, value, why)


def _on_cpus(work: PairWork, cores: int) -> Iterator[Decided]:
    threads = max(1, cores // work.workers)
    yield Decided("model.dtype", "float32", "no GPU computes here")
    yield Decided("train.resources.gpus", 0.0, "no GPU")
    yield Decided("train.resources.threads", threads, "processors here")
    if work.whole and work.held_out:  # its figures are of so many, also where it goes on
        yield Decided(HELD_OUT, work.held_out, "the pairs that its loss has in one pass")


def _ways(work: PairWork, open_: frozenset[str], gpus: int) -> Iterator[PairWork]:
    """The job shared out otherwise, the fastest first: more workers, fewer passes, no recompute,
    and more pairs of an evaluation at once."""
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
    checkpointings = [False, True] if CHECKPOINTING in open_ else [work.checkpointing]
    held_out = [work.held_out]
    while HELD_OUT in open_ and held_out[-1] // 2 >= (2 if work.whole else 1):
        held_out.append(held_out[-1] // 2)
    for (workers, pairs, passes), checkpointing, held in itertools.product(
        shared_out, checkpointings, held_out
    ):
        yield replace(
            work,
            workers=workers,
            pairs=pairs,
            passes=passes,
            checkpointing=checkpointing,
            held_out=held,
        )


def _with_room(ways: Iterable[PairWork], kind: GpuType) -> list[PairWork]:
    """Those that a GPU holds, those that leave some of it free before the others."""
    ways = list(ways)
    return [
        one for share in (HEADROOM, 1.0) for one in ways if one.bytes <= share * kind.memory_bytes
    ]


def _cure(work: PairWork, open_: frozenset[str], gpus: int, kind: GpuType) -> str:
    """What to set where nothing fits: the fewest things that give the same step room, if any do."""
    was = _settings(work)
    decided = open_
    if work.whole or not open_.issuperset(SHARED_OUT):  # then none of these is
        decided -= set(SHARED_OUT)

    def changes(one: PairWork) -> dict[str, Any]:
        return {
            path: value
            for path, value in _settings(one).items()
            if value != was[path] and path not in decided
        }

    ways = _with_room(_ways(work, open_.union(was), gpus), kind)
    if "train.workers" not in open_:
        ways = [one for one in ways if one.workers == work.workers]
    found = min(  # how pairs are shared out is one thing, though several settings say it
        map(changes, ways),
        key=lambda change: len({path in SHARED_OUT or path for path in change}),
        default=None,
    )
    if found is None:
        stage_3 = "" if work.deepspeed else "train.deepspeed with stage 3 on several workers, "
        return (
            f"what may fit: model.lora={{r: 16}}, a smaller data.max_length, {stage_3}or GPUs with "
            "more memory"
        )
    said = " ".join(f"{path}={str(value).lower()}" for path, value in found.items())
    pairs = math.prod((work.workers, work.pairs, work.passes))
    same = f", for the same {pairs} pairs a step" if found.keys() & set(SHARED_OUT) else ""
    return f"what fits: {said}{same}"


def _settings(work: PairWork) -> dict[str, Any]:
    """What may be set otherwise without another step, by its key."""
    return {
        **dict(zip(SHARED_OUT, (work.workers, work.pairs, work.passes), strict=True)),
        CHECKPOINTING: work.checkpointing,
        HELD_OUT: work.held_out,
    }
