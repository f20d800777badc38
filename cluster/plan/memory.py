"""What one rank or replica keeps in memory, by kind, in bytes.

Symbols: P parameters, T trained ones, N ranks, b bytes of model.dtype, h hidden size, L layers, V
vocabulary, n tokens of a micro-batch. What is trained is kept in float32 whatever the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.gpus import GpuType
from cluster.plan.shapes import ModelShape
from cluster.plan.work import Frozen, Rollout, Step, Trained

GIB = 2**30
FLOAT = 4
KINDS = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "logits",
    "KV cache",
    "transfer",
    "last weights",
    "checkpoint",
    "model file",
    "framework",
)
OF_RANK_0 = ("transfer", "last weights", "model file")
"""What rank 0 of those that train has in the host's memory and the others have not."""
GPU_FRAMEWORK = 1.25 * GIB  # CUDA context, NCCL buffers, what the allocator cannot use
CPU_FRAMEWORK = 0.6 * GIB  # Python with torch and transformers
VLLM_CPU_FRAMEWORK = 1.5 * GIB  # the same, and vLLM with its engine in a process of its own
VLLM_BATCH = 8192  # tokens that vLLM makes room for in one pass
VLLM_ROWS = 1024  # and sequences it samples at once
VLLM_CPU_CACHE = 1 * GIB
VLLM_BLOCK = 16  # tokens of one block of the KV cache
BUFFERS = 3  # of weights from GPU to GPU: vLLM has two under way, and makes a third meanwhile
FOUR_BIT = 4.5 / 8  # bytes of a 4-bit weight with its scales (Dettmers et al. 2023, 2305.14314)


@dataclass(frozen=True)
class Memory:
    """Bytes by kind: on the replica's device (each of its devices), and on its host beside that.

    Without a GPU the device is the host's memory.
    """

    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    on_gpu: bool = True

    @property
    def peak(self) -> int:
        """The most at one time: gradients, activations and logits are gone when weights leave.

        In the host's memory everything counts: the C allocator keeps, in pieces, what an update and
        an export have freed, so the one does not run in the memory of the other (as measured).
        """
        if not self.on_gpu:
            return sum(self.device.values())
        update = {"gradients", "activations", "logits"}
        stay = sum(v for kind, v in self.device.items() if kind not in (*update, "transfer"))
        moving = self.device.get("transfer", 0)
        return stay + max(sum(self.device.get(kind, 0) for kind in update), moving)

    @property
    def host_bytes(self) -> int:
        """Host memory beside the device's."""
        return sum(self.host.values())

    @property
    def of_rank_0(self) -> int:
        """What other ranks than the first have less in the host's memory."""
        return sum((self.host if self.on_gpu else self.device).get(kind, 0) for kind in OF_RANK_0)


def trained_parameters(work: Trained) -> tuple[int, int]:
    """(T, frozen ones): LoRA trains adapters of every linear layer and freezes the rest."""
    total = parameters_of(work)
    if work.lora_rank is None:
        return total, 0
    return work.shape.lora_parameters(work.lora_rank, work.lora_experts), total


def parameters_of(work: Trained | Frozen) -> int:
    """P; without logits the head has one output (a value or a score) in place of V."""
    shape = work.shape
    if work.head_rows:
        return shape.parameters
    head = 0 if shape.tied else shape.vocabulary * shape.hidden
    return shape.parameters - head + shape.hidden


