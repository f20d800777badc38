"""The modules that the workers of a run import: one process does it for all of them.

Only what is slow to import and the same for every worker. What is missing here is imported by the
workers themselves, as before. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.forks import agree, wire

if TYPE_CHECKING:
    from aligntune.config.online import RunConfig
    from aligntune.config.preference import PreferenceConfig

MODELS = (
    "numpy",
    "torch",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "safetensors.torch",
)
WORKERS = ("ray._private.workers.default_worker", "ray.actor")
ROLES = ("actors.policy", "actors.reward", "actors.rollout", "actors.engines.transformers")
DEEPSPEED = ("deepspeed",)
FSDP = ("torch.distributed.fsdp", "torch.distributed.checkpoint")
LORA = ("peft",)
TRL = ("datasets", "accelerate", "trl", "ray.train.torch")
VLLM = (
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.sample.sampler",
    "vllm.engine.arg_utils",
    "vllm.v1.worker.gpu_worker",  # most of the one for CPUs too
    "vllm.v1.engine.core",  # what an engine's process runs, which is forked then
    "vllm.v1.executor.multiproc_executor",  # so are those of tensor parallelism
    "vllm.v1.engine.async_llm",
)


def of_online(config: RunConfig) -> tuple[str, ...]:
    """What the actors of an online run import; a policy through Unsloth starts by itself."""
    strategies = {config.policy.strategy.name, config.critic.strategy.name}
    modules: tuple[str, ...] = MODELS
    if config.rollout.engine.name == "vllm":
        modules += VLLM
    if "deepspeed" in strategies:
        modules += DEEPSPEED
    if "fsdp" in strategies:
        modules += FSDP
    if config.model.lora is not None:
        modules += LORA
    return modules + WORKERS + ROLES


def of_preference(config: PreferenceConfig) -> tuple[str, ...]:
    """What the workers of a preference job import."""
    return () if config.backend == "unsloth" else MODELS + LORA + TRL + WORKERS


def variables_of(threads: int | None, gpus: float, by_itself: bool) -> dict[str, str]:
    """The variables of a worker that computes in `threads` threads; without, Ray sets them to the
    CPUs that are reserved. Without `gpus` it sees no GPU. `by_itself`: it changes modules that must
    not be imported before."""
    limited = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    hidden = {} if gpus else {agree.NO_GPU: "1"}
    return limited | hidden | ({wire.SOCKET: "off"} if by_itself else {})
