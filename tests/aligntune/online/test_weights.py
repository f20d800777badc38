"""Weights over any transport: all who serve get them, and whoever comes late the newest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from actors.answers import ObjectsLost, ReplicaLost
from actors.transfer.base import Exported, Offer, Refused
from actors.transfer.deltas import Deltas
from actors.transfer.object_store import ObjectStore
from aligntune.errors import RunFailed
from aligntune.online.learner import PolicyLost
from aligntune.online.weights import WeightSync
from aligntune.tracking.metrics import EventKind

Receive = Callable[[Offer], Awaitable[None]]


class Broadcast:
    """A transport whose two sides meet: neither ends without the other, and nobody reads later."""

    rereadable = False
    sent_fraction = None

    def __init__(self) -> None:
        self.meeting: asyncio.Barrier | None = None

    async def publish(self, version: int, receive: Receive) -> Offer:
        self.meeting = asyncio.Barrier(2)
        offer = Offer(version, f"rank 0 sends {version}", "join_broadcast")
        await asyncio.gather(self.meeting.wait(), receive(offer))
        return offer


class Rollouts:
    """The replicas that serve."""

    def __init__(self, transport: Broadcast | None = None) -> None:
        self.transport = transport
        self.taken: list[tuple[str, Any]] = []

    async def broadcast(
        self, method: str, payload: Any, *, deadline_s: float, limit: str
    ) -> list[Any]:
        if self.transport is not None:
            assert self.transport.meeting is not None
            await asyncio.wait_for(self.transport.meeting.wait(), deadline_s)
        self.taken.append((method, payload))
        return []


class Joiner:
    """A replica that starts; `loading(payload)` may do something while it takes weights."""

    def __init__(self, loading: Callable[[Any], Any] = lambda payload: 0.1) -> None:
        self.taken: list[Any] = []
        self._loading = loading
        self.load_weights = SimpleNamespace(remote=self._load)

    def _load(self, payload: Any) -> Any:
        self.taken.append(payload)
        future: Future[Any] = Future()
        said = self._loading(payload)
        if isinstance(said, Exception):
            future.set_exception(said)
        else:
            future.set_result(said)
        return SimpleNamespace(future=lambda: future)


async def export(version: int) -> str:
    return f"bundle {version}"


def sync(transport: Any = None, rebuild_s: float = 30) -> tuple[WeightSync, asyncio.Event]:
    store, changed = ObjectStore(export), asyncio.Event()
    made = WeightSync(transport or store, store, changed, timeout_s=30, rebuild_s=rebuild_s)
    return made, changed


def run(work: Awaitable[None]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work, 60)

    asyncio.run(main())


def test_a_replica_that_starts_with_the_starting_model_takes_nothing() -> None:
    async def main() -> None:
        weights, _ = sync()
        joiner: Any = Joiner()
        await weights.catch_up(joiner, "rollout-0")
        assert joiner.taken == []
        assert not weights.synced

    run(main())


def test_those_who_serve_meet_the_ranks_and_those_who_come_late_read_for_themselves() -> None:
    async def main() -> None:
        transport = Broadcast()
        weights, _ = sync(transport)
        rollouts: Any = Rollouts(transport)
        await weights.bring(1, rollouts)
        await weights.bring(2, rollouts)
        assert rollouts.taken == [
            ("join_broadcast", "rank 0 sends 1"),
            ("join_broadcast", "rank 0 sends 2"),
        ]
        joiner: Any = Joiner()
        await weights.catch_up(joiner, "rollout-1")
        assert joiner.taken == ["bundle 2"]

    run(main())


def test_a_replica_that_starts_while_newer_weights_come_takes_those_too() -> None:
    async def main() -> None:
        weights, _ = sync()
        rollouts: Any = Rollouts()
        await weights.bring(1, rollouts)
        came: list[asyncio.Task[None]] = []

        def loading(payload: str) -> float:
            if payload == "bundle 1":
                came.append(asyncio.create_task(weights.bring(2, rollouts)))
            return 0.1

        joiner: Any = Joiner(loading)
        await weights.catch_up(joiner, "rollout-1")
        await came[0]
        assert joiner.taken == ["bundle 1", "bundle 2"]

    run(main())


async def waiting_for_lost_weights() -> tuple[WeightSync, Any, Any, asyncio.Task[None]]:
    """Version 1 was lost before a replica that starts had it: it waits for the next."""
    weights, changed = sync()
    rollouts: Any = Rollouts()
    await weights.bring(1, rollouts)
    gone = ObjectLostError("0" * 56, None, "")
    joiner: Any = Joiner(lambda payload: gone if payload == "bundle 1" else 0.1)
    joining = asyncio.create_task(weights.catch_up(joiner, "rollout-1"))
    await changed.wait()
    return weights, rollouts, joiner, joining


def test_lost_weights_wake_the_loop_and_the_replica_waits_for_those_that_come_after() -> None:
    async def main() -> None:
        weights, rollouts, joiner, joining = await waiting_for_lost_weights()
        assert "the weights of version 1" in (weights.lost or "")
        await weights.bring(2, rollouts)
        assert weights.lost is None
        await joining
        assert joiner.taken == ["bundle 1", "bundle 2"]

    run(main())


def test_weights_that_never_come_again_lose_the_replica_at_a_deadline() -> None:
    async def main() -> None:
        weights, _ = sync(rebuild_s=0.05)
        rollouts: Any = Rollouts()
        await weights.bring(1, rollouts)
        joiner: Any = Joiner(lambda payload: ObjectLostError("0" * 56, None, ""))
        with pytest.raises(ReplicaLost, match=r"no weights within 0\.05 s \(rollout\.start_time"):
            await weights.catch_up(joiner, "rollout-1")

    run(main())


@pytest.mark.parametrize("turns", range(6))
def test_a_start_that_is_given_up_as_new_weights_come_ends(turns: int) -> None:
    async def main() -> None:
        weights, rollouts, _, joining = await waiting_for_lost_weights()
        for _ in range(3):
            await asyncio.sleep(0)
        await weights.bring(2, rollouts)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = joining.cancel()  # False: it had ended
        await asyncio.gather(joining, return_exceptions=True)
        assert joining.cancelled() == cancelled

    run(main())


def test_weights_that_are_lost_on_their_way_lose_the_policy() -> None:
    async def main() -> None:
        weights, _ = sync()

        class Far(Rollouts):
            async def broadcast(self, *_: Any, **__: Any) -> list[Any]:
                raise ObjectsLost("an argument of load_weights is lost")

        rollouts: Any = Far()
        with pytest.raises(PolicyLost, match="the weights of version 1"):
            await weights.bring(1, rollouts)

    run(main())


class Servers(Rollouts):
    """Replicas of which some refuse what follows another version."""

    def __init__(self, others: set[str], stubborn: bool = False) -> None:
        super().__init__()
        self.others = others
        self.stubborn = stubborn
        self.whole: list[tuple[set[str], tuple[Any, ...]]] = []

    async def broadcast(  # type: ignore[override]
        self, method: str, *args: Any, deadline_s: float, limit: str, only: Any = None
    ) -> list[Any]:
        refused = [Refused(name, "it holds 0") for name in sorted(self.others)]
        if only is None:
            self.taken.append((method, args))
            return [0.5, *refused]
        self.whole.append((set(only), args))
        return refused if self.stubborn else [0.75] * len(only)


def deltas(sizes: list[int], events: list[Any]) -> tuple[WeightSync, list[Any]]:
    """A sync of changes: the first export is 100 bytes, the next ones as `sizes` say."""
    asked: list[Any] = []

    async def export_changes(version: int, since: int | None) -> tuple[Exported, str]:
        asked.append(since)
        size = 100 if since is None else sizes[version]
        return Exported(size, since is None, 100), f"{since} to {version}"

    sends = Deltas(export_changes)

    def event(kind: Any, **fields: Any) -> None:
        events.append((kind, fields))

    return WeightSync(sends, sends, asyncio.Event(), event, timeout_s=30, rebuild_s=30), asked


def test_who_serves_takes_what_changed_and_who_has_other_weights_or_is_late_takes_all() -> None:
    async def main() -> None:
        events: list[Any] = []
        weights, _ = deltas([0, 0, 10, 10], events)
        for version in (1, 2):
            await weights.bring(version, rollouts := Servers(set()))  # type: ignore[arg-type]
        assert rollouts.taken == [("load_weights", ("1 to 2",))]
        assert weights.figures == {"time/rollout_paused": 0.5, "weights/sent_fraction": 0.1}
        assert events == []
        servers: Any = Servers({"rollout-1"})
        await weights.bring(3, servers)
        assert servers.taken == [("load_weights", ("2 to 3",))]
        assert servers.whole == [({"rollout-1"}, ("None to 1", "1 to 2", "2 to 3"))]
        fields = {"replica": "rollout-1", "version": 3, "reason": "it holds 0"}
        assert events == [(EventKind.WEIGHTS_REFUSED, fields)]
        assert weights.figures["time/rollout_paused"] == 0.75
        joiner: Any = Joiner()
        joiner.load_weights = SimpleNamespace(remote=lambda *args: joiner._load(args))
        await weights.catch_up(joiner, "rollout-2")
        assert joiner.taken == [("None to 1", "1 to 2", "2 to 3")]

    run(main())


def test_who_has_no_part_in_a_broadcast_takes_what_can_be_read_again() -> None:
    async def main() -> None:
        events: list[Any] = []
        store = ObjectStore(export)

        class Met(Broadcast):
            async def publish(self, version: int, receive: Receive) -> Offer:
                offer = Offer(version, f"rank 0 sends {version}", "join_broadcast")
                await receive(offer)
                return offer

        def event(kind: Any, **fields: Any) -> None:
            events.append((kind, fields))

        weights = WeightSync(Met(), store, asyncio.Event(), event, timeout_s=30, rebuild_s=30)
        servers: Any = Servers({"rollout-1"})
        await weights.bring(1, servers)
        assert servers.taken == [("join_broadcast", ("rank 0 sends 1",))]
        assert servers.whole == [({"rollout-1"}, ("bundle 1",))]
        fields = {"replica": "rollout-1", "version": 1, "reason": "it holds 0"}
        assert events == [(EventKind.WEIGHTS_REFUSED, fields)]
        assert weights.figures == {"time/rollout_paused": 0.75}

    run(main())


@pytest.mark.parametrize("left_behind", [True, False])
def test_weights_have_left_the_policy_once_it_may_change_them(left_behind: bool) -> None:
    async def main() -> None:
        transport = None if left_behind else Broadcast()
        weights, _ = sync(transport)
        order: list[str] = []

        async def clear() -> None:
            order.append("clear")

        class Loading(Rollouts):
            async def broadcast(self, *args: Any, **limits: Any) -> list[Any]:
                order.append("loads")
                return await super().broadcast(*args, **limits)

        rollouts: Any = Loading(transport)
        await weights.bring(1, rollouts, clear, lambda: order.append("left"))
        if left_behind:
            assert order == ["left", "clear", "loads"]
        else:
            assert order == ["clear", "loads", "left"]

    run(main())


def test_when_the_changes_are_as_much_as_a_whole_version_the_next_one_is_whole() -> None:
    async def main() -> None:
        weights, asked = deltas([0, 0, 60, 60, 0, 60], [])
        rollouts: Any = Servers(set())
        for version in range(1, 6):
            await weights.bring(version, rollouts)
        assert asked == [None, 1, 2, None, 4]

    run(main())


def test_a_replica_that_cannot_even_take_all_ends_the_run_or_its_own_start() -> None:
    async def main() -> None:
        weights, _ = deltas([0, 0], [])
        servers: Any = Servers({"rollout-1"}, stubborn=True)
        with pytest.raises(RunFailed, match="rollout-1 cannot take weights: it holds 0"):
            await weights.bring(1, servers)
        joiner: Any = Joiner(lambda payload: Refused("rollout-2", "a bit flips"))
        with pytest.raises(ReplicaLost, match="a bit flips"):
            await weights.catch_up(joiner, "rollout-2")

    run(main())


@pytest.mark.parametrize("refused", [False, True])
def test_a_replica_that_starts_takes_of_versions_that_come_meanwhile_what_they_add(
    refused: bool,
) -> None:
    """Else it would never catch up with versions that come faster than it loads a whole chain."""

    async def main() -> None:
        events: list[Any] = []
        weights, _ = deltas([0, 0, 10, 10, 10, 60, 60], events)
        servers: Any = Servers(set())
        to_come = [(2,), (3, 4), (5, 6, 7), ()]
        came: list[asyncio.Task[None]] = []

        async def bring(versions: tuple[int, ...]) -> None:
            for version in versions:
                await weights.bring(version, servers)

        def loading(payloads: tuple[Any, ...]) -> Any:
            if refused and payloads == ("1 to 2",):
                return Refused("rollout-2", "a bit flips")
            came.append(asyncio.create_task(bring(to_come[len(came)])))
            return 0.1

        await weights.bring(1, servers)
        joiner: Any = Joiner(loading)
        joiner.load_weights = SimpleNamespace(remote=lambda *args: joiner._load(args))
        await weights.catch_up(joiner, "rollout-2")
        assert [task.result() for task in came] == [None] * 4
        assert joiner.taken == [
            ("None to 1",),
            ("1 to 2",),
            *([("None to 1", "1 to 2")] * refused),
            ("2 to 3", "3 to 4"),
            ("None to 7",),  # the chain begins anew
        ]
        fields = {"replica": "rollout-2", "version": 2, "reason": "a bit flips"}
        assert events == [(EventKind.WEIGHTS_REFUSED, fields)] * refused

    run(main())


def test_late_comers_need_a_transport_that_can_be_read_again() -> None:
    async def main() -> None:
        once: Any = Broadcast()
        with pytest.raises(ValueError, match="read again"):
            WeightSync(once, once, asyncio.Event(), timeout_s=1, rebuild_s=1)

    run(main())
