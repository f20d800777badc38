"""How weights get from the policy ranks to the rollout replicas: what every transport is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Offer:
    """The weights of one version as a rollout actor takes them: by `method`, called with
    `payload`."""

    version: int
    payload: Any
    method: str = "load_weights"
    whole: tuple[Any, ...] = ()
    """The arguments with which anyone can take them, where `payload` is for those alone who have
    the version before; empty: `payload` is for anyone."""

    @property
    def for_anyone(self) -> tuple[Any, ...]:
        """The arguments for who has whatever weights."""
        return self.whole or (self.payload,)

    def after(self, taken: Offer | None) -> tuple[Any, ...]:
        """The arguments for who took `taken`, and whatever came before it, as it was for anyone;
        None: for anyone."""
        begun = () if taken is None else taken.whole
        goes_on = bool(begun) and self.whole[: len(begun)] == begun
        return self.whole[len(begun) :] if goes_on else self.for_anyone


@dataclass(frozen=True)
class Refused:
    """What a rollout actor answers that serves on as it was: it needs the whole of an offer."""

    replica: str
    reason: str


@dataclass(frozen=True)
class Exported:
    """What a policy rank says of the weights that it has left somewhere."""

    nbytes: int
    whole: bool  # else they are what has changed since the version that it exported before
    whole_nbytes: int  # of all its weights


@dataclass(frozen=True)
class Arrival:
    """A version that reaches one engine's processes by itself, in the words of what the engine
    calls there."""

    version: int
    update: Mapping[str, Any]
    meeting: Mapping[str, Any] = field(default_factory=dict)
    """What they are told before, once; empty: nothing."""


class Sent(Protocol):
    """What is offered of weights that the ranks send to those who take them."""

    version: int

    def arrival(self, replica: str) -> Arrival | None:
        """What a replica is to have its engine do; None: it is not among those who are sent it."""


class Ask(Protocol):
    """Has the policy's ranks do `method` of a transport's own side, `sender` (module:Class); gives
    the answer of rank 0."""

    def __call__(
        self, sender: str, method: str, *args: Any, deadline_s: float
    ) -> Awaitable[Any]: ...


class Transport(Protocol):
    """One way of sending weights."""

    rereadable: bool
    """Whether an offer can be taken again later, by a replica that was not there."""
    sent_fraction: float | None
    """Bytes of the last version that was sent, over those of all its weights; None: always all."""

    async def publish(self, version: int, receive: Callable[[Offer], Awaitable[None]]) -> Offer:
        """Send the weights of `version`, the policy's current one.

        `receive(offer)` has all receivers take them; it is awaited once. A transport whose two
        sides meet (a broadcast between processes, say) runs it beside its sending; one that leaves
        the weights somewhere, after it. Raises what either side raises.
        """
