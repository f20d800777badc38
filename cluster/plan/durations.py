"""How long the parts of a step take, and what bounds it. A prediction from peaks and assumptions.

FLOPs of a token: 2 a forward, a the parameters it meets; 6 a with backward (Kaplan et al. 2020,
2001.08361, section 2.1); 8 a where checkpointing runs the forward pass again. Frozen weights under
LoRA get no gradient: 4 a and 6 a. Attention adds 4 L d s a token forward, s the tokens it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.gpus import GpuType
from cluster.plan.memory import Memory, kv_bytes
from cluster.plan.shapes import ModelShape
from cluster.plan.work import Frozen, Rollout, Step, Trained, Work

TRAIN_MFU = 0.4  # share of peak FLOP/s that an update reaches
FORWARD_MFU = 0.5  # and a forward pass or a prefill
BANDWIDTH_USE = 0.6  # share of peak memory bandwidth that decoding reaches
NETWORK_USE = 0.7
FLOAT32_SLOWER = 15  # matrix products in full float32 against bfloat16 (989 to 67 TFLOP/s on H100)
HOST_LINK = 25e9  # bytes/s between a GPU and its host
STORE_COPY = 4e9  # bytes/s into and out of the object store
CPU_FLOPS = 30e9  # a core reaches, float32
CPU_BANDWIDTH = 15e9  # bytes/s of a host's memory
VLLM_STEP = 2e-3  # seconds of a decoding step beside the arithmetic
LAYER_STEP = 4e-4  # the same for transformers, a layer
ALL_REDUCE = 15e-6  # seconds of a small one between shards
VLLM_SEQUENCES = 256  # that vLLM decodes at once in one replica
TRANSFORMERS_GROUPS = 2  # that a replica of transformers has: one runs and one waits


@dataclass(frozen=True)
class Rates:
    """What one device does in a second."""

    flops: float
    memory_bandwidth: float
    link: float  # bytes to a neighbour in the node
    network: float  # bytes to another node
    is_gpu: bool

    @classmethod
    def of_gpu(cls, gpu: GpuType, dtype_bytes: int) -> Rates:
        """Peaks of a GPU in the dtype."""
        flops = gpu.flops / (1 if dtype_bytes == 2 or not gpu.bfloat16 else FLOAT32_SLOWER)
        return cls(
            flops, gpu.memory_bandwidth, gpu.link_bandwidth, NETWORK_USE * gpu.network_bandwidth,
            True,
        )  # fmt: skip

    @classmethod
    def of_cpu(cls, cpus: float) -> Rates:
        """What `cpus` cores of a host do; its memory bandwidth is not divided."""
        return cls(CPU_FLOPS * cpus, CPU_BANDWIDTH, CPU_BANDWIDTH, 1.25e9 * NETWORK_USE, False)


# How many replicas of each role are on one device.
Sharing = Mapping[str, int]


@dataclass(frozen=True)
class Times:
    """Seconds of each part of one step, if it had the step to itself.

    A device does one thing at a time: roles that share one take turns, at every staleness.
    """

    rollout: float
    scoring: float  # reference and reward models, beside the rollouts
    update: float
    transfer: float
    generating: float  # rollouts and scoring together
    busiest: float  # what the device with the most to do works in one step

    def step(self, staleness: int) -> float:
        """At staleness 0 parts follow each other; above it rollouts go on during the update.

        Scoring runs beside the rollouts in both. Loading weights stops both sides.
        """
        if staleness == 0:
            return self.generating + self.update + self.transfer
        return self.busiest + self.transfer

    def idle(self, staleness: int) -> tuple[float, float]:
        """Shares of the step in which the rollouts and the policy do not work."""
        step = self.step(staleness)
        return 1 - self.rollout / step, 1 - self.update / step

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part by its name."""
        return {
            "rollout": self.rollout,
            "scoring": self.scoring,
            "update": self.update,
            "transfer": self.transfer,
        }

    @property
    def bound(self) -> str:
        """The longest part."""
        parts = self.parts
        return max(parts, key=lambda name: parts[name])


