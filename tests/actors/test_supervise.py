"""Replica sets: deadlines, losses, replacements; on real Ray actors."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from actors.supervise import ObjectsLost, RankSet, ReplicaLost, ReplicaSet, RoleExhausted, answer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


class Worker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.version = -1

    async def start(self) -> str:
        return self.name

    async def load(self, version: int) -> int:
        self.version = version
        return version

    async def work(self, seconds: float = 0.0) -> tuple[str, int]:
        await asyncio.sleep(seconds)
        return self.name, self.version

    async def pid(self) -> int:
        return os.getpid()

    async def fail(self) -> None:
        raise KeyError("the user's own")

    async def die(self) -> None:
        os._exit(1)

    async def put(self) -> list[ray.ObjectRef]:
        return [ray.put(np.zeros(2**20))]

    async def twice(self, value: int) -> tuple[int, list[int]]:
        return value, [value] * 3


def make(index: int, name: str) -> ActorHandle:
    return ray.remote(Worker).options(num_cpus=0.1, max_restarts=0, max_concurrency=20).remote(name)


async def serve_at_once(handle: ActorHandle, name: str) -> None:
    await answer(handle.start.remote(), name, "start", 60)


Events = list[tuple[str, dict[str, Any]]]


def build(
    size: int,
    events: Events,
    *,
    slots: int = 4,
    max_restarts: int = 3,
    prepare: Callable[[ActorHandle, str], Awaitable[int | None]] = serve_at_once,
) -> ReplicaSet:
    return ReplicaSet(
        "worker",
        size,
        make,
        prepare,
        slots=slots,
        max_restarts=max_restarts,
        event=lambda kind, **fields: events.append((str(kind), fields)),
    )


async def until(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.02)


def test_calls_go_to_the_least_loaded_replica() -> None:
    async def run() -> None:
        replicas = build(2, [])
        await replicas.start()
        calls = [replicas.call("work", 0.3, deadline_s=30, queue_s=30) for _ in range(6)]
        names = [name for ((name, _),) in await asyncio.gather(*calls)]
        assert sorted(names.count(n) for n in set(names)) == [3, 3]
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
    async def refuse(handle: ActorHandle, name: str) -> None:
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


def test_no_replica_gets_more_calls_than_it_has_slots() -> None:
    async def run() -> None:
        replicas = build(1, [], slots=2)
        await replicas.start()
        calls = [
            asyncio.create_task(replicas.call("work", 0.2, deadline_s=30, queue_s=30))
            for _ in range(5)
        ]
        most = 0
        while not all(call.done() for call in calls):
            most = max(most, replicas.busy)
            await asyncio.sleep(0.01)
        assert most == 2
        await replicas.close()

    asyncio.run(run())


def test_a_killed_replica_is_replaced_and_its_caller_told() -> None:
    async def run() -> None:
        events: Events = []
        replicas = build(1, events)
        await replicas.start()
        (pid,) = await replicas.call("pid", deadline_s=30, queue_s=30)
        call = asyncio.create_task(replicas.call("work", 60, deadline_s=120, queue_s=30))
        await until(lambda: replicas.busy == 1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ReplicaLost, match="worker-0"):
            await call
        ((name, _),) = await replicas.call("work", deadline_s=30, queue_s=60)
        assert name == "worker-0.1"
        assert [kind for kind, _ in events] == ["replica_lost", "replica_restarted"]
        await replicas.close()

    asyncio.run(run())


def test_a_stopped_replica_is_lost_at_its_deadline_and_replaced() -> None:
    async def run() -> None:
        events: Events = []
        replicas = build(1, events)
        await replicas.start()
        (pid,) = await replicas.call("pid", deadline_s=30, queue_s=30)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ReplicaLost, match="no answer within 1 s"):
            await replicas.call("work", deadline_s=1, queue_s=30)
        ((name, _),) = await replicas.call("work", deadline_s=30, queue_s=60)
        assert name == "worker-0.1"
        await replicas.close()

    asyncio.run(run())


def test_a_replacement_serves_only_after_it_has_the_current_weights() -> None:
    async def run() -> None:
        current = 7

        async def prepare(handle: ActorHandle, name: str) -> None:
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


def test_further_returns_stay_references() -> None:
    async def run() -> None:
        replicas = build(1, [])
        await replicas.start()
        first, second = await replicas.call("twice", 4, deadline_s=30, queue_s=30, returns=2)
        assert first == 4
        assert isinstance(second, ray.ObjectRef)
        assert ray.get(second) == [4, 4, 4]
        await replicas.close()

    asyncio.run(run())


def test_a_replica_has_no_more_calls_than_it_says_it_takes() -> None:
    async def run() -> None:
        async def prepare(handle: ActorHandle, name: str) -> int:
            await serve_at_once(handle, name)
            return 2

        replicas = build(1, [], slots=5, prepare=prepare)
        await replicas.start()
        most = 0

        def watch(_: str) -> None:
            nonlocal most
            most = max(most, replicas.busy)

        await asyncio.gather(
            *(
                replicas.call("work", 0.01, deadline_s=30, queue_s=30, on_dispatch=watch)
                for _ in range(6)
            )
        )
        assert most == 2
        await replicas.close()

    asyncio.run(run())


def test_a_rank_that_dies_loses_the_call_on_all_ranks() -> None:
    async def run() -> None:
        ranks = RankSet("policy", [make(i, f"rank-{i}") for i in range(2)])
        assert await ranks.all("start", deadline_s=60) == ["rank-0", "rank-1"]
        pids = await ranks.all("pid", deadline_s=30)
        work = asyncio.create_task(ranks.all("work", 60, deadline_s=120))
        await asyncio.sleep(0)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(ReplicaLost, match="policy-1"):
            await work
        ranks.kill()

    asyncio.run(run())


def is_lost(reference: ray.ObjectRef) -> bool:
    try:
        ray.get(reference, timeout=1)
    except ray.exceptions.ObjectLostError:
        return True
    except ray.exceptions.GetTimeoutError:
        return False
    return False


def test_an_object_that_is_gone_is_not_taken_for_a_dead_replica() -> None:
    async def run() -> None:
        handle = make(0, "maker")
        ((gone,),) = (await answer(handle.put.remote(), "maker", "put", 60),)
        ray.kill(handle)  # an object dies with its owner, and a moment later
        await until(lambda: is_lost(gone))
        replicas = build(1, [])
        await replicas.start()
        with pytest.raises(ObjectsLost):
            await replicas.call("work", gone, deadline_s=30, queue_s=30)
        await replicas.close()

    asyncio.run(run())
