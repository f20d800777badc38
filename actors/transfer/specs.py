"""What a config can say of how weights get to the rollout replicas."""

from __future__ import annotations

from typing import Annotated, Literal

from actors.settings import Choice, OneOf


class WeightSyncSpec(Choice):
    """What is sent of each version."""


class FullSpec(WeightSyncSpec):
    """All weights, LoRA merged into them."""

    name: Literal["full"] = "full"


class DeltaSpec(WeightSyncSpec):
    """The weights that have changed, LoRA merged into them; policy and replicas keep a copy."""

    name: Literal["delta"] = "delta"


class AdapterSpec(WeightSyncSpec):
    """The LoRA adapter, which engines compute beside the weights that they started with."""

    name: Literal["adapter"] = "adapter"


WEIGHT_SYNCS: dict[str, type[WeightSyncSpec]] = {
    "full": FullSpec,
    "delta": DeltaSpec,
    "adapter": AdapterSpec,
}
WeightSyncField = Annotated[WeightSyncSpec, OneOf(WEIGHT_SYNCS)]
