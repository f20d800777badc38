"""How weights get from the policy ranks to the rollout replicas: what every transport is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Offer:
    """The weights of one version as a rollout actor takes them: by `method`, called with
    `payload`."""

    version: int
    payload: Any
    method: str = "load_weights"


class Transport(Protocol):
    """One way of sending weights."""

    rereadable: bool
    """Whether an offer can be taken again later, by a replica that was not there."""

    async def publish(self, version: int, receive: Callable[[Offer], Awaitable[None]]) -> Offer:
        """Send the weights of `version`, the policy's current one.

        `receive(offer)` has all receivers take them; it is awaited once. A transport whose two
        sides meet (a broadcast between processes, say) runs it beside its sending; one that leaves
        the weights somewhere, after it. Raises what either side raises.
        """