def times(
    work: Work,
    rates: Mapping[str, Rates],
    memory: Mapping[str, Memory],
    spans: Mapping[str, int],
    far: int,
    sharing: Iterable[Sharing],
) -> Times:
    """All parts; `rates` and `memory` by role, `spans` the number of nodes that a role is on.

    `far` counts the rollouts' nodes that are not the one of the policy's rank 0, `sharing` has
    every combination of replicas on one device.
    """
    scoring: dict[str, float] = {}
    for frozen in work.frozen:
        seconds = forward_seconds(frozen, work.step, rates[frozen.role])
        scoring[frozen.role] = scoring.get(frozen.role, 0.0) + seconds
    rollout = {
        "rollout": rollout_seconds(work.rollout, work.step, rates["rollout"], memory["rollout"])
    }
    update = {
        one.role: update_seconds(one, work.step, rates[one.role], spans[one.role])
        for one in work.trained
    }
    devices = [*sharing, *({one.role: 1} for one in work.models)]  # with those without a GPU

    def longest(seconds: Mapping[str, float]) -> float:
        return max(
            sum(count * seconds.get(role, 0.0) for role, count in device.items())
            for device in devices
        )

    return Times(
        rollout=longest(rollout),
        scoring=longest(scoring),
        update=longest(update),
        transfer=transfer_seconds(work, rates["policy"], rates["rollout"], far),
        generating=longest({**rollout, **scoring}),
        busiest=longest({**rollout, **scoring, **update}),
    )


def attention_flops(shape: ModelShape, seen: float) -> float:
    """FLOPs of one token's attention to `seen` tokens, forward, all layers."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * seen


def update_seconds(work: Trained, step: Step, rates: Rates, spans: int) -> float:
    """The optimiser steps of one training step.

    Arithmetic and talk between ranks overlap. A ring moves 2 (N-1)/N of the gradient once an
    optimiser step (Patarasuk & Yuan 2009); ZeRO-3 and FSDP gather weights twice and reduce
    gradients once every micro-batch (Rajbhandari et al. 2019, section 7). Forward passes come
    before: one for a critic's values, `step.old_passes` for the policy's old log-probs.
    """
    trained_all = work.lora_rank is None
    factor = (6 if trained_all else 4) + (2 if work.checkpointing else 0)
    before = 1.0 if work.role == "critic" else step.old_passes
    flops = step.tokens * _forward_flops(work, step) * (step.passes * factor / 2 + before)
    compute = flops / (work.ranks * rates.flops * (TRAIN_MFU if rates.is_gpu else 1.0))

    n = work.ranks
    talk = offloaded = 0.0
    moved = work.dtype_bytes * (
        work.shape.parameters
        if trained_all
        else work.shape.lora_parameters(work.lora_rank or 1)
    )  # fmt: skip
    if n > 1:
        ring = (n - 1) / n * moved / (rates.link if spans == 1 else rates.network)
        micro = math.ceil(step.tokens / (n * work.tokens))
        sharded = work.kept.weights
        times_moved = 3 * max(micro, step.updates) if sharded else 2 * step.updates
        talk = step.passes * times_moved * ring
    if work.kept.offload and rates.is_gpu:
        # float32 gradients down and weights up once an optimiser step, AdamW in the host's memory.
        share = 4 * moved / work.dtype_bytes / n
        offloaded = step.passes * step.updates * (2 * share / HOST_LINK + 7 * share / CPU_BANDWIDTH)
    return max(compute, talk) + offloaded


def _forward_flops(work: Trained | Frozen, step: Step) -> float:
    """FLOPs of one token forward, attention too; without logits there is no head."""
    shape = work.shape
    head = 0 if work.head_rows else shape.vocabulary * shape.hidden
    return 2 * (shape.active - head) + attention_flops(shape, step.longest / 2)


def forward_seconds(work: Frozen, step: Step, rates: Rates) -> float:
    """Log-probs or scores of a step's sequences."""
    reached = rates.flops * (FORWARD_MFU if rates.is_gpu else 1.0)
    return step.tokens * _forward_flops(work, step) / (work.replicas * reached)


