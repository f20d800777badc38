"""What each role can be told: small frozen settings, one class a role, composed by the config tree.

Light on purpose: importing this starts nothing and loads no framework.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """A frozen settings object that knows its keys and refuses others."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class LoRASpec(Spec):
    """Low-rank adapters through PEFT."""

    r: Positive = 16
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


class ModelSpec(Spec):
    """The model that is trained."""

    name: str = Field(description="a local folder or a hub name")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRASpec | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


class RoleResources(Spec):
    """What one replica or rank of a role takes from the cluster."""

    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)


class RolloutSpec(Spec):
    """Generation."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    replicas: Positive = 1
    resources: RoleResources = RoleResources()
    temperature: float = Field(1.0, gt=0)
    max_completion_length: Positive = 256
    max_prompt_length: Positive = 512
    max_concurrent_groups: Positive = Field(32, description="in flight per replica")
    generation_timeout_s: Seconds = 600.0
    start_timeout_s: Seconds = 600.0
    max_attempts: Positive = Field(3, description="tries per group before it is quarantined")
    max_restarts: int = Field(10, ge=0, description="replacements of dead replicas per run")
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    kv_cache_gib: float | None = Field(None, gt=0, description="vLLM on CPU; default 1 GiB there")
    engine_options: dict[str, Any] = Field(default={}, description="passed to the engine as is")


class RewardFunctionSpec(Spec):
    """One criterion."""

    function: str = Field(description="a registered name or package.module:function")
    name: str | None = Field(None, description="in metrics; default: the function's own name")
    weight: float = 1.0
    options: dict[str, Any] = Field(default={}, description="keyword arguments of every call")
    timeout_s: Seconds = 60.0


class RewardModelSpec(Spec):
    """A reward model as one criterion: a sequence classifier with one label."""

    model: str = Field(description="a local folder or a hub name")
    name: str | None = Field(None, description="in metrics; default: the last part of its path")
    weight: float = 1.0
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    apply_chat_template: bool = Field(
        True, description="false: prompt and completion are scored one after the other as text"
    )
    max_tokens: Positive | None = Field(
        None, description="of prompt and completion, never cut; default: the model's positions"
    )
    batch_size: Positive = Field(16, description="texts in one forward pass")
    timeout_s: Seconds = 120.0


class RewardActorSpec(Spec):
    """How rewards are run."""

    replicas: Positive = 1
    resources: RoleResources = RoleResources(cpus=0.5)
    max_attempts: Positive = Field(3, description="tries per group before it is quarantined")
    max_concurrent_groups: Positive = 16
    start_timeout_s: Seconds = 300.0
    max_restarts: int = Field(10, ge=0)


class ReferenceSpec(Spec):
    """Log-probs under the frozen model; used only where the algorithm has a KL term."""

    model: str | None = Field(None, description="default: the policy's starting model")
    replicas: Positive = 1
    resources: RoleResources = RoleResources()
    timeout_s: Seconds = 600.0
    start_timeout_s: Seconds = 600.0
    max_attempts: Positive = 3
    max_restarts: int = Field(10, ge=0)


class DeepSpeedSpec(Spec):
    """ZeRO."""

    stage: Literal[1, 2, 3] = 2
    offload: bool = Field(False, description="optimiser state and ZeRO-3 weights in CPU memory")


class PolicySpec(Spec):
    """The trained model's ranks."""

    strategy: Literal["torch", "deepspeed"] = "torch"
    ranks: Positive = 1
    resources: RoleResources = RoleResources()
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    learning_rate: float | None = Field(None, gt=0, description="default: the algorithm's")
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    adam_betas: tuple[float, float] | None = Field(None, description="default: the algorithm's")
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    tokens_per_microbatch: Positive = Field(16384, description="prompt and response, padding too")
    tokens_per_chunk: Positive = Field(1024, description="rows of the logits matrix at once")
    packing: bool = Field(False, description="rows of a micro-batch in one sequence, no padding")
    update_timeout_s: Seconds = 3600.0
    start_timeout_s: Seconds = 600.0
    max_restarts: int = Field(3, ge=0, description="rebuilds of the policy set per run")
