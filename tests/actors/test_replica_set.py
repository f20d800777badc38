"""Replica sets over stand-ins: dispatch, losses, replacements, growth, cancelled callers."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.answers import ReplicaLost, answer
from actors.restarts import Restarts
from actors.supervise import ReplicaSet, RoleExhausted
from tests.actors.stand_in_actors import Actor


class Worker:
    """What a stand-in runs; `death` is what happens to its process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = -1
        self.death: Callable[[], None] = lambda: None
        self.gate = asyncio.Event()
        self.waits = False

    async def start(self) -> str:
        return self.name

    async def load(self, version: int) -> int:
        self.version = version
        return version

    async def work(self) -> tuple[str, int]:
        return self.name, self.version

    async def wait(self) -> str:
        self.waits = True
        try:
            await self.gate.wait()
        finally:
            self.waits = False
        return self.name

    async def fail(self) -> None:
        raise KeyError("the user's own")

    async def die(self) -> None:
        self.death()
        await asyncio.Event().wait()


def make(index: int, name: str) -> Any:
    worker = Worker(name)
    actor = Actor(worker)
    worker.death = actor.kill
    return actor


async def serve_at_once(handle: Any, name: str) -> None:
    await answer(handle.start.remote(), name, "start", 60)


Events = list[tuple[str, dict[str, Any]]]


def build(
    size: int,
    events: Events,
    *,
    slots: int = 4,
    max_restarts: int = 3,
    prepare: Callable[[Any, str], Awaitable[int | None]] = serve_at_once,
    make: Callable[[int, str], Any] = make,
) -> ReplicaSet:
    return ReplicaSet(
        "worker",
        size,
        make,
        prepare,
        slots=slots,
        max_restarts=max_restarts,
        event=lambda kind, **fields: events.append((str(kind), fields)),
        kill=lambda handle: handle.kill(),
        drop=lambda ref: ref.drop(),
    )


async def until(condition: Callable[[], bool]) -> None:
    """Whatever can go on goes on until the condition is true."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition did not come true")


def waiting_calls(replicas: ReplicaSet, number: int) -> list[asyncio.Task[Any]]:
    """Calls that last until their worker's gate is opened."""
    return [
        asyncio.create_task(replicas.call("wait", deadline_s=30, queue_s=30)) for _ in range(number)
    ]


def busy(replicas: ReplicaSet) -> list[int]:
    return [replica.busy for replica in replicas.replicas.live]


def open_gates(replicas: ReplicaSet) -> None:
    for handle in replicas._handles.values():
        handle.worker.gate.set()


def test_calls_go_to_the_least_loaded_replica() -> None:
    async def run() -> None:
        replicas = build(2, [])
        await replicas.start()
        calls = waiting_calls(replicas, 6)
        await until(lambda: sum(busy(replicas)) == 6)
        open_gates(replicas)
        names = [name for (name,) in await asyncio.gather(*calls)]
        assert sorted(names.count(n) for n in set(names)) == [3, 3]
        await replicas.close()

    asyncio.run(run())


def test_no_replica_gets_more_calls_than_it_has_slots() -> None:
    async def run() -> None:
        replicas = build(1, [], slots=2)
        await replicas.start()
        calls = waiting_calls(replicas, 5)
        for _ in range(20):
            await asyncio.sleep(0)
            assert busy(replicas)[0] <= 2
        assert busy(replicas) == [2]
        open_gates(replicas)
        await asyncio.gather(*calls)
        assert busy(replicas) == [0]
        await replicas.close()

    asyncio.run(run())


def test_a_replica_has_no_more_calls_than_it_says_it_takes() -> None:
    async def run() -> None:
        async def prepare(handle: Any, name: str) -> int:
            await serve_at_once(handle, name)
            return 2

        replicas = build(1, [], slots=5, prepare=prepare)
        await replicas.start()
        most = 0

        def watch(_: str) -> None:
            nonlocal most
            most = max(most, *busy(replicas))

        await asyncio.gather(
            *(replicas.call("work", deadline_s=30, queue_s=30, on_dispatch=watch) for _ in range(6))
        )
        assert most == 2
        await replicas.close()

    asyncio.run(run())


