"""Replica sets on real Ray actors: what a process that dies or stops, and a lost object, look like.

What a set does about them is in test_replica_set.py and test_replicas.py.
"""

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

from actors.answers import ObjectsLost, ReplicaLost, answer
from actors.supervise import ReplicaSet

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


def test_a_killed_replica_is_replaced_and_its_caller_told() -> None:
    async def run() -> None:
        events: Events = []
        replicas = build(1, events)
        await replicas.start()
        (pid,) = await replicas.call("pid", deadline_s=30, queue_s=30)
        begun: list[str] = []
        call = asyncio.create_task(
            replicas.call("work", 60, deadline_s=120, queue_s=30, on_dispatch=begun.append)
        )
        await until(lambda: bool(begun))
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
