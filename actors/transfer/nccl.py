"""Weights over NCCL: rank 0 of the policy sends each version to the GPUs of every replica.

Rank 0 and each replica have a communicator of their own, made when they first meet. So whoever
dies, hangs or comes late concerns nobody else: rank 0 leaves it out, and the others get all.
Nobody can read later what was sent: a replica that starts reads the same version from the object
store, where it is put before it is sent.

Imports neither torch nor vLLM: the two sides are `NcclSender` and `actors.engines.vllm_nccl`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.transfer.base import Arrival, Ask, Offer

SENDER = "actors.transfer.nccl_sender:NcclSender"
PACKING = {
    "packed": True,
    "packed_buffer_size_bytes": 256 * 2**20,
    "packed_num_buffers": 2,
}
"""How both sides cut weights into buffers of GPU memory, under vLLM's own names."""
LOOK_S = 1.0  # between two looks at who still lives
MOST_IN_VAIN = 3  # versions in a row that reach nobody by a fault of NCCL's
GRACE_S = 10.0  # for rank 0 to end once every replica has
LEAVE_OUT_S = 60.0  # for rank 0 to leave replicas out


@dataclass(frozen=True)
class Meeting:
    """What rank 0 says before it sends."""

    address: str
    ports: Mapping[str, int]  # where it waits for each replica that it has not met
    names: tuple[str, ...]  # of the weights, in the order in which it sends them
    dtypes: tuple[str, ...]  # torch names
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Broadcast:
    """One version on its way to `replicas`, each of which has `workers` GPUs."""

    version: int
    replicas: tuple[str, ...]
    workers: int
    meeting: Meeting

    def arrival(self, replica: str) -> Arrival | None:
        """What a replica has vLLM's NCCL engine do; None: it is not sent this version."""
        if replica not in self.replicas:
            return None
        said = self.meeting
        update = {
            "names": list(said.names),
            "dtype_names": list(said.dtypes),
            "shapes": [list(shape) for shape in said.shapes],
        }
        if replica not in said.ports:
            return Arrival(self.version, update)
        meeting = {
            "master_address": said.address,
            "master_port": said.ports[replica],
            "rank_offset": 1,  # rank 0 is before its workers
            "world_size": 1 + self.workers,
            **PACKING,
        }
        return Arrival(self.version, update, meeting)


class Nccl:
    """`ask` has all ranks do something together, `beside` rank 0 alone, beside what it does;
    `serving()` names the replicas that get new weights now."""

    rereadable = False
    sent_fraction: float | None = None

    def __init__(
        self,
        ask: Ask,
        beside: Ask,
        serving: Callable[[], Collection[str]],
        *,
        workers: int,
        timeout_s: float,
    ) -> None:
        """`workers`: GPUs of a replica; `timeout_s`: for a replica to take weights."""
        self._ask = ask
        self._beside = beside
        self._serving = serving
        self._workers = workers
        # Of rank 0, which may wait for a replica until that is lost at its own deadline.
        self._deadline_s = 2 * timeout_s + LEAVE_OUT_S
        self._in_vain = 0

    async def publish(self, version: int, receive: Callable[[Offer], Awaitable[None]]) -> Offer:
        """Have rank 0 send beside the receivers. Where it fails they are told to give up, which
        ends their engines: weights that are half there cannot be served.

        Raises RuntimeError where NCCL fails for all, time after time: that is no death of replicas.
        """
        replicas = tuple(sorted(self._serving()))
        meeting = await self._all("meet", replicas)
        sent = Broadcast(version, replicas, self._workers, meeting)
        offer = Offer(version, sent, "receive_weights")
        sending = asyncio.ensure_future(self._all("send", 1 + self._workers))
        receiving = asyncio.ensure_future(receive(offer))
        try:
            failed = await self._until_sent(replicas, sending, receiving)
            await receiving
        finally:
            for task in (sending, receiving):
                task.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)
        self._in_vain = self._in_vain + 1 if replicas and failed.keys() >= set(replicas) else 0
        if self._in_vain == MOST_IN_VAIN:
            raise RuntimeError(
                f"rollout.weight_sync=nccl: no replica took {MOST_IN_VAIN} versions in a row: "
                f"{next(iter(failed.values()))}; NCCL_DEBUG=INFO tells more, "
                "rollout.weight_sync=full does without NCCL"
            )
        return offer

    async def _until_sent(
        self, replicas: Sequence[str], sending: asyncio.Future[Any], receiving: asyncio.Future[None]
    ) -> Mapping[str, str]:
        """Wait for rank 0, and have it leave out whom it would wait for in vain: replicas that are
        lost, and when all have answered whoever is left. Raises what rank 0 raised, and returns
        what NCCL said of replicas that got nothing."""
        out: set[str] = set()
        while not sending.done():
            answered = receiving.done()
            await asyncio.wait(
                (sending,) if answered else (sending, receiving),
                timeout=GRACE_S if answered else LOOK_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            gone = set(replicas) - (set() if answered else set(self._serving())) - out
            if gone and not sending.done():
                call = ("leave_out", tuple(sorted(gone)))
                await self._beside(SENDER, *call, deadline_s=LEAVE_OUT_S)
                out |= gone
        answer: Mapping[str, str] = sending.result()
        return answer

    async def _all(self, method: str, *args: Any) -> Any:
        return await self._ask(SENDER, method, *args, deadline_s=self._deadline_s)


def check_library() -> None:
    """Raise ValueError where vLLM would go on without NCCL: its communicators then send nothing,
    and say nothing."""
    import vllm.envs
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    cure = "or use rollout.weight_sync=full"
    if vllm.envs.VLLM_DISABLE_PYNCCL:
        raise ValueError(f"rollout.weight_sync=nccl: VLLM_DISABLE_PYNCCL is set; unset it, {cure}")
    try:
        NCCLLibrary()
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"rollout.weight_sync=nccl: vLLM cannot load NCCL here ({error}); have it on a GPU "
            f"with vllm's CUDA build, {cure}"
        ) from error
