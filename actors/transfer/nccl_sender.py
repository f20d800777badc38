"""A policy rank's side of weights over NCCL: rank 0 sends, through vLLM's own sender.

vLLM 0.32's `NCCLTrainerWeightTransferEngine` iterates over the weights, packs them into buffers and
broadcasts each; the other ranks iterate beside it, since gathering is theirs too. It is given no
client: the driver asks the replicas. In place of one communicator it is given `Pairs`.

vLLM is imported by the first `meet`: whoever sends weights otherwise does without it.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch

from actors.models.checkpoint_names import checkpoint_weights
from actors.strategies.base import Strategy
from actors.transfer.nccl import PACKING, Meeting, check_library
from actors.whereabouts import node_address

log = logging.getLogger(__name__)

MEET_S = 30  # for all workers of all replicas to come to where rank 0 waits for them


class Pairs:
    """The communicators of rank 0, one for each replica; to vLLM's sender, one communicator.

    A replica that is left out costs the others nothing, also where rank 0 is waiting for it: what
    is under way to it is aborted. `leave_out` is for another thread than the one that sends.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._out: set[str] = set()
        self.failed: dict[str, str] = {}  # why by replica, of those that NCCL said were gone
        self._lock = threading.Lock()  # no communicator is used while it is destroyed

    def begin(self, replicas: Collection[str]) -> list[str]:
        """Let go of all but `replicas`; returns which of these have to be met."""
        self.leave_out([name for name in self._made if name not in replicas])
        self._out, self.failed = set(), {}
        return [name for name in replicas if name not in self._made]

    def add(self, name: str, communicator: Any) -> None:
        """Send to this replica too, unless it has been left out meanwhile."""
        with self._lock:
            if name in self._out:
                communicator.destroy()
            else:
                self._made[name] = communicator

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Send `tensor` to each replica, one after the other in the current stream. One whose
        connection is broken is left out."""
        for name in list(self._made):
            with self._lock:
                if (communicator := self._made.get(name)) is None:
                    continue
                try:
                    communicator.broadcast(tensor, src=src, stream=stream)
                except RuntimeError as error:
                    self.none_for(name, error)
                    self._without(name)

    def none_for(self, name: str, error: RuntimeError) -> None:
        """Take it that a replica is gone, and log it. Raises `error` where it says something else:
        stores have a class of their own, and vLLM's NCCL names itself."""
        if str(error).startswith("NCCL error"):
            self.failed[name] = str(error)
        elif not isinstance(error, torch.distributed.DistError):
            raise error
        log.warning("%s gets no weights: %s", name, error)

    def leave_out(self, replicas: Collection[str]) -> None:
        """Send to these no more."""
        with self._lock:
            for name in replicas:
                self._without(name)

    def _without(self, name: str) -> None:
        self._out.add(name)
        if (communicator := self._made.pop(name, None)) is not None:
            communicator.destroy()


class NcclSender:
    """Of one rank, whose weights `strategy` has."""

    def __init__(self, strategy: Strategy) -> None:
        """Nothing is sent yet. Raises ValueError where NCCL cannot be used here."""
        self._strategy = strategy
        self._pairs = Pairs()
        self._doors: dict[str, socket.socket] = {}
        self._news: _News = queue.SimpleQueue()
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
        self._doors, self._news = {}, queue.SimpleQueue()
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

    def send(self, world: int) -> dict[str, str]:
        """Send the weights to all who were met, and first meet the others, each in a communicator
        of `world` ranks; all ranks together. Returns what NCCL said of replicas that got none."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        first = self._strategy.rank == 0
        if first:
            self._open(world)
        engine = NCCLTrainerWeightTransferEngine(
            client=_Nobody(), source=_Source(self), is_sender=first, **PACKING
        )
        engine.model_update_group = self._pairs if first else None
        engine.send_weights()
        return self._pairs.failed

    def leave_out(self, replicas: Collection[str]) -> None:
        """Go on without these; for rank 0 alone, beside `send`."""
        self._pairs.leave_out(replicas)
        for name in replicas:
            self._news.put((name, None))

    def _open(self, world: int) -> None:
        """Wait at all doors at once, and meet the replicas in the order in which they come. One
        that does not come is left out; one that was left out is not waited for."""
        doors, self._doors = self._doors, {}
        for name, door in doors.items():
            args = (name, door, world, self._news)
            threading.Thread(target=_wait_at, args=args, name=f"meet {name}", daemon=True).start()
        waited = set(doors)
        while waited:
            name, came = self._news.get()  # each door has its own deadline
            if name not in waited:
                continue
            waited.remove(name)
            try:
                if isinstance(came, Exception):
                    raise came
                if came is not None:
                    self._pairs.add(name, communicator(came))
            except RuntimeError as error:
                self._pairs.none_for(name, error)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(the checkpoint's name, whole weight on this rank's device); all ranks together."""
        weights = checkpoint_weights(self._strategy.model.unwrapped, self._strategy.full_state())
        for name, tensor in weights:
            yield name, tensor.to(self._strategy.device)


_News = queue.SimpleQueue[tuple[str, Any]]
"""(replica, its process group; or why it did not come; or None: it was left out)."""


def _wait_at(name: str, door: socket.socket, world: int, news: _News) -> None:
    """Tell `news` once the other ranks of `world` have come to `door`, or have not in `MEET_S`."""
    from vllm.distributed.utils import StatelessProcessGroup

    address, port = door.getsockname()[:2]
    try:
        # As `StatelessProcessGroup.create`, which where nobody comes closes the door's number once
        # more when it may be another's.
        store = torch.distributed.TCPStore(
            address,
            port,
            world,
            is_master=True,
            timeout=timedelta(seconds=MEET_S),
            master_listen_fd=door.detach(),
            use_libuv=False,
        )
        news.put((name, StatelessProcessGroup(0, world, store)))
    except Exception as error:  # noqa: BLE001 - whoever waits for the news raises it
        news.put((name, error))


def communicator(group: Any) -> Any:
    """Rank 0's communicator with the others of a process group of vLLM's. Raises RuntimeError, as
    NCCL's.

    vLLM gives a thread whose stream it has not seen set another one for good. Training goes on in
    the stream it was in: it would leave the memory that was freed in the other one unused.
    """
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.utils.nccl import unpinned_nccl_env

    on_gpu = torch.cuda.is_available()
    as_now = torch.cuda.stream(torch.cuda.current_stream()) if on_gpu else nullcontext()
    with unpinned_nccl_env(), as_now:
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
