"""What a config can say of how weights get to the rollout replicas."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from actors.settings import Choice, OneOf


class WeightSyncSpec(Choice):
    """What is sent of each version, and how."""

    engine: ClassVar[str | None] = None
    """The rollout engine that can take it; None: any."""
    vllm_workers: ClassVar[str] = "actors.engines.vllm_transfer"
    """The module that vLLM's workers import: `BACKEND` and `WorkerExtension`."""


class FullSpec(WeightSyncSpec):
    """All weights, LoRA merged into them."""

    name: Literal["full"] = "full"


class DeltaSpec(WeightSyncSpec):
    """The weights that have changed, LoRA merged into them; policy and replicas keep a copy."""

    name: Literal["delta"] = "delta"


class AdapterSpec(WeightSyncSpec):
    """The LoRA adapter, which engines compute beside the weights that they started with."""

    name: Literal["adapter"] = "adapter"


class NcclSpec(WeightSyncSpec):
    """All weights, LoRA merged into them, from GPU to GPU."""

    engine: ClassVar[str | None] = "vllm"
    vllm_workers: ClassVar[str] = "actors.engines.vllm_nccl"

    name: Literal["nccl"] = "nccl"


class IpcSpec(WeightSyncSpec):
    """All weights, LoRA merged into them, out of the memory of a GPU that both are on."""

    engine: ClassVar[str | None] = "vllm"
    vllm_workers: ClassVar[str] = "actors.engines.vllm_ipc"

    name: Literal["ipc"] = "ipc"


WEIGHT_SYNCS: dict[str, type[WeightSyncSpec]] = {
    "full": FullSpec,
    "delta": DeltaSpec,
    "adapter": AdapterSpec,
    "nccl": NcclSpec,
    "ipc": IpcSpec,
}
WeightSyncField = Annotated[WeightSyncSpec, OneOf(WEIGHT_SYNCS)]
