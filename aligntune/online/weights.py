"""Brings the policy's weights to the rollout replicas, over a transport.

Invariant: a rollout replica takes no group before it has the weights of the current version, and is
never left with older ones than the last `bring` brought, whenever it started. When they are brought
is decided in `handover`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from ray.actor import ActorHandle

from actors.answers import ObjectsLost, ReplicaLost, answer
from actors.supervise import ReplicaSet
from actors.transfer.base import Offer, Refused, Transport
from actors.waiting import unless
from aligntune.errors import RunFailed
from aligntune.online.ignoring import ignore
from aligntune.online.learner import WEIGHTS_LIMIT, PolicyLost
from aligntune.tracking.metrics import EventKind

T = TypeVar("T")
Clear = Callable[[], Awaitable[None]]


async def at_once() -> None:
    """Nothing is in the way of new weights."""


def nobody() -> int:
    """No replica serves."""
    return 0


class WeightSync:
    """The weights of one run's rollouts.

    `late` is a re-readable transport for replicas that join between two versions; it may be the
    same one. `changed` is set when the policy has to be rebuilt: see `lost`. `event(kind,
    **fields)` hears of a replica that could not take what was sent to those who serve. `serving()`
    says how many serve.
    """

    def __init__(
        self,
        transport: Transport,
        late: Transport,
        changed: asyncio.Event,
        event: Callable[..., None] = ignore,
        serving: Callable[[], int] = nobody,
        *,
        timeout_s: float,
        rebuild_s: float,
    ) -> None:
        """`timeout_s`: for a replica to take weights; `rebuild_s`: for lost ones to come anew."""
        if not late.rereadable:
            raise ValueError("replicas that join late need a transport that can be read again")
        self._transport = transport
        self._late = late
        self._timeout_s = timeout_s
        self._rebuild_s = rebuild_s
        self._changed = changed
        self._event = event
        self._serving = serving
        self._paused_s = 0.0  # of the replica that stood still for longest, at the last version
        self._offer: Offer | None = None  # the current one; None: the starting model, version 0
        self._renewed = asyncio.Event()
        self._gone = asyncio.Event()  # they are, and no replica serves with them any more
        self.lost: str | None = None  # why the current weights, and so the policy, are gone

    @property
    def synced(self) -> bool:
        """Whether rollouts serve under weights of the policy's, not of the starting model."""
        return self._offer is not None

    async def bring(
        self,
        version: int,
        rollouts: ReplicaSet,
        clear: Clear = at_once,
        left: Callable[[], None] = ignore,
    ) -> None:
        """Bring the policy's weights, which are of `version`, to every rollout replica that serves.

        `clear()` is awaited before any replica may take them. `left()` is called once they have
        left the policy, which may change them from then on: before `clear` where the transport
        leaves them somewhere, at the end where the ranks send them to those who take them. Raises
        PolicyLost where they are gone again, or a rank is.
        """
        left_behind = self._late is self._transport

        async def receive(offer: Offer) -> None:
            if left_behind:
                left()
                await clear()
                self._renew(offer)
            await self._send(offer, rollouts)

        async def keep(offer: Offer) -> None:
            self._renew(offer)

        try:
            if not left_behind:
                await clear()
                await self._late.publish(version, keep)  # first: who joins meanwhile takes these
            await self._transport.publish(version, receive)
            if not left_behind:
                left()
        except ObjectsLost as lost:  # with the node of the rank that exported them
            raise PolicyLost(f"the weights of version {version}: {lost}") from lost

    async def _send(self, offer: Offer, rollouts: ReplicaSet) -> None:
        """Have those who serve take `offer`; who has not the version that it follows, or no part in
        a broadcast, takes what can be read again."""
        call, seconds, limit = rollouts.broadcast, self._timeout_s, WEIGHTS_LIMIT
        said = await call(offer.method, offer.payload, deadline_s=seconds, limit=limit)
        others = {each.replica: each.reason for each in said if isinstance(each, Refused)}
        for replica, reason in others.items():
            self._refused(offer, replica, reason)
        if others:
            whole = self._offer
            assert whole is not None, "it is renewed before replicas take anything"
            again = await call(
                whole.method, *whole.for_anyone, deadline_s=seconds, limit=limit, only=others
            )
            for each in again:
                if isinstance(each, Refused):
                    raise RunFailed(f"{each.replica} cannot take weights: {each.reason}")
            said += again
        self._paused_s = max((each for each in said if isinstance(each, float)), default=0.0)

    def _refused(self, offer: Offer, replica: str, reason: str) -> None:
        self._event(
            EventKind.WEIGHTS_REFUSED, replica=replica, version=offer.version, reason=reason
        )

    @property
    def figures(self) -> dict[str, float]:
        """Of the last version that replicas took; empty before there is one."""
        if self._offer is None:
            return {}
        sent = self._transport.sent_fraction
        return {
            "time/rollout_paused": self._paused_s,
            **({} if sent is None else {"weights/sent_fraction": sent}),
        }

    def _renew(self, offer: Offer) -> None:
        """From now on a replica that starts takes these."""
        self._offer, self.lost = offer, None
        self._gone.clear()
        self._renewed.set()
        self._renewed = asyncio.Event()

    async def catch_up(self, handle: ActorHandle, name: str) -> None:
        """Give a replica that starts the current weights; it may serve when this returns.

        Of those that come while it loads it takes what they add, so that it catches up with
        versions that come faster than it takes a whole one.
        """
        taken: Offer | None = None
        while self._offer is not taken:  # newer ones may come while these are loaded
            offer = self._offer
            assert offer is not None, "weights were published once and are never unset"
            take = getattr(handle, offer.method)
            try:
                ref = take.remote(*(args := offer.after(taken)))
                said = await answer(ref, name, offer.method, self._timeout_s, WEIGHTS_LIMIT)
            except ObjectsLost as lost:
                if self._offer is offer:
                    await self._after(offer, str(lost), name)
                continue
            if not isinstance(said, Refused):
                taken = offer
            elif args != offer.for_anyone:
                self._refused(offer, name, said.reason)
                taken = None
            else:
                raise ReplicaLost(name, f"it cannot take weights: {said.reason}")

    async def _after(self, gone: Offer, reason: str, name: str) -> None:
        """Weights are gone with the node they were exported on, and so is the policy: have it
        rebuilt, and wait for what it exports then."""
        self.lost = f"the weights of version {gone.version}: {reason}"
        self._changed.set()
        if not self._serving():
            self._gone.set()
        end = time.monotonic() + self._rebuild_s
        while self._offer is gone:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self._renewed.wait()
            except TimeoutError as error:
                limit = "rollout.start_timeout_s"
                waited = f"no weights within {self._rebuild_s:g} s ({limit}): {reason}"
                raise ReplicaLost(name, waited, limit=limit) from error

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` of the replicas, or drop it and raise PolicyLost as soon as the weights that
        they serve are gone and no replica has them any more: none could do it."""
        return await unless(self._gone, work, lambda: PolicyLost(self.lost))