def test_each_end_of_a_call_wakes_one_of_those_who_wait() -> None:
    async def run() -> None:
        replicas = build(1, [], slots=1)
        await replicas.start()
        calls = waiting_calls(replicas, 300)
        await until(lambda: busy(replicas) == [1])
        open_gates(replicas)
        await asyncio.gather(*calls)
        assert replicas.replicas.woken == 299
        await replicas.close()

    asyncio.run(run())


def test_a_caller_that_is_cancelled_leaves_its_slot_to_the_next() -> None:
    """At every turn of the loop: while it waits, when it has just been given its slot, later."""

    async def run(turns: int) -> None:
        replicas = build(1, [], slots=1)
        await replicas.start()
        first, second, third = waiting_calls(replicas, 3)
        await until(lambda: busy(replicas) == [1])
        open_gates(replicas)
        for _ in range(turns):
            await asyncio.sleep(0)
        second.cancel()
        assert len(await asyncio.gather(first, third)) == 2
        await asyncio.gather(second, return_exceptions=True)
        assert busy(replicas) == [0]
        await replicas.close()

    for turns in range(12):
        asyncio.run(asyncio.wait_for(run(turns), 20))


def test_whoever_finds_no_free_replica_in_time_hears_so_and_leaves_the_queue() -> None:
    async def run() -> None:
        replicas = build(1, [], slots=1)
        await replicas.start()
        (held,) = waiting_calls(replicas, 1)
        await until(lambda: busy(replicas) == [1])
        with pytest.raises(RoleExhausted, match=r"within 0\.01 s \(1 serving, 1 calls in flight\)"):
            await replicas.call("work", deadline_s=30, queue_s=0.01)
        open_gates(replicas)
        await held
        await replicas.call("work", deadline_s=30, queue_s=30)
        assert busy(replicas) == [0]
        await replicas.close()

    asyncio.run(run())


def test_a_set_grows_where_there_is_room_and_does_without_what_it_loses() -> None:
    async def run() -> None:
        events: Events = []
        room = {1: True, 2: False, 3: True}
        replicas = build(1, events)
        await replicas.start()
        replicas.grow(3, room.__getitem__)
        replicas.grow(3, room.__getitem__)  # the same again, while it starts
        await until(lambda: replicas.serving == 2)
        assert [kind for kind, _ in events] == ["replica_joined"]
        names = set()
        for _ in range(4):
            ((name, _),) = await replicas.call("work", deadline_s=30, queue_s=30)
            names.add(name.split(".")[0])
        assert names == {"worker-0", "worker-1"}

        calls = [replicas.call("die", deadline_s=30, queue_s=30) for _ in range(2)]
        assert all(isinstance(lost, ReplicaLost) for lost in await gather(calls))
        await until(lambda: replicas.serving == 1)
        await until(lambda: "replica_restarted" in [kind for kind, _ in events])
        assert [kind for kind, _ in events].count("replica_restarted") == 1, "the first alone"
        replicas.grow(3, room.__getitem__)
        await until(lambda: replicas.serving == 2)
        await replicas.close()

    async def gather(calls: list[Any]) -> list[Any]:
        return await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(run())


def test_a_replica_that_cannot_join_costs_nothing() -> None:
    async def refuse(handle: Any, name: str) -> None:
        await serve_at_once(handle, name)
        if not name.startswith("worker-0"):
            raise ReplicaLost(name, "its node left")

    async def run() -> None:
        events: Events = []
        replicas = build(1, events, prepare=refuse, max_restarts=0)
        await replicas.start()
        replicas.grow(2, lambda index: True)
        await until(lambda: bool(events))
        assert events == [
            (
                "replica_lost",
                {"role": "worker", "replica": "worker-1.1", "reason": events[0][1]["reason"]},
            )
        ]
        assert (await replicas.call("work", deadline_s=30, queue_s=30))[0][0] == "worker-0.0"
        await replicas.close()

    asyncio.run(run())


def test_a_replacement_serves_only_after_it_has_the_current_weights() -> None:
    async def run() -> None:
        current = 7

        async def prepare(handle: Any, name: str) -> None:
            loaded = -1
            while loaded != current:
                loaded = await answer(handle.load.remote(current), name, "load", 60)

        replicas = build(1, [], prepare=prepare)
        await replicas.start()
        current = 8
        await replicas.broadcast("load", 8, deadline_s=30)
        with pytest.raises(ReplicaLost):
            await replicas.call("die", deadline_s=30, queue_s=30)
        ((_, version),) = await replicas.call("work", deadline_s=30, queue_s=60)
        assert version == 8
        await replicas.close()

    asyncio.run(run())


