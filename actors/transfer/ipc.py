"""Weights out of the policy's own GPU memory: each replica opens what the rank on its GPU shares.

Replica `i` is on the GPU of rank `i`. A rank whose replica serves keeps a whole version until every
replica has loaded it; then it is gone, so one that starts later reads the same version from the
object store, where it is put before. The others share nothing: torch keeps what is shared until it
was opened, and for ever where nobody opens it.

Imports neither torch nor vLLM: the two sides are `IpcSender` and `actors.engines.vllm_ipc`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from actors.transfer.base import Arrival, Ask, Offer

SENDER = "actors.transfer.ipc_sender:IpcSender"


@dataclass(frozen=True)
class Shared:
    """A version in the memory of the ranks' GPUs."""

    version: int
    replicas: tuple[str, ...]  # whose ranks share it
    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # torch names
    shapes: tuple[tuple[int, ...], ...]
    handles: bytes
    """Pickled: of each weight, how to open it by the GPU that it is on."""

    def arrival(self, replica: str) -> Arrival | None:
        """What a replica has vLLM's IPC engine do; None: its rank does not share this version."""
        if replica not in self.replicas:
            return None
        update = {
            "names": list(self.names),
            "dtype_names": list(self.dtypes),
            "shapes": [list(shape) for shape in self.shapes],
            "handles": self.handles,
        }
        return Arrival(self.version, update)


class Ipc:
    """`ask` has all ranks do something together; `serving()` names the replicas that get new
    weights now, each with its index."""

    rereadable = False
    sent_fraction: float | None = None

    def __init__(
        self, ask: Ask, serving: Callable[[], Mapping[str, int]], *, timeout_s: float
    ) -> None:
        """`timeout_s`: for the ranks to share a version, or to let go of it."""
        self._ask = ask
        self._serving = serving
        self._timeout_s = timeout_s

    async def publish(self, version: int, receive: Callable[[Offer], Awaitable[None]]) -> Offer:
        """Have the ranks share a version, the replicas load it, and the ranks let go of it.

        Where a replica is lost the ranks wait for nothing of it. Where this fails they let go as
        they share the next one, or end.
        """
        replicas = dict(self._serving())
        shared = await self._ask(SENDER, "share", version, replicas, deadline_s=self._timeout_s)
        offer = Offer(version, shared, "receive_weights")
        await receive(offer)
        await self._ask(SENDER, "let_go", deadline_s=self._timeout_s)
        return offer
