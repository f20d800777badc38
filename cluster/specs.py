"""What the user says of the cluster. Light: importing this starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ClusterSpec(BaseModel):
    """Where the run's actors live."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    address: str = Field(
        "local",
        description="'local' starts Ray on this machine; 'auto' or host:port joins a cluster; "
        "RAY_ADDRESS, which Ray Jobs set, takes the place of 'local'",
    )
    placement_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="longest wait for a place for every role"
    )
    colocate: list[list[str]] = Field(
        default=[],
        description="roles that share places: replica i of each has one bundle and one GPU, as in "
        "[[policy, rollout]]",
        json_schema_extra={"auto": True},  # decided by the machines unless somebody has set it
    )
    object_store_gib: float | None = Field(None, gt=0, description="for a Ray started here")
    worker_logs: bool = Field(False, description="print the actors' output in this terminal")

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, given: Any) -> Any:
        """`colocate: auto` leaves it open; the address may be `auto`, which is another thing."""
        if isinstance(given, Mapping) and given.get("colocate") == "auto":
            return {key: value for key, value in given.items() if key != "colocate"}
        return given