def test_a_caller_that_is_cancelled_ends_its_calls_of_all_replicas() -> None:
    async def run() -> None:
        replicas = build(2, [])
        await replicas.start()
        calling = asyncio.create_task(replicas.broadcast("wait", deadline_s=30))
        workers = [handle.worker for handle in replicas.handles.values()]
        await until(lambda: all(worker.waits for worker in workers))
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await until(lambda: not any(worker.waits for worker in workers))
        assert replicas.serving == 2
        await replicas.close()

    asyncio.run(run())


def test_when_restarts_are_used_up_callers_hear_why_instead_of_waiting() -> None:
    async def run() -> None:
        replicas = build(1, [], max_restarts=1)
        await replicas.start()
        for _ in range(2):
            with pytest.raises(ReplicaLost):
                await replicas.call("die", deadline_s=30, queue_s=60)
        with pytest.raises(RoleExhausted, match=r"worker\.max_restarts"):
            await replicas.call("work", deadline_s=30, queue_s=60)
        await replicas.close()

    asyncio.run(run())


def test_what_was_lost_without_a_restart_comes_back_with_one() -> None:
    async def run() -> None:
        now = [0.0]
        events: Events = []
        replicas = build(2, events)
        replicas.replicas.restarts = Restarts(1, now=lambda: now[0])
        await replicas.start()
        for _ in range(2):
            with pytest.raises(ReplicaLost):
                await replicas.call("die", deadline_s=30, queue_s=60)
            await until(lambda: not replicas._starting)
        assert replicas.serving == 1
        replicas.refill()
        assert not replicas._starting, "no restart has come back"
        now[0] = 3600.0
        replicas.refill()
        replicas.refill()
        await until(lambda: not replicas._starting)
        assert replicas.serving == 2
        assert [kind for kind, _ in events] == [
            "replica_lost",
            "replica_restarted",
            "replica_lost",
            "replica_restarted",
        ]
        await replicas.close()

    asyncio.run(run())


@pytest.mark.slow
def test_a_replica_that_dies_as_it_first_starts_is_replaced_as_anywhere_else() -> None:
    async def run(deaths: int) -> tuple[ReplicaSet, Events]:
        starts: list[str] = []
        events: Events = []

        async def prepare(handle: Any, name: str) -> None:
            starts.append(name)
            if name.startswith("worker-0") and len(starts) <= deaths:
                raise ReplicaLost(name, "died during start")
            await serve_at_once(handle, name)

        replicas = build(1, events, prepare=prepare, max_restarts=1)
        await replicas.start()
        await replicas.call("work", deadline_s=30, queue_s=30)
        await replicas.close()
        return replicas, events

    _, events = asyncio.run(run(1))
    assert [kind for kind, _ in events] == ["replica_lost", "replica_restarted"]
    with pytest.raises(RoleExhausted, match=r"died during start.*worker\.max_restarts"):
        asyncio.run(run(2))


def test_a_start_that_is_too_slow_each_time_ends_though_restarts_come_back_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.replicas.pause", lambda failures: 0.0)
    now = [0.0]

    async def prepare(handle: Any, name: str) -> None:
        now[0] += 3600.0
        assert now[0] < 20 * 3600.0, "it goes on and on"
        late = "start had no answer within 3600 s (worker.start_timeout_s)"
        raise ReplicaLost(name, late, limit="worker.start_timeout_s")

    async def run() -> None:
        replicas = build(1, [], prepare=prepare)
        replicas.replicas.restarts = Restarts(1, now=lambda: now[0])
        with pytest.raises(RoleExhausted, match=r"; raise worker\.start_timeout_s or mend"):
            await replicas.start()
        assert now[0] == 2 * 3600.0
        await replicas.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "deadline_s", "raised"),
    [("wait", 0.01, "worker.work_timeout_s"), ("die", 30, "worker.max_restarts")],
)
def test_the_line_that_ends_a_run_names_the_setting_that_would_have_helped(
    method: str, deadline_s: float, raised: str
) -> None:
    async def run() -> None:
        replicas = build(1, [], max_restarts=0)
        await replicas.start()
        with pytest.raises(ReplicaLost) as lost:
            await replicas.call(
                method, deadline_s=deadline_s, queue_s=30, limit="worker.work_timeout_s"
            )
        assert pickle.loads(pickle.dumps(lost.value)).limit == lost.value.limit
        with pytest.raises(RoleExhausted) as exhausted:
            await replicas.call("work", deadline_s=30, queue_s=30)
        said = f"no worker replica is left ({lost.value.reason}); raise {raised} or mend the cause"
        assert str(exhausted.value) == said
        await replicas.close()

    asyncio.run(run())


