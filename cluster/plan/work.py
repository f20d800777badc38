"""What a plan has to know of a run: plain sizes, named as the config names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.bundles import RoleRequest
from cluster.plan.shapes import ModelShape


@dataclass(frozen=True)
class Step:
    """One training step. Lengths are the limits: every prompt and completion at its longest."""

    groups: int
    completions: int  # of a group
    prompt_tokens: int
    completion_tokens: int
    passes: int  # over the batch
    updates: int  # optimiser steps in one pass
    max_staleness: int
    episode_tokens: int | None = None  # of a row with all its turns; None: no episodes are played
    old_passes: float = 0.0  # forward passes over the batch for the policy's old log-probs

    @property
    def sequences(self) -> int:
        """Completions of a step."""
        return self.groups * self.completions

    @property
    def longest(self) -> int:
        """Tokens of prompt and completion: as long as a row is planned to take."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def row(self) -> int:
        """Tokens of the longest row that there may be: as long as a row has to have room."""
        return self.longest if self.episode_tokens is None else self.episode_tokens

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of a step."""
        return self.sequences * self.longest


@dataclass(frozen=True)
class Kept:
    """What a rank keeps of what it trains. True: its share of it alone."""

    optimiser: bool = False
    gradients: bool = False
    weights: bool = False
    offload: bool = False  # optimiser state, and weights that are sharded, in the host's memory
    master: bool = False  # the optimiser has a float32 copy of weights, which are in model.dtype
    bucket: int = 0  # elements of gradients that are reduced at once; 0: those of a layer
    live: int = 0  # elements of sharded weights that stay gathered; 0: those of two layers

    @property
    def level(self) -> int:
        """How much of it is shared out, as ZeRO's stages count it."""
        return self.optimiser + self.gradients + self.weights


@dataclass(frozen=True)
class Other:
    """What ranks could run with instead: settings below the role's section, and what they keep."""

    settings: Mapping[str, str]
    kept: Kept


@dataclass(frozen=True)
class Trained:
    """The ranks of a policy or critic."""

    role: str
    shape: ModelShape
    ranks: int
    kept: Kept
    dtype_bytes: int  # of model.dtype
    tokens: int  # of one micro-batch of one rank
    longest: int  # tokens of its longest row: `Step.row`
    others: tuple[Other, ...] = ()  # none where the backend runs no other
    several: bool = True  # whether there may be more than one rank
    lora_rank: int | None = None
    lora_experts: bool = True  # where PEFT takes experts for linear layers
    checkpointing: bool = False
    head_rows: int = 0  # of the logits matrix at once; 0: there are no logits
    plain_loss: bool = False  # logits go through autograd, as TRL's do
    four_bit: bool = False  # frozen weights in 4 bits (model.load_in_4bit)
    scores: bool = False  # attention keeps its matrix of scores, as eager attention does
    has_four_bit: bool = False  # the backend has 4 bits to offer: Unsloth
    sends_changes: bool = False  # rank 0 keeps the weights that it has sent last
    send_buffer: int = 0  # bytes of one that goes from GPU to GPU; 0: weights go by the host
    shares_weights: bool = False  # replicas on the ranks' GPUs load them from there
    timeout_s: float = 3600.0  # the longest wait for an update


@dataclass(frozen=True)
class Rollout:
    """The replicas that generate."""

    shape: ModelShape
    replicas: int
    engine: str  # vllm or transformers
    dtype_bytes: int
    max_concurrent_groups: int  # in flight in one replica
    tensor_parallel: int = 1
    memory_share: float = 0.85  # of a GPU, for vLLM
    kv_cache_bytes: int | None = None  # None: what the share leaves
    named: bool = True  # the config names the engine; its options need that
    gpus_as_set: float = 1.0  # rollout.resources.gpus: 1 is each shard's, else of all shards
    most_replicas: int | None = None  # rollout.max_replicas
    takes_changes: bool = False  # a replica keeps the weights that changes are put on
    takes_whole: bool = True  # versions come whole, through the object store
    send_buffer: int = 0  # as of the policy
    scores: bool = False  # as of the policy, with the engine transformers
    timeout_s: float = 600.0  # the longest wait for a group
    held_out: int = 0  # completions of a prompt in an evaluation; 0: nothing is evaluated
    role: str = "rollout"

    @property
    def keeps_version(self) -> bool:
        """Whether a replica has a version in the host's memory from one update to the next. Whole
        ones lie there for vLLM's processes, in a file that is kept; transformers copies them."""
        return self.takes_changes or (self.takes_whole and self.engine == "vllm")


@dataclass(frozen=True)
class Frozen:
    """Replicas of a model that is only run forward: reference or reward models."""

    role: str
    shape: ModelShape
    replicas: int
    dtype_bytes: int
    tokens: int  # of one pass
    head_rows: int = 0
    section: str = "reference"  # of the config; a reward model's has its index: rewards.0
    longest: int | None = None  # tokens of the longest row; None: that of the step
    scores: bool = False  # as of the policy


def microbatch(budget: int, rows: int, longest: int) -> int:
    """Tokens of the largest micro-batch of `rows`, as `actors.packing` fills it: up to the budget,
    with rows that may be shorter than the longest. A row over the budget is one of its own."""
    return min(rows * longest, max(longest, budget))


@dataclass(frozen=True)
class Work:
    """A whole run. Several of `frozen` may be of one role: a reward replica holds all models."""

    step: Step
    policy: Trained
    rollout: Rollout
    requests: tuple[RoleRequest, ...]
    critic: Trained | None = None
    frozen: tuple[Frozen, ...] = ()
    colocate: Sequence[Sequence[str]] = ()
    threads: Mapping[str, int] = field(default_factory=dict)  # by role, where not its CPUs

    @property
    def models(self) -> tuple[Trained | Rollout | Frozen, ...]:
        """Everything that holds a model."""
        return (*self.trained, self.rollout, *self.frozen)

    @property
    def trained(self) -> tuple[Trained, ...]:
        """Policy and critic."""
        return (self.policy,) if self.critic is None else (self.policy, self.critic)
