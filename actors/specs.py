"""What each role can be told: small frozen settings, one class a role, composed by the config tree.

Light on purpose: importing this starts nothing and loads no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from actors.engines.specs import AutoEngineSpec, EngineField
from actors.settings import AUTO, LOWEST_TEMPERATURE, Beta
from actors.settings import Positive as Positive
from actors.settings import Seconds as Seconds
from actors.settings import Spec as Spec
from actors.strategies.specs import StrategyField, TorchSpec
from actors.transfer.specs import FullSpec, WeightSyncField

MAX_CONCURRENT_GROUPS = 16  # of a reward actor, where the config does not say


class LoRASpec(Spec):
    """Low-rank adapters through PEFT."""

    r: Positive = Field(16, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale; updates are multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="which linear layers get an adapter"
    )


class ModelSpec(Spec):
    """The model that is trained."""

    name: str = Field(
        description="a local folder, a hub name, or an fsspec URI, which is fetched once a node"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16 computes in it; what is trained is kept in float32",
        json_schema_extra=AUTO,
    )
    lora: LoRASpec | None = Field(None, description="adapters instead of full fine-tuning")
    load_in_4bit: bool = Field(
        False, description="frozen weights of the trained model in 4 bits; unsloth, lora and a GPU"
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory, about a third more time", json_schema_extra=AUTO
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="attention kernel of transformers; eager in place of sdpa for a model that "
        "caps its scores, as Gemma 2 does: sdpa leaves the cap out",
    )

    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="what the chat template gets beside the messages, such as {enable_thinking: "
        "false} of Qwen3",
    )
    chat_template_day: str | None = Field(
        None,
        description="the day, as 2026-01-31, for a chat template that writes today's; default: the "
        "one on which the run began",
    )
    stop_token_ids: list[int] | None = Field(
        None,
        description="what ends a completion beside the ends of tokenizer and generation config; "
        "default: the token by which the chat template ends a turn, where it is none of these",
    )

    @field_validator("chat_template_day")
    @classmethod
    def _is_day(cls, day: str | None) -> str | None:
        if day is not None:
            date.fromisoformat(day)
        return day

    def renamed(self, name: str) -> ModelSpec:
        """These settings of the model `name`. A revision is of one model: another has none."""
        other = {} if name == self.name else {"name": name, "revision": None}
        return self.model_copy(update=other)


class RoleResources(Spec):
    """What one replica or rank of a role takes from the cluster."""

    moved: ClassVar[Mapping[str, str]] = {"strategy": "placement"}

    cpus: float = Field(1.0, gt=0, description="logical CPUs", json_schema_extra=AUTO)
    threads: Positive | None = Field(
        None,
        description="of its arithmetic; none: as many as CPUs, so that roles that take turns may "
        "each have all processors, and no node is overbooked",
        json_schema_extra=AUTO,
    )
    gpus: float = Field(
        0.0, ge=0, description="GPUs; a fraction shares one", json_schema_extra=AUTO
    )
    memory_gib: float | None = Field(None, gt=0, description="host memory; default: not counted")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK",
        description="PACK: on few nodes, SPREAD: on many; STRICT_*: on exactly one, or on as many "
        "as there are replicas, else the run is refused",
    )


class RolloutSpec(Spec):
    """Generation."""

    moved: ClassVar[Mapping[str, str]] = {
        "tensor_parallel_size": "engine.tensor_parallel_size",
        "gpu_memory_utilization": "engine.gpu_memory_utilization",
        "kv_cache_gib": "engine.kv_cache_gib",
        "engine_options": "engine.options",
    }

    engine: EngineField = Field(
        AutoEngineSpec(),
        description="auto: vllm where it is installed for what replicas have, else transformers",
        json_schema_extra=AUTO,
    )
    replicas: Positive = Field(
        1, description="actors, each with the whole model", json_schema_extra=AUTO
    )
    max_replicas: Positive | None = Field(
        None,
        description="more of them, up to this, while the cluster has room: on nodes that join, for "
        "as long as they stay; default: none",
    )
    resources: RoleResources = RoleResources()
    temperature: float = Field(
        1.0, ge=LOWEST_TEMPERATURE, description="of sampling; log-probs are taken at it too"
    )
    max_completion_length: Positive = Field(
        256,
        description="tokens, the end-of-sequence token included: the sampling budget; less by "
        "default where the model has no positions for it",
    )
    max_prompt_length: Positive | None = Field(
        None,
        description="tokens; default: the 95th percentile of the prompts, within the model's "
        "positions",
    )
    max_concurrent_groups: Positive = Field(
        32, description="in flight per replica of vllm; the transformers engine has 2"
    )
    generation_timeout_s: Seconds = Field(
        600.0, description="longest wait for one group; auto: 600 or more", json_schema_extra=AUTO
    )
    weight_sync: WeightSyncField = Field(
        FullSpec(),
        description="what is sent of each version: full, all weights; delta, those that have "
        "changed, bit for bit the same, for a copy of the weights in policy and replicas; adapter, "
        "that of model.lora alone, which engines do not merge; nccl, all weights from GPU to GPU, "
        "and ipc, out of the memory of a GPU that both are on, into vLLM alone (neither has run on "
        "a GPU yet). All but adapter merge it",
    )
    weight_timeout_s: Seconds = Field(600.0, description="longest wait for it to take new weights")
    start_timeout_s: Seconds = Field(600.0, description="longest wait for a replica to load")
    max_attempts: Positive = Field(
        3, description="replicas that may die with a group alone on them before it is quarantined"
    )
    max_restarts: int = Field(
        10,
        ge=0,
        description="replacements of dead replicas an hour; used ones come back",
    )

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion. Raises ValueError where max_prompt_length is open."""
        if self.max_prompt_length is None:
            raise ValueError("rollout.max_prompt_length is not settled yet; set it")
        return self.max_prompt_length + self.max_completion_length