def test_a_caller_that_is_cancelled_ends_what_it_asked_for() -> None:
    async def run() -> None:
        replicas = build(1, [])
        await replicas.start()
        (call,) = waiting_calls(replicas, 1)
        await until(lambda: busy(replicas) == [1])
        (handle,) = replicas._handles.values()
        await until(lambda: len(handle._pending) == 1)
        call.cancel()
        await until(lambda: not handle._pending)
        assert busy(replicas) == [0]
        await replicas.close()

    asyncio.run(run())


def test_an_exception_of_the_actors_own_code_comes_through_and_loses_nothing() -> None:
    async def run() -> None:
        events: Events = []
        replicas = build(1, events)
        await replicas.start()
        with pytest.raises(KeyError, match="the user's own"):
            await replicas.call("fail", deadline_s=30, queue_s=30)
        await replicas.call("work", deadline_s=30, queue_s=30)
        assert events == []
        await replicas.close()

    asyncio.run(run())


def test_whoever_waits_for_a_replica_that_is_lost_is_served_by_its_replacement() -> None:
    async def run() -> None:
        replicas = build(1, [], slots=1)
        await replicas.start()
        dying = asyncio.create_task(replicas.call("die", deadline_s=30, queue_s=30))
        await until(lambda: busy(replicas) == [1])
        waiting = [
            asyncio.create_task(replicas.call("work", deadline_s=30, queue_s=30)) for _ in range(5)
        ]
        with pytest.raises(ReplicaLost, match="worker-0"):
            await dying
        names = {name for ((name, _),) in await asyncio.gather(*waiting)}
        assert names == {"worker-0.1"}
        await replicas.close()

    asyncio.run(run())


def test_a_slot_of_a_replica_that_is_lost_before_its_caller_runs_is_asked_for_again() -> None:
    async def run() -> None:
        replicas = build(1, [], slots=1)
        await replicas.start()
        (held,) = waiting_calls(replicas, 1)
        await until(lambda: busy(replicas) == [1])
        waiting = asyncio.create_task(replicas.call("work", deadline_s=30, queue_s=30))
        await asyncio.sleep(0)
        (replica,) = replicas.replicas.live
        replicas.replicas.release(replica)  # the slot is handed over, and its replica dies at once
        replicas._lost(replica, "died")
        replica.busy += 1  # the first call still runs
        ((name, _),) = await waiting
        assert name == "worker-0.1"
        await asyncio.gather(held, return_exceptions=True)
        await replicas.close()

    asyncio.run(run())


def test_the_end_of_a_set_is_told_to_those_who_wait_and_stops_what_starts() -> None:
    async def run() -> None:
        made: list[Any] = []

        def watched(index: int, name: str) -> Any:
            made.append(make(index, name))
            return made[-1]

        async def prepare(handle: Any, name: str) -> None:
            if not name.startswith("worker-0"):
                await asyncio.Event().wait()
            await serve_at_once(handle, name)

        replicas = build(1, [], slots=1, prepare=prepare, make=watched)
        await replicas.start()
        replicas.grow(2, lambda index: True)
        (held,) = waiting_calls(replicas, 1)
        waiting = asyncio.create_task(replicas.call("work", deadline_s=30, queue_s=30))
        await until(lambda: len(made) == 2 and busy(replicas)[0] == 1)
        await replicas.close()
        with pytest.raises(RoleExhausted, match="the set is closed"):
            await waiting
        with pytest.raises(ReplicaLost):
            await held
        assert all(handle.dead for handle in made)

    asyncio.run(run())
