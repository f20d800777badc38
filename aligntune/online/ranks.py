"""The ranks of one trained model, called together and lost together.

Invariant: where a rank dies or does not answer in time, or arrays are lost with a node, the call is
`PolicyLost` for all of them; nothing is retried on ranks that may be half-way through an update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.answers import ObjectsLost, ReplicaLost, answer
from actors.disk import DISK, Sums
from actors.liveness import HEALTH, USUAL, Patience, listen
from actors.specs import RankSpec
from actors.together import together
from aligntune.online.ignoring import ignore

FOR_EVER_S = 10.0**7  # the deadline of a write is its caller's


class PolicyLost(RuntimeError):
    """A rank died or missed a deadline; policy and critic must be rebuilt from a checkpoint."""


class Ranks:
    """The ranks that `spec` asks for; `make(rank, name)` creates one.

    `ping(handle)`, where given, is the reference to an answer that a live rank gives at once: one
    that gives none for longer than `patience` is killed, and `lost` says so.
    """

    def __init__(
        self,
        spec: RankSpec,
        make: Callable[[int, str], ActorHandle],
        ping: Callable[[ActorHandle], Any] | None = None,
        patience: Patience = USUAL,
        on_loss: Callable[[], None] = ignore,
    ) -> None:
        self.spec = spec
        self.lost: str | None = None  # why a rank was killed
        self.progress = 0  # goes up with whatever a rank says that it has done
        self._make = make
        self._ping = ping
        self._patience = patience
        self._on_loss = on_loss
        self._handles: list[ActorHandle] = []
        self._listening: list[asyncio.Task[None]] = []

    @property
    def handles(self) -> dict[str, ActorHandle]:
        """Every rank, by its name."""
        return {f"{self.spec.role}-{rank}": each for rank, each in enumerate(self._handles)}

    async def start(self) -> list[tuple[str, dict[str, Any]]]:
        """Start the ranks and let them find each other; (name, what it says of itself) of each."""
        role, size = self.spec.role, self.spec.ranks
        most = (self.spec.start_timeout_s, f"{role}.start_timeout_s")
        self._handles = [self._make(rank, f"{role}-{rank}") for rank in range(size)]
        addresses = await self._answers("address", self._call("address", [()] * size), *most)
        infos = await self._answers("start", self._call("start", [addresses[0]] * size), *most)
        if (ping := self._ping) is not None:
            self._listening = [
                asyncio.create_task(self._listen(f"{role}-{rank}", handle, ping))
                for rank, handle in enumerate(self._handles)
            ]
        return [(f"{role}-{rank}", info) for rank, info in enumerate(infos)]

    async def _listen(
        self, name: str, handle: ActorHandle, ping: Callable[[ActorHandle], Any]
    ) -> None:
        """Ask a rank whether it lives until it does not; then nobody waits for it any more."""

        def heard(done: int) -> None:
            self.progress += done

        reason = await listen(lambda: ping(handle), self._patience, heard)
        self.lost = f"{name}: {reason}"
        ray.kill(handle)
        self._on_loss()

    async def all(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every rank with the same arguments; see `each`."""
        return await self.each(method, [args] * self.spec.ranks)

    async def each(
        self,
        method: str,
        args: Sequence[tuple[Any, ...]],
        deadline_s: float | None = None,
        limit: str = "",
    ) -> list[Any]:
        """Call `method` on every rank with its own arguments; the deadline, and `limit`, the
        setting that it comes from, are those of an update by default. Raises PolicyLost, or what a
        rank's own code raised."""
        most = self._of_an_update if deadline_s is None else (deadline_s, limit)
        return await self._answers(method, self._call(method, args), *most)

    @property
    def _of_an_update(self) -> tuple[float, str]:
        """The deadline, in seconds, and the setting that it comes from."""
        return self.spec.update_timeout_s, f"{self.spec.role}.update_timeout_s"

    async def beside(self, method: str, *args: Any, deadline_s: float) -> Any:
        """Call `method` on rank 0 beside what it does. Raises as `each`."""
        if self.lost is not None or not self._handles:
            raise PolicyLost(self.lost or f"the {self.spec.role} ranks are not running")
        call = getattr(self._handles[0], method).options(concurrency_group=HEALTH)
        (said,) = await self._answers(method, [call.remote(*args)], deadline_s)
        return said

    async def write(self, folder: str) -> Sums:
        """Have every rank write its last snapshot beside what it does; returns when all have ended,
        with what they have written.

        Raises PolicyLost where a rank is lost meanwhile, else the first error of their own: an
        OSError where one disk did not take it.
        """
        handles = self.handles
        if self.lost is not None or not handles:
            raise PolicyLost(self.lost or f"the {self.spec.role} ranks are not running")
        refs = {
            n: h.write.options(concurrency_group=DISK).remote(folder) for n, h in handles.items()
        }
        waits = [answer(ref, name, "write", FOR_EVER_S) for name, ref in refs.items()]
        found = await asyncio.gather(*waits, return_exceptions=True)
        errors = [error for error in found if isinstance(error, BaseException)]
        for error in errors:
            if isinstance(error, ReplicaLost):
                raise PolicyLost(str(error)) from error
        if errors:
            raise errors[0]
        wrote = [sums for sums in found if not isinstance(sums, BaseException)]
        return {name: each for sums in wrote for name, each in sums.items()}

    def begin(
        self, method: str, args: Sequence[tuple[Any, ...]], objects: Sequence[int]
    ) -> tuple[Awaitable[list[Any]], list[list[Any]]]:
        """Start `method` on every rank; its answers, and references to each rank's `objects`."""
        refs = self._call(method, args, [1 + further for further in objects])
        split = [ref if further else [ref] for ref, further in zip(refs, objects, strict=True)]
        answers = self._answers(method, [first for first, *_ in split], *self._of_an_update)
        return answers, [rest for _, *rest in split]

    def _call(
        self, method: str, args: Sequence[tuple[Any, ...]], returns: Sequence[int] | None = None
    ) -> list[Any]:
        """The references of a call on every rank, a list of them where there are several."""
        if self.lost is not None:
            raise PolicyLost(self.lost)
        if not self._handles:
            raise PolicyLost(f"the {self.spec.role} ranks are not running")
        numbers = returns or [1] * len(self._handles)
        return [
            getattr(handle, method).options(num_returns=number).remote(*own)
            for handle, own, number in zip(self._handles, args, numbers, strict=True)
        ]

    async def _answers(
        self, method: str, refs: Sequence[Any], deadline_s: float, limit: str = ""
    ) -> list[Any]:
        """What the ranks answer; one reference a rank."""
        role = self.spec.role
        waits = [
            answer(ref, f"{role}-{rank}", method, deadline_s, limit)
            for rank, ref in enumerate(refs)
        ]
        try:
            return await together(role, waits)
        except (ReplicaLost, ObjectsLost) as lost:
            raise PolicyLost(self.lost or str(lost)) from lost

    def kill(self) -> None:
        """Stop every rank at once."""
        for listening in self._listening:
            listening.cancel()
        for handle in self._handles:
            ray.kill(handle)
        self._handles, self._listening, self.lost = [], [], None
