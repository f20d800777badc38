"""NCCL and GPU streams, stood in for on a CPU: everything else of vLLM's transfer engines is real.

Two processes meet in vLLM's own process group, and a broadcast goes through its store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


class Communicator:
    """In place of vLLM's `PyNcclCommunicator`."""

    def __init__(self, group: Any, device: Any) -> None:
        self.group = group
        self.device = torch.device("cpu")
        self.destroyed = False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """As NCCL's: rank `src` sends, the others wait for it."""
        got = self.group.broadcast(tensor, src)
        if src != self.group.rank:
            tensor.copy_(got)

    def destroy(self) -> None:
        """Leave the others."""
        self.destroyed = True


class Stream:
    """Of a GPU that is never behind."""

    def synchronize(self) -> None:
        """Nothing is under way."""


def stand_in(put: Callable[[Any, str, Any], None]) -> None:
    """Have vLLM do without GPUs; `put` is `setattr`, or one that takes it back."""
    from vllm.distributed.device_communicators import pynccl, pynccl_wrapper
    from vllm.distributed.weight_transfer import packed_tensor

    put(pynccl, "PyNcclCommunicator", Communicator)
    put(pynccl_wrapper, "NCCLLibrary", lambda: None)
    put(packed_tensor, "_get_streams", lambda device, number: (Stream(),) * number)
    put(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    put(torch.accelerator, "current_device_index", lambda: 0)
