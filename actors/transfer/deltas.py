"""What has changed in the weights, through Ray's object store.

A whole version and all changes since it lie there, so that anyone can take the newest: a replica
that serves reads the last change alone, one that joins late, or has other weights, reads them all.
When the changes take as much as a whole version, the next one is whole again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from actors.transfer.base import Exported, Offer

Export = Callable[[int, int | None], Awaitable[tuple[Exported, Any]]]


class Deltas:
    """`export(version, since)` has the policy ranks export what has changed since that version, or
    all, and gives what they say of it and the reference to it, which the driver owns."""

    rereadable = True

    def __init__(self, export: Export) -> None:
        self._export = export
        self._chain: list[Any] = []  # a whole version, and the changes on top of it
        self._version: int | None = None  # that they make
        self._changes = 0  # bytes of these
        self._whole = 0  # bytes of that
        self.sent_fraction: float | None = None

    async def publish(self, version: int, receive: Callable[[Offer], Awaitable[None]]) -> Offer:
        """Export, and then have them read."""
        since = self._version if self._changes < self._whole else None
        exported, ref = await self._export(version, since)
        if exported.whole:
            self._chain, self._changes, self._whole = [ref], 0, exported.nbytes
        else:
            self._chain = [*self._chain, ref]
            self._changes += exported.nbytes
        self._version = version
        self.sent_fraction = exported.nbytes / exported.whole_nbytes
        offer = Offer(version, ref, whole=tuple(self._chain))
        await receive(offer)
        return offer
