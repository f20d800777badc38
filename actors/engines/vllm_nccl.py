"""Weights into vLLM that rank 0 of the policy sends over NCCL: what runs inside its workers.

vLLM 0.32 has one transfer engine a process. This one is two: vLLM's own NCCL engine for versions
that are sent while the replica serves, and the object store's for the one that it starts with.
Naming this module as the worker extension registers it.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
)

from actors.engines.vllm_transfer import (
    ObjectStoreInitInfo,
    ObjectStoreWeightTransferEngine,
)
from actors.engines.vllm_transfer import WorkerExtension as WorkerExtension
from actors.transfer.nccl import check_library

BACKEND = "object_store_and_nccl"


class SentWeightTransferEngine(ObjectStoreWeightTransferEngine):
    """Takes a version from a memory file (`path`), or as rank 0 sends it."""

    def __init__(self, *args: Any) -> None:
        """vLLM's arguments. Raises ValueError where NCCL cannot be used here."""
        check_library()
        super().__init__(*args)
        self._nccl = NCCLWeightTransferEngine(*args)

    def parse_init_info(
        self, init_dict: dict[str, Any]
    ) -> ObjectStoreInitInfo | NCCLWeightTransferInitInfo:
        """Nothing, as the engine starts; later where rank 0 waits for it."""
        if init_dict:
            return self._nccl.parse_init_info(init_dict)
        return super().parse_init_info(init_dict)

    def init_transfer_engine(
        self, init_info: ObjectStoreInitInfo | NCCLWeightTransferInitInfo
    ) -> None:
        """Meet rank 0; the one that was met before is gone."""
        if isinstance(init_info, NCCLWeightTransferInitInfo):
            self._nccl.shutdown()
            self._nccl.init_transfer_engine(init_info)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a version from where `update_info` says. Raises ValueError where it does not cover
        the model."""
        if "path" in update_info:
            super().update_weights(update_info)
        else:
            self._receive_by(self._nccl, self._nccl.parse_update_info(update_info))

    def shutdown(self) -> None:
        """Leave rank 0."""
        self._nccl.shutdown()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SentWeightTransferEngine)