def trained_memory(work: Trained, on_gpu: bool) -> Memory:
    """A rank of policy or critic at the peak of an update.

    AdamW has two moments and gradients in float32: 4T + 8T (Kingma & Ba 2014). ZeRO divides
    optimiser state (1), gradients (2) and weights (3) by N (Rajbhandari et al. 2019, section 5);
    its optimiser holds a float32 copy of the weights it steps, also of a float32 model: 12T / N.
    """
    trained, frozen = trained_parameters(work)
    device, host = _kept(work, trained, frozen)
    device["activations"] = activations(work)
    rows, copies = min(work.head_rows, work.tokens), 6 if work.plain_loss else 1
    device["logits"] = logits(work.shape, rows, _compute(work), copies)
    device["framework"] = int(GPU_FRAMEWORK if on_gpu else CPU_FRAMEWORK)
    host |= _saved(work, trained)
    if work.head_rows:  # the policy: rank 0 copies its weights out, one tensor after the other
        bundle = work.shape.parameters * work.dtype_bytes
        device["transfer"] = _leaving(work) if on_gpu else bundle
        if on_gpu:
            host["transfer"] = bundle
        if work.sends_changes:
            host["last weights"] = bundle
    if not on_gpu:  # what is offloaded from the host's memory stays in it
        for kind, amount in host.items():
            device[kind] = device.get(kind, 0) + amount
        host = {}
    return Memory(device, host, on_gpu)


def _leaving(work: Trained) -> int:
    """Weights on a rank's GPU as they leave it: the largest one, buffers of them, or all. Shared
    memory needs copies unless they are whole there, in model.dtype and without LoRA.

    A mixture's experts of a layer are two weights, and the larger one leaves in its two halves.
    """
    experts = 4 * work.shape.expert_parameters // (3 * work.shape.layers)  # whole, and the halves
    if work.send_buffer:
        buffers = _buffers(work.shape, work.dtype_bytes, work.send_buffer)
        return buffers + experts * work.dtype_bytes
    as_they_are = work.lora_rank is None and not work.kept.weights
    as_they_are = as_they_are and (work.kept.master or work.dtype_bytes == FLOAT)
    if work.shares_weights and not as_they_are:
        return work.shape.parameters * work.dtype_bytes
    return max(work.shape.vocabulary * work.shape.hidden, experts) * work.dtype_bytes


def _buffers(shape: ModelShape, dtype_bytes: int, size: int) -> int:
    """Buffers of packed weights; one takes whole weights until it has more than `size` bytes."""
    largest = shape.vocabulary * shape.hidden * dtype_bytes
    return BUFFERS * min(shape.parameters * dtype_bytes, size + largest)


def _compute(work: Trained | Rollout | Frozen) -> int:
    """Bytes of what linear layers compute in."""
    return work.dtype_bytes


def _kept(work: Trained, trained: int, frozen: int) -> tuple[dict[str, int], dict[str, int]]:
    """Weights, gradients and optimiser state of a rank: on its device, and offloaded."""
    b, n, kept = work.dtype_bytes, work.ranks, work.kept
    low = b < FLOAT
    weights = (b if kept.master else FLOAT) * trained
    weights += b * frozen
    if work.four_bit:  # linear layers but the head; neither embeddings nor experts
        packed = min(frozen, sum(rows * columns for rows, columns in work.shape.linear))
        weights -= int((b - FOUR_BIT) * packed)
    optimiser = (3 if kept.master else 2) * FLOAT * trained
    gradients = share = FLOAT * trained
    if kept.optimiser:
        optimiser //= n
    if kept.gradients:
        gradients = share = FLOAT * trained // n
    elif kept.master and low:
        gradients += b * trained  # as they were computed
    gradients += _reduced(work, trained, frozen)
    host: dict[str, int] = {}
    if kept.weights:
        weights //= n
        if kept.offload:
            host["weights"] = weights
            weights = 0
        if n > 1 or kept.offload:
            weights += _gathered(work, trained + frozen)
    elif low and not kept.master:
        weights += b * trained  # autocast keeps a copy of each for backward
    if kept.offload:
        host["optimiser"] = optimiser
        host["gradients"] = FLOAT * trained // n
        optimiser = 0
        gradients -= share if kept.gradients else 0
    return {"weights": weights, "gradients": gradients, "optimiser": optimiser}, host


