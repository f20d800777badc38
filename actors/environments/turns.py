"""The turns of one group's episodes, asked of a rollout replica that may be replaced meanwhile.

Invariant: a turn has one answer. One that was lost with its replica is asked again of the next; an
episode that is begun anew gets, as long as it says the same, the answers that it had. In lockstep
turn `t` of all episodes that come so far is asked in one call, in the order of the rollouts: what
is sampled together is then a function of the group alone.

A group has as many calls at the replica at a time as it has rollouts, however many requests an
agent sends side by side: the replica has room for so many, and for signs of life and new weights
beside them. A call whose turns nobody waits for any more is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.answers import ObjectsLost, ReplicaLost
from actors.engines.base import Turn
from actors.environments.base import Sampler
from actors.messages import Completion, FinishReason, GroupSampling, Sampling, Segment

Ask = Callable[[Any, str, Sequence[Turn]], Awaitable[list[Completion]]]
"""(handle, name, turns) to their answers. Raises ReplicaLost or ObjectsLost."""


@dataclass
class _Asked:
    """A turn that was asked for, and its answer in the making."""

    turn: Turn
    answer: asyncio.Future[Completion]
    sent: bool = False
    wanted: bool = True  # its episode may yet ask for it


class Turns:
    """The policy, to the episodes of one group."""

    def __init__(self, sampling: GroupSampling, lockstep: bool, ask: Ask) -> None:
        self._sampling = sampling
        self._lockstep = lockstep
        self._ask = ask
        self._live: dict[int, set[int]] = {}  # turns that an episode has asked since it began
        self._asked: dict[tuple[int, int], _Asked] = {}  # by rollout and turn
        self._sending: dict[asyncio.Task[None], list[_Asked]] = {}  # calls under way
        self._replica: tuple[Any, str] | None = None
        self._there = asyncio.Event()
        self._gone = asyncio.Event()
        self.why = ""  # the last replica is gone
        self.limit = ""  # the setting of the deadline that it missed, if that is why

    @property
    def replica(self) -> tuple[Any, str]:
        """(handle, name) of the one that was asked last."""
        assert self._replica is not None, "the first one is there before the first turn"
        return self._replica

    def use(self, handle: Any, name: str) -> None:
        """Ask this replica from now on."""
        self._replica = (handle, name)
        self._gone.clear()
        self._there.set()

    async def gone(self) -> None:
        """Wait until the replica that is asked is lost; `why` says how."""
        await self._gone.wait()

    def begin(self, rollout: int) -> None:
        """An episode begins, or begins anew."""
        self._live[rollout] = set()

    def end(self, rollout: int) -> None:
        """An episode has ended: its siblings wait for it no more, and nobody for its turns."""
        self._live.pop(rollout, None)
        for place in [place for place in self._asked if place[0] == rollout]:
            self._drop(place)
        self._send()

    def sampler(self, rollout: int) -> Sampler:
        """The policy, for one episode."""

        async def sample(
            token_ids: Sequence[int] | np.ndarray, max_tokens: int, turn: int
        ) -> tuple[Segment, FinishReason]:
            completion = await self._one(rollout, turn, token_ids, max_tokens)
            (segment,) = completion.segments
            return segment, completion.finish_reason

        return sample

    async def close(self) -> None:
        """Nothing is asked any more."""
        sending = list(self._sending)
        self._asked.clear()
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)

    async def _one(
        self,
        rollout: int,
        number: int,
        token_ids: Sequence[int] | np.ndarray,
        max_tokens: int,
    ) -> Completion:
        if max_tokens < 1 or not len(token_ids):
            raise ValueError(
                f"turn {number}: {max_tokens} tokens after {len(token_ids)} are no turn"
            )
        place = (rollout, number)
        sampling = self._sampling
        turn = Turn(
            np.asarray(token_ids, dtype=np.int32),
            Sampling(max_tokens, sampling.temperature),
            f"{sampling.seed}/{sampling.group_id}/{rollout}/{number}",
        )
        asked = self._asked.get(place)
        if asked is None or not _same(asked.turn, turn):
            self._drop(place)
            answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
            asked = self._asked[place] = _Asked(turn, answer)
        self._live[rollout].add(number)
        self._send()
        return await asyncio.shield(asked.answer)

    def _drop(self, place: tuple[int, int]) -> None:
        """Nobody asks for this turn again; end its call, where all turns of that are such."""
        if (asked := self._asked.pop(place, None)) is None:
            return
        asked.wanted = False
        for task, together in self._sending.items():
            if not any(one.wanted for one in together):
                task.cancel()

    def _send(self) -> None:
        """Send what may be sent now."""
        while waiting := {place: one for place, one in self._asked.items() if not one.sent}:
            if len(self._sending) >= self._sampling.completions:
                return
            number = min(turn for _, turn in waiting)
            if not self._lockstep:
                self._start([next(iter(waiting.values()))])
            elif all(number in turns for turns in self._live.values()):
                self._start([waiting[place] for place in sorted(waiting) if place[1] == number])
            else:
                return

    def _start(self, together: list[_Asked]) -> None:
        for asked in together:
            asked.sent = True
        task = asyncio.create_task(self._answer(together))
        self._sending[task] = together
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        """A call has ended: there is room for another."""
        del self._sending[task]
        self._send()

    async def _answer(self, together: list[_Asked]) -> None:
        """Have turns answered, by whichever replica lives long enough."""
        try:
            completions = await self._completions([asked.turn for asked in together])
        except Exception as error:  # noqa: BLE001 - whoever waits for a turn hears why it has none
            for asked in together:
                asked.answer.set_exception(error)
                asked.answer.exception()  # where its episode has left, nobody else asks
            return
        for asked, completion in zip(together, completions, strict=True):
            asked.answer.set_result(completion)

    async def _completions(self, turns: Sequence[Turn]) -> list[Completion]:
        while True:
            await self._there.wait()
            replica = self.replica
            try:
                return await self._ask(*replica, turns)
            except (ReplicaLost, ObjectsLost) as lost:
                if replica is self._replica and self._there.is_set():
                    self.why, self.limit = str(lost), ""
                    if isinstance(lost, ReplicaLost):
                        self.why, self.limit = lost.reason, lost.limit
                    self._there.clear()
                    self._gone.set()


def _same(one: Turn, other: Turn) -> bool:
    """Whether two turns ask the same."""
    return one.sampling == other.sampling and np.array_equal(one.token_ids, other.token_ids)