class RewardFunctionSpec(Spec):
    """One criterion."""

    function: str = Field(
        description="a registered name, package.module:function or path/to/file.py:function"
    )
    name: str | None = Field(None, description="in metrics; default: the function's own name")
    weight: float = Field(1.0, description="in the sum of criteria")
    options: dict[str, Any] = Field(default={}, description="keyword arguments of every call")
    timeout_s: Seconds = Field(60.0, description="for one group, from when its call begins")
    workers: Positive | None = Field(
        None,
        description="groups at once; others wait, before their timeout_s begins. Each has a "
        "process where the function is not async: more are started only while groups wait, and "
        "each holds what the function imports; default: reward.max_concurrent_groups",
    )
    try_first: bool = Field(
        True,
        description="call it once on the first prompt before anything starts; false where it works "
        "on the cluster's nodes alone",
    )


class RewardModelSpec(Spec):
    """A reward model as one criterion: a sequence classifier with one label, or one label of it."""

    model: str = Field(description="a local folder or a hub name")
    name: str | None = Field(None, description="in metrics; default: the last part of its path")
    weight: float = Field(1.0, description="in the sum of criteria")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of weights and arithmetic", json_schema_extra=AUTO
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    apply_chat_template: bool = Field(
        True, description="false: prompt and completion are scored one after the other as text"
    )
    max_tokens: Positive | None = Field(
        None, description="of prompt and completion, never cut; default: the model's positions"
    )
    label: str | None = Field(
        None, description="of a classifier with several, by its name: the score is this label's"
    )
    output: Literal["logit", "probability"] = Field(
        "logit", description="probability: 0 to 1, of the label among all, or of the one there is"
    )
    reads: Literal["conversation", "completion"] = Field(
        "conversation",
        description="completion: its text alone, as classifiers of tone or harm are trained",
    )
    batch_size: Positive = Field(16, description="texts in one forward pass")
    timeout_s: Seconds = Field(120.0, description="for one group")


class RewardUrlSpec(Spec):
    """A service over HTTP as one criterion."""

    workers: ClassVar[None] = None  # its requests share one process

    url: str = Field(
        description="http or https; gets prompts, completions and columns as JSON, answers scores"
    )
    name: str | None = Field(None, description="in metrics; default: the host's")
    weight: float = Field(1.0, description="in the sum of criteria")
    request_timeout_s: Seconds = Field(30.0, description="longest wait for one answer")
    retries: int = Field(3, ge=0, description="further tries, with growing pauses")
    concurrency: Positive = Field(16, description="requests at once, of each reward actor")
    token_env: str | None = Field(
        None, description="the variable that holds a bearer token, on the nodes of reward actors"
    )
    timeout_s: Seconds = Field(180.0, description="for one group, with all its tries")

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"give a URL such as http://HOST:PORT/score, not {url!r}")
        return url