def rollout_seconds(work: Rollout, step: Step, rates: Rates, memory: Memory) -> float:
    """Prompts are read once a group; decoding runs in waves of as many sequences as fit.

    A decoding step reads the weights and the cache of every sequence once, or is bounded by
    arithmetic, whichever takes longer (Pope et al. 2022, 2211.05102, section 2).
    """
    shape, shards = work.shape, work.tensor_parallel
    reached = rates.flops * shards * (FORWARD_MFU if rates.is_gpu else 1.0)
    bandwidth = rates.memory_bandwidth * shards * BANDWIDTH_USE
    sequences = math.ceil(step.sequences / work.replicas)
    groups = math.ceil(step.groups / work.replicas)
    at_once = min(sequences, concurrency(work, step, memory))

    token = 2 * shape.active + attention_flops(shape, step.prompt_tokens / 2)
    prefill = groups * step.prompt_tokens * token / reached

    seen = step.prompt_tokens + step.completion_tokens / 2
    met = 1 - (1 - shape.experts) ** at_once if shape.expert_parameters else 0.0
    dense = shape.parameters - shape.expert_parameters
    read = work.dtype_bytes * (dense + met * shape.expert_parameters)
    read += at_once * seen * shape.kv_elements * work.dtype_bytes
    arithmetic = at_once * (2 * shape.active + attention_flops(shape, seen)) / reached
    overhead = VLLM_STEP if work.engine == "vllm" else LAYER_STEP * shape.layers
    overhead += 2 * shape.layers * ALL_REDUCE * (shards > 1)
    decoding = max(read / bandwidth, arithmetic) + overhead
    return prefill + math.ceil(sequences / at_once) * step.completion_tokens * decoding


def group_seconds(work: Rollout, step: Step, rates: Rates, memory: Memory) -> float:
    """The longest that a group, or a turn of its episodes, is at a replica: with all the groups
    that this may have, every completion at its limit.

    An evaluation fills every replica; training has no more than staleness lets it have, in all.
    """
    groups = work.max_concurrent_groups if work.engine == "vllm" else TRANSFORMERS_GROUPS
    if not work.held_out:
        groups = min(groups, (step.max_staleness + 1) * step.groups)
    completions = max(step.completions, work.held_out)
    before = max(step.prompt_tokens, step.row - step.completion_tokens)
    full = replace(step, groups=groups, completions=completions, prompt_tokens=before)
    return rollout_seconds(replace(work, replicas=1), full, rates, memory)


def concurrency(work: Rollout, step: Step, memory: Memory) -> int:
    """Sequences that one replica decodes at a time."""
    if work.engine == "transformers":
        return step.completions
    fit = memory.device.get("KV cache", 0) // max(1, kv_bytes(work) * step.longest)
    return max(1, min(fit, work.max_concurrent_groups * step.completions, VLLM_SEQUENCES))


def transfer_seconds(work: Work, policy: Rates, rollout: Rates, far: int) -> float:
    """One version's weights: packed by rank 0, stored once, fetched by `far` other nodes, loaded.

    Nodes fetch from each other as a tree: the time doubles its reach.
    """
    size = work.policy.shape.parameters * work.policy.dtype_bytes
    out = size / (HOST_LINK if policy.is_gpu else policy.memory_bandwidth)
    across = math.ceil(math.log2(far + 1)) * size / min(policy.network, rollout.network)
    into = size / (HOST_LINK if rollout.is_gpu else rollout.memory_bandwidth)
    return out + size / STORE_COPY + across + into


ASSUMPTIONS = (
    "every prompt and completion is at its limit, and no micro-batch is padded",
    f"an update reaches {TRAIN_MFU:.0%} of peak FLOP/s, a forward pass {FORWARD_MFU:.0%}, decoding "
    f"{BANDWIDTH_USE:.0%} of memory bandwidth, the network {NETWORK_USE:.0%} of its peak",
    f"vLLM decodes at most {VLLM_SEQUENCES} sequences at once in a replica",
    f"without a GPU: {CPU_FLOPS / 1e9:g} GFLOP/s a CPU and {CPU_BANDWIDTH / 1e9:g} GB/s a node",
    "weights go through the object store; rewards that are functions take no time",
    "a GPU that roles share works for one of them at a time",
    "Ray chooses nodes and devices itself, by the same rules; other runs are not counted",
)
