"""A policy rank's side of weights out of its GPU's memory, as vLLM 0.32's IPC engine opens them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from actors.models.checkpoint_names import checkpoint_weights
from actors.strategies.base import Strategy
from actors.transfer.bundle import dtype_name
from actors.transfer.ipc import Shared


class IpcSender:
    """Of one rank, whose weights `strategy` has."""

    def __init__(self, strategy: Strategy) -> None:
        """Nothing is shared yet."""
        self._strategy = strategy
        self._kept: list[torch.Tensor] = []  # a handle alone keeps no memory

    def share(self, version: int, replicas: Mapping[str, int]) -> Shared | None:
        """Have the GPU of each rank whose replica is among `replicas` (name: index, which is that
        of the rank) hold all weights until `let_go`; all ranks together, and rank 0 answers for
        all.

        What the ranks share are copies, unless a weight is whole on its rank, in the model's dtype
        and without LoRA.
        """
        self.let_go()
        shares = self._strategy.rank in replicas.values()
        described: list[tuple[str, str, tuple[int, ...]]] = []
        kept = []
        weights = checkpoint_weights(self._strategy.model.unwrapped, self._strategy.full_state())
        for name, tensor in weights:  # all ranks gather it together
            described.append((name, dtype_name(tensor), tuple(tensor.shape)))
            if shares:
                kept.append(tensor.detach().to(self._strategy.device).contiguous())
        self._kept = kept
        own = [reduce_tensor(tensor)[1] for tensor in kept]
        if shares:
            torch.cuda.synchronize()
        ranks = self._strategy.gather((_gpu(), own))
        if self._strategy.rank > 0:
            return None
        names, dtypes, shapes = zip(*described, strict=True)
        handles: list[dict[str, Any]] = [
            {gpu: of_rank[index] for gpu, of_rank in ranks if of_rank}
            for index in range(len(described))
        ]
        with_rank = tuple(name for name, index in replicas.items() if index < len(ranks))
        return Shared(version, with_rank, names, dtypes, shapes, pickle.dumps(handles))

    def let_go(self) -> None:
        """Share no more; all ranks together."""
        if self._kept:
            self._kept = []
            torch.cuda.ipc_collect()


def _gpu() -> str:
    """The id of this rank's GPU, which its replica knows it by."""
    return str(torch.cuda.get_device_properties(torch.accelerator.current_device_index()).uuid)
