"""Weights through Ray's object store: written once, read by whoever wants them, whenever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from actors.transfer.base import Offer


class ObjectStore:
    """`export(version)` has the policy ranks export a `WeightBundle` and gives the reference to it,
    which the driver owns."""

    rereadable = True
    sent_fraction: float | None = None

    def __init__(self, export: Callable[[int], Awaitable[Any]]) -> None:
        self._export = export

    async def publish(self, version: int, receive: Callable[[Offer], Awaitable[None]]) -> Offer:
        """Export, and then have them read."""
        offer = Offer(version, await self._export(version))
        await receive(offer)
        return offer
