"""The rollout engines that a config can name, and the options of each."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from actors.settings import AUTO, Choice, OneOf, Positive


class EngineSpec(Choice):
    """What generates."""

    implementation: ClassVar[str]
    """The `RolloutEngine`, as module:Class; imported by the rollout replicas alone."""
    package: ClassVar[str]
    """What it runs on, whose version is in the records."""
    reads_checkpoints: ClassVar[bool] = False
    """Whether it takes weights as a checkpoint has them; else as transformers' model does."""

    @property
    def shards(self) -> int:
        """GPUs of one replica, where it has any."""
        return 1


class AutoEngineSpec(EngineSpec):
    """vLLM where it is installed, else transformers, as they are without options."""

    name: Literal["auto"] = "auto"


COMPILING = ("enforce_eager", "compilation_config", "optimization_level")
"""vLLM's own options that say what it compiles."""


class VLLMSpec(EngineSpec):
    """vLLM."""

    implementation: ClassVar[str] = "actors.engines.vllm:VLLMEngine"
    package: ClassVar[str] = "vllm"
    reads_checkpoints: ClassVar[bool] = True

    name: Literal["vllm"] = "vllm"
    tensor_parallel_size: Positive = Field(
        1, description="GPUs of one replica", json_schema_extra=AUTO
    )
    gpu_memory_utilization: float = Field(
        0.85, gt=0, le=1, description="share of the GPU that vLLM takes", json_schema_extra=AUTO
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="keys and values; on a GPU that others share what the plan counts, on one of "
        "its own what vLLM finds free of its share, on CPU 1",
        json_schema_extra=AUTO,
    )
    compiles: bool = Field(
        False,
        description="the model, on a CPU; auto: where an engine has several threads and may sample "
        "a million tokens in the run. On GPUs vLLM decides",
        json_schema_extra=AUTO,
    )
    options: dict[str, Any] = Field(
        default={},
        description="fields of vLLM's AsyncEngineArgs, passed on as they are; `max_num_seqs` and "
        "`max_num_batched_tokens` follow from the groups in flight unless they are set here",
    )

    @property
    def shards(self) -> int:
        """Tensor-parallel ones."""
        return self.tensor_parallel_size


class TransformersSpec(EngineSpec):
    """transformers' own generation, one group at a time."""

    implementation: ClassVar[str] = "actors.engines.transformers:TransformersEngine"
    package: ClassVar[str] = "transformers"

    name: Literal["transformers"] = "transformers"


ENGINES: dict[str, type[EngineSpec]] = {
    "auto": AutoEngineSpec,
    "vllm": VLLMSpec,
    "transformers": TransformersSpec,
}
EngineField = Annotated[EngineSpec, OneOf(ENGINES)]