def _saved(work: Trained, trained: int) -> dict[str, int]:
    """A rank's part of a checkpoint, copied to the host and written beside the next updates.

    Trained weights and two moments in float32: 12T, of ranks that share them each its own. ZeRO 1
    and 2 have rank 0 write what is trained as it computes, too.
    """
    kept = work.kept
    saved = {"checkpoint": 3 * FLOAT * trained // (work.ranks if kept.optimiser else 1)}
    if kept.master and not kept.weights:
        saved["model file"] = work.dtype_bytes * trained
    return saved


def _reduced(work: Trained, trained: int, frozen: int) -> int:
    """What gradients are reduced in: a bucket, or those of one layer or of the largest matrix."""
    if work.kept.bucket:
        return work.dtype_bytes * min(work.kept.bucket, trained)
    if not work.kept.gradients or work.ranks == 1 or trained <= frozen:
        return 0
    return FLOAT * max(_layer(work.shape), work.shape.vocabulary * work.shape.hidden)


def _gathered(work: Trained, parameters: int) -> int:
    """Sharded weights that are whole at one time."""
    if work.kept.live:
        return work.dtype_bytes * min(work.kept.live, parameters)
    table = work.shape.vocabulary * work.shape.hidden
    return (2 * _layer(work.shape) + table) * work.dtype_bytes


def _layer(shape: ModelShape) -> int:
    tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return max(0, shape.parameters - tables) // shape.layers


def layer_activations(
    shape: ModelShape, compute_bytes: int, longest: int, scores: bool, frozen: bool = False
) -> int:
    """Bytes that one token leaves in one layer for backward.

    Counted over a layer of the Llama family as transformers runs it, in the way of Korthikanti et
    al. 2022 (2205.05198, section 4.1). Norms work in float32: input, normalised and output, twice
    (24h). Linear layers keep their inputs: of q, k, v and of the MLP (2h), attention its q, k, v
    and output, keys and values repeated for every query head (4 a d), the MLP its two halves, the
    activated one and the product (4m). SDPA keeps no scores; eager attention keeps scores and
    probabilities (2 a s). In a mixture each of a token's k experts has a copy of its input, which
    `frozen` experts do not keep, and an output that the router weighs (2 k h).
    """
    width = shape.heads * shape.head_dim
    elements = 2 * shape.hidden + 4 * width + 4 * shape.mlp
    elements += round((1 if frozen else 2) * shape.routed * shape.hidden)
    if scores:
        elements += 2 * shape.heads * longest
    return 6 * FLOAT * shape.hidden + compute_bytes * elements


def activations(work: Trained) -> int:
    """Of one micro-batch: all layers, and one more that backward works on.

    With checkpointing each layer keeps its input alone, and one layer is recomputed (Chen et al.
    2016).
    """
    shape, lora = work.shape, work.lora_rank is not None
    adapted = lora and work.lora_experts and bool(shape.adapted)
    one = layer_activations(
        shape, _compute(work), work.longest, work.scores, frozen=lora and not adapted
    )
    # PEFT makes weights of experts and their adapters anew in each pass, which backward needs.
    made = shape.expert_parameters * work.dtype_bytes if adapted else 0
    if work.checkpointing:
        kept = work.tokens * (shape.layers * FLOAT * shape.hidden + 2 * one)
        return kept + 2 * made // shape.layers
    return (work.tokens * one + made // shape.layers) * (shape.layers + 1)


def logits(shape: ModelShape, rows: int, compute_bytes: int, copies: int) -> int:
    """A chunk of the logits matrix: as computed, where not in float32, and `copies` in float32.

    One copy is logits, probabilities and gradient in turn. Autograd through log-probs and entropy
    holds six: scaled logits, softmax, their product and three gradients.
    """
    computed = compute_bytes if compute_bytes < FLOAT else 0
    return rows * shape.vocabulary * (computed + copies * FLOAT)


def kv_bytes(work: Rollout) -> int:
    """Bytes one token leaves in the KV cache of one shard: 2 L kv d b; with MLA L (c + r) b."""
    shards = min(work.tensor_parallel, work.shape.kv_heads)
    return work.shape.kv_elements * work.dtype_bytes // shards


def row_bytes(work: Rollout, row: int) -> int:
    """Bytes of KV cache with which vLLM decodes one sequence of `row` tokens.

    It counts whole blocks, and holds one back, the null block (`vllm.v1.core.kv_cache_utils`).
    """
    return kv_bytes(work) * VLLM_BLOCK * (math.ceil(row / VLLM_BLOCK) + 1)


def rollout_memory(work: Rollout, step: Step, gpu: GpuType | None) -> Memory:
    """A rollout replica on each of its devices, with one version's weights on the way in.

    vLLM takes its share of a GPU and gives the KV cache what weights and workspace leave.
    """
    shape, b, shards = work.shape, work.dtype_bytes, work.tensor_parallel
    weights = shape.parameters * b // shards
    if work.engine == "transformers":
        return _transformers_memory(work, step, gpu is not None)
    wide = 4 * shape.hidden + 3 * shape.mlp // shards
    device = {
        "weights": weights,
        "activations": VLLM_BATCH * wide * b if gpu else 0,
        "logits": VLLM_ROWS * shape.vocabulary * FLOAT if gpu else 0,
        "transfer": _buffers(shape, b, work.send_buffer)
        if work.send_buffer
        else shape.vocabulary * shape.hidden * b // shards,
        "framework": int(GPU_FRAMEWORK if gpu else VLLM_CPU_FRAMEWORK),
    }
    if gpu is None:
        cache = work.kv_cache_bytes or VLLM_CPU_CACHE
    else:
        taken = weights + device["activations"] + device["logits"]
        left = int(work.memory_share * gpu.memory_bytes) - taken - device["framework"]
        cache = work.kv_cache_bytes if work.kv_cache_bytes is not None else max(0, left)
    return _with_last_weights(work, {**device, "KV cache": cache}, gpu is not None)


def _with_last_weights(work: Rollout, device: dict[str, int], on_gpu: bool) -> Memory:
    """With the whole version that a replica keeps in the host's memory, where it does."""
    kept = work.shape.parameters * work.dtype_bytes if work.keeps_version else 0
    host = {"last weights": kept} if kept else {}
    return Memory(device, host) if on_gpu else Memory({**device, **host}, on_gpu=False)


def _transformers_memory(work: Rollout, step: Step, on_gpu: bool) -> Memory:
    """One group at a time: its cache in full, and the sampler's five copies of the last logits.

    The five: as float32, over the temperature, log-probs, probabilities, and (twice as wide) their
    running sum in float64.
    """
    shape, b = work.shape, work.dtype_bytes
    cache = step.completions * step.row * kv_bytes(work)
    # Of a later turn a prompt is all that was said before.
    prompt = max(step.prompt_tokens, step.row - step.completion_tokens)
    return _with_last_weights(
        work,
        {
            "weights": shape.parameters * b,
            "activations": prompt * layer_activations(shape, b, step.row, work.scores),
            "logits": step.completions * shape.vocabulary * (b + 6 * FLOAT),
            "KV cache": cache + cache // shape.layers,  # a layer's is copied as it grows
            "transfer": 0 if on_gpu else shape.parameters * b,  # mapped from the object store
            "framework": int(GPU_FRAMEWORK if on_gpu else CPU_FRAMEWORK),
        },
        on_gpu,
    )


def frozen_memory(work: Frozen, on_gpu: bool) -> Memory:
    """A reference or reward replica: weights, and one layer of one pass at a time."""
    one = layer_activations(work.shape, _compute(work), work.longest or 0, work.scores)
    rows = min(work.head_rows, work.tokens)
    return Memory(
        {
            "weights": parameters_of(work) * work.dtype_bytes,
            "activations": work.tokens * one,
            "logits": logits(work.shape, rows, _compute(work), 1),
            "framework": int(GPU_FRAMEWORK if on_gpu else CPU_FRAMEWORK),
        },
        on_gpu=on_gpu,
    )
