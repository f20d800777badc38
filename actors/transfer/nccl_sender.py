"""A policy rank's side of weights over NCCL: rank 0 sends, through vLLM's own sender.

vLLM 0.32's `NCCLTrainerWeightTransferEngine` iterates over the weights, packs them into buffers and
broadcasts each; the other ranks iterate beside it, since gathering is theirs too. It is given no
client: the driver asks the replicas. In place of one communicator it is given `Pairs`.

vLLM is imported by the first `meet`: whoever sends weights otherwise does without it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from actors.strategies.base import Strategy
from actors.transfer.nccl import PACKING, Meeting, check_library
from actors.whereabouts import node_address

log = logging.getLogger(__name__)

MEET_S = 30  # for all workers of a replica to come to where rank 0 waits for them


class Pairs:
    """The communicators of rank 0, one for each replica; to vLLM's sender, one communicator.

    A replica that is left out costs the others nothing, also where rank 0 is waiting for it: what
    is under way to it is aborted. `leave_out` is for another thread than the one that sends.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._out: set[str] = set()
        self._lock = threading.Lock()  # no communicator is used while it is destroyed

    def begin(self, replicas: Collection[str]) -> list[str]:
        """Let go of all but `replicas`; returns which of these have to be met."""
        self.leave_out([name for name in self._made if name not in replicas])
        self._out = set()
        return [name for name in replicas if name not in self._made]

    def add(self, name: str, communicator: Any) -> None:
        """Send to this replica too, unless it has been left out meanwhile."""
        with self._lock:
            if name in self._out:
                communicator.destroy()
            else:
                self._made[name] = communicator

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Send `tensor` to each replica, one after the other in the current stream."""
        for name in list(self._made):
            with self._lock:
                if name in self._made:
                    self._made[name].broadcast(tensor, src=src, stream=stream)

    def leave_out(self, replicas: Collection[str]) -> None:
        """Send to these no more."""
        with self._lock:
            self._out |= set(replicas)
            for name in replicas:
                if (communicator := self._made.pop(name, None)) is not None:
                    communicator.destroy()


class NcclSender:
    """Of one rank, whose weights `strategy` has."""

    def __init__(self, strategy: Strategy) -> None:
        """Nothing is sent yet. Raises ValueError where NCCL cannot be used here."""
        self._strategy = strategy
        self._pairs = Pairs()
        self._doors: dict[str, socket.socket] = {}
        self._described: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        if strategy.rank == 0:
            check_library()

    def meet(self, replicas: Sequence[str]) -> Meeting:
        """What is sent next, and where rank 0 waits for those of `replicas` whom it has not met;
        all ranks together."""
        if not self._described:  # the same at every version
            self._described = [
                (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._weights()
            ]
        for door in self._doors.values():  # to those who never came
            door.close()
        self._doors = {}
        address = node_address()
        if self._strategy.rank == 0:
            for name in self._pairs.begin(replicas):
                self._doors[name] = socket.create_server((address, 0))
        return Meeting(
            address,
            {name: door.getsockname()[1] for name, door in self._doors.items()},
            tuple(name for name, _, _ in self._described),
            tuple(str(dtype).removeprefix("torch.") for _, dtype, _ in self._described),
            tuple(shape for _, _, shape in self._described),
        )

    def send(self, world: int) -> None:
        """Send the weights to all who were met, and first meet the others, each in a communicator
        of `world` ranks; all ranks together."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        first = self._strategy.rank == 0
        if first:
            self._open(world)
        engine = NCCLTrainerWeightTransferEngine(
            client=_Nobody(), source=_Source(self), is_sender=first, **PACKING
        )
        engine.model_update_group = self._pairs if first else None
        engine.send_weights()

    def leave_out(self, replicas: Collection[str]) -> None:
        """Go on without these; for rank 0 alone, beside `send`."""
        self._pairs.leave_out(replicas)

    def _open(self, world: int) -> None:
        """Wait for each replica at its door. One that does not come is left out."""
        doors, self._doors = self._doors, {}
        for name, door in doors.items():
            address, port = door.getsockname()[:2]
            try:
                self._pairs.add(name, communicator(address, port, world, door))
            except (torch.distributed.DistError, OSError) as error:  # vLLM closes the door twice
                log.warning("%s gets no weights: it did not come to be sent them: %s", name, error)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole weight on this rank's device); all ranks together."""
        for name, tensor in self._strategy.full_state():
            yield name, tensor.to(self._strategy.device)


def communicator(address: str, port: int, world: int, door: socket.socket) -> Any:
    """Rank 0's communicator of `world` ranks, the others of which come to `door`. Raises DistError
    or OSError where they do not come within `MEET_S`."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    group = StatelessProcessGroup.create(
        address, port, 0, world, store_timeout=MEET_S, listen_socket=door
    )
    with unpinned_nccl_env():
        return PyNcclCommunicator(group, device=torch.accelerator.current_device_index())


class _Source:
    """The weights as vLLM's sender iterates over them."""

    def __init__(self, sender: NcclSender) -> None:
        self._sender = sender

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(*described) for described in self._sender._described]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._sender._weights()


class _Nobody:
    """Whom vLLM's sender asks to receive: the driver has asked the replicas."""

    def init_weight_transfer_engine(self, init_info: Any) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
