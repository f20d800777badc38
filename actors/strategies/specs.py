"""The strategies that a config can name, the options of each, and what a plan must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from actors.settings import Choice, OneOf


@dataclass(frozen=True)
class Sharding:
    """How a strategy keeps what is trained. True: each rank has its share of it alone."""

    optimiser: bool = False
    gradients: bool = False
    weights: bool = False
    offload: bool = False  # optimiser state, and weights that are sharded, in the host's memory
    master: bool = False  # the optimiser has a float32 copy of weights, which are in model.dtype
    bucket: int = 0  # elements of gradients that are reduced at once; 0: those of a layer
    live: int = 0  # elements of sharded weights that stay gathered; 0: those of two layers


class StrategySpec(Choice):
    """A way to store and step the weights of ranks that train one model."""

    implementation: ClassVar[str]
    """The `Strategy`, as module:Class; imported by the ranks alone."""
    several: ClassVar[bool] = True
    """Whether there may be more than one rank."""
    reshards: ClassVar[bool] = False
    """Whether a checkpoint loads on another number of ranks."""

    @property
    def sharding(self) -> Sharding:
        """What each rank keeps."""
        return Sharding()

    def alternatives(self) -> tuple[StrategySpec, ...]:
        """What a plan may advise in place of this."""
        return ()


class TorchSpec(StrategySpec):
    """Plain PyTorch."""

    implementation: ClassVar[str] = "actors.strategies.torch:TorchStrategy"
    several: ClassVar[bool] = False

    name: Literal["torch"] = "torch"

    def alternatives(self) -> tuple[StrategySpec, ...]:
        """ZeRO, which runs on one rank too."""
        return DeepSpeedSpec().alternatives()


class DeepSpeedSpec(StrategySpec):
    """ZeRO."""

    implementation: ClassVar[str] = "actors.strategies.deepspeed:DeepSpeedStrategy"
    largest_bucket: ClassVar[int] = 200_000_000
    """Elements reduced at once. DeepSpeed makes a buffer of this size, however small the model."""
    most_live: ClassVar[int] = 1_000_000_000
    """Its stage3_max_live_parameters."""

    name: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = Field(
        2, description="what is sharded: 1 optimiser state, 2 gradients too, 3 weights too"
    )
    offload: bool = Field(False, description="optimiser state and ZeRO-3 weights in CPU memory")

    @property
    def sharding(self) -> Sharding:
        """As the stage says."""
        return Sharding(
            optimiser=True,
            gradients=self.stage > 1,
            weights=self.stage > 2,
            offload=self.offload,
            master=True,
            bucket=self.largest_bucket,
            live=self.most_live,
        )

    def alternatives(self) -> tuple[StrategySpec, ...]:
        """Every stage, with and without offload."""
        return tuple(
            DeepSpeedSpec(stage=stage, offload=offload)
            for stage in (1, 2, 3)
            for offload in (False, True)
        )


class FSDPSpec(StrategySpec):
    """PyTorch's own sharding of everything, FSDP2."""

    implementation: ClassVar[str] = "actors.strategies.fsdp:FSDPStrategy"
    reshards: ClassVar[bool] = True

    name: Literal["fsdp"] = "fsdp"

    @property
    def sharding(self) -> Sharding:
        """All of it."""
        return Sharding(optimiser=True, gradients=True, weights=True)


STRATEGIES: dict[str, type[StrategySpec]] = {
    "torch": TorchSpec,
    "deepspeed": DeepSpeedSpec,
    "fsdp": FSDPSpec,
}
StrategyField = Annotated[StrategySpec, OneOf(STRATEGIES)]