REWARD_KINDS: dict[str, type[Spec]] = {
    "function": RewardFunctionSpec,
    "model": RewardModelSpec,
    "url": RewardUrlSpec,
}
"""What an entry of `rewards` may be, each by the key that says so."""


class RewardActorSpec(Spec):
    """How rewards are run."""

    replicas: Positive = Field(
        1, description="actors, each with all criteria", json_schema_extra=AUTO
    )
    resources: RoleResources = RoleResources(cpus=0.5)
    sandbox: Literal["auto", "required", "off"] = Field(
        "auto",
        description="for programs that the model wrote: bubblewrap where it works, else limits "
        "alone; required: the run ends where it does not work; off: limits of time alone",
    )
    max_attempts: Positive = Field(3, description="tries per group before it is quarantined")
    max_concurrent_groups: Positive = Field(
        MAX_CONCURRENT_GROUPS, description="in flight per replica"
    )
    start_timeout_s: Seconds = Field(300.0, description="longest wait for a replica to start")
    max_restarts: int = Field(
        10,
        ge=0,
        description="replacements of dead replicas an hour; used ones come back",
    )


class ReferenceSpec(Spec):
    """Log-probs under the frozen model; used only where the algorithm has a KL term."""

    model: str | None = Field(None, description="default: the policy's starting model")
    replicas: Positive = Field(
        1, description="actors, each with the whole model", json_schema_extra=AUTO
    )
    resources: RoleResources = RoleResources()
    timeout_s: Seconds = Field(600.0, description="longest wait for one group")
    start_timeout_s: Seconds = Field(600.0, description="longest wait for a replica to load")
    max_restarts: int = Field(
        10,
        ge=0,
        description="replacements of dead replicas an hour; used ones come back",
    )


class OptimizerSpec(Spec):
    """AdamW and its learning rate."""

    learning_rate: float | None = Field(None, gt=0, description="default: the algorithm's")
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up, over all steps of the run"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises")
    adam_betas: tuple[Beta, Beta] | None = Field(None, description="default: the algorithm's")
    adam_epsilon: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW; biases and norms have none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to it")


class RankSpec(OptimizerSpec):
    """Ranks that train one model together."""

    role: ClassVar[str]
    moved: ClassVar[Mapping[str, str]] = {"deepspeed": "strategy={name: deepspeed, ...}"}

    strategy: StrategyField = Field(
        TorchSpec(),
        description="torch is one rank; deepspeed (ZeRO) and fsdp are one or more",
        json_schema_extra=AUTO,
    )
    ranks: Positive = Field(
        1, description="processes that share the update", json_schema_extra=AUTO
    )
    resources: RoleResources = RoleResources()
    tokens_per_microbatch: Positive = Field(
        16384, description="prompt and response, padding too", json_schema_extra=AUTO
    )
    packing: bool | Literal["auto"] = Field(
        "auto",
        description="rows of a micro-batch in one sequence, no padding; auto: where attention runs "
        "by variable length, which is on a GPU in bfloat16",
    )
    update_timeout_s: Seconds = Field(
        3600.0, description="longest wait for an update, an export or a checkpoint"
    )
    start_timeout_s: Seconds = Field(600.0, description="longest wait for the ranks to load")


LOGITS_BYTES = 64 * 2**20  # of a piece of the logits matrix, at least


class PolicySpec(RankSpec):
    """The trained model's ranks."""

    role: ClassVar[str] = "policy"

    tokens_per_chunk: Positive | None = Field(
        None,
        description="rows of the logits matrix at once; default: as many as take the memory of the "
        "output head's weights, and 64 MiB at least",
    )
    shared_prompts: bool = Field(
        False,
        description="a micro-batch has a group's prompt once, in the reference's passes too; rows "
        "are packed then",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="rebuilds of policy and critic an hour, of which used ones come back, and in "
        "a row without one step more",
    )


def rows_at_once(vocabulary: int, hidden: int) -> int:
    """Rows of the logits matrix at once, where `tokens_per_chunk` is left out: [rows, vocabulary]
    takes the memory of the output head, whose gradient is there too, or 64 MiB of float32."""
    return max(hidden, LOGITS_BYTES // (4 * vocabulary))


class CriticSpec(RankSpec):
    """The critic's ranks; used only where the algorithm has a critic."""

    role: ClassVar[str] = "critic"

    model: str | None = Field(
        None,
        description="a causal LM, whose values start at 0, or a reward model, whose scores they "
        "start from; it reads the policy's tokens. Default: the policy's starting model",
    )
