"""Weights into vLLM out of the policy's own GPU memory: what runs inside its workers.

Beside the object store's engine, for the version that a replica starts with, this has vLLM's own
IPC engine, which opens what a rank on the same GPU has shared. Naming this module as the worker
extension registers it.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)

from actors.engines.vllm_transfer import ObjectStoreWeightTransferEngine
from actors.engines.vllm_transfer import WorkerExtension as WorkerExtension

BACKEND = "object_store_and_ipc"


class SharedWeightTransferEngine(ObjectStoreWeightTransferEngine):
    """Takes a version from a memory file (`path`), or from where `handles` say."""

    def __init__(self, *args: Any) -> None:
        """vLLM's arguments."""
        super().__init__(*args)
        self._ipc = IPCWeightTransferEngine(*args)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a version from where `update_info` says. Raises ValueError where it does not cover
        the model, or where no rank shares this GPU."""
        if "path" in update_info:
            super().update_weights(update_info)
            return
        told = dict(update_info)
        handles = pickle.loads(told.pop("handles"))  # vLLM's RPC carries bytes and no classes
        self._receive_by(self._ipc, IPCWeightTransferUpdateInfo(**told, ipc_handles=handles))

    def finish_weight_update(self) -> None:
        """As from a file; nothing reads the ranks' memory any more when this returns."""
        super().finish_weight_update()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Let go of what was opened."""
        self._ipc.shutdown()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedWeightTransferEngine)
