"""Heartbeats: who says nothing gets no new work, then is replaced; who works for long is left."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from actors.answers import ReplicaLost
from actors.liveness import HEALTH, HEALTH_GROUP, Alive, Patience, listen, sign_of_life
from actors.replicas import State
from actors.specs import CriticSpec
from actors.supervise import ReplicaSet
from aligntune.online.ranks import PolicyLost, Ranks
from tests.actors.environments.toy import Later
from tests.actors.stand_in_actors import Actor

QUICK = Patience(0.6)


class Wary(Patience):
    """Suspects at once, and waits for long then."""

    every_s = 0.1
    suspect_s = 0.2


class Worker:
    """Answers while its gate is open."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.done = 0
        self.version = 0

    async def ping(self) -> int:
        await self.open.wait()
        return self.done

    async def work(self) -> str:
        return "done"

    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def load(self, version: int) -> int:
        self.version = version
        return version


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what comes true sets no event
            await asyncio.sleep(0.01)


def build(size: int, patience: Patience) -> tuple[ReplicaSet, list[Worker], list[str]]:
    workers: list[Worker] = []
    events: list[str] = []

    def make(index: int, name: str) -> Any:
        workers.append(Worker())
        return Actor(workers[-1])

    async def start(handle: Any, name: str) -> None: ...

    role = ReplicaSet(
        "worker",
        size,
        make,
        start,
        slots=2,
        max_restarts=3,
        event=lambda kind, **_: events.append(kind),
        kill=lambda handle: handle.kill(),
        drop=lambda ref: ref.drop(),
        ping=lambda handle: handle.ping.remote(),
        patience=patience,
    )
    return role, workers, events


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False])
def test_a_replica_that_says_nothing_is_replaced_busy_or_idle(busy: bool) -> None:
    async def run() -> None:
        role, workers, events = build(1, QUICK)
        await role.start()
        calls = [
            asyncio.create_task(role.call("wait", deadline_s=600, queue_s=600))
            for _ in range(2 * busy)
        ]
        workers[0].open.clear()
        await until(lambda: "replica_restarted" in events)
        assert events == ["replica_silent", "replica_lost", "replica_restarted"]
        for call in calls:
            with pytest.raises(ReplicaLost):
                await call
        assert await role.call("work", deadline_s=30, queue_s=30) == ("done",)
        await role.close()

    asyncio.run(run())


@pytest.mark.slow
def test_a_silent_replica_gets_no_new_call_and_every_new_weight_until_it_speaks_again() -> None:
    async def run() -> None:
        role, workers, events = build(2, Wary(60.0))
        await role.start()
        workers[0].open.clear()
        await until(lambda: "replica_silent" in events)
        silent = role.replicas.live[0]
        assert silent.state is State.SUSPECT
        for _ in range(4):
            await role.call("work", deadline_s=30, queue_s=30)
        assert silent.calls == 0
        assert await role.broadcast("load", 7, deadline_s=30) == [7, 7]
        workers[0].done = 5
        workers[0].open.set()
        await until(lambda: silent.state is State.READY)
        assert workers[0].version == 7
        assert role.progress == 5
        assert events == ["replica_silent"]
        await role.close()

    asyncio.run(run())


@pytest.mark.slow
def test_a_caller_that_was_stopped_itself_takes_nobody_for_dead() -> None:
    """The loop stands still for longer than the patience; the answers are there when it goes on."""

    async def run() -> list[int]:
        heard: list[int] = []

        async def ask() -> int:
            await asyncio.sleep(0.01)
            return 1

        task = asyncio.create_task(listen(lambda: Later(ask()), Patience(0.3), heard.append))
        await until(lambda: len(heard) == 1)
        for _ in range(3):
            time.sleep(0.5)  # noqa: ASYNC251 - what is tried
            await asyncio.sleep(0)
        await until(lambda: len(heard) >= 3)
        assert not task.done()
        task.cancel()
        return heard

    assert asyncio.run(run())


class Rank(Alive):
    """Works in a thread, as the ranks of a policy do."""

    def address(self) -> tuple[str, int]:
        return "here", 7000

    def start(self, host: str, port: int) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def work(self, seconds: float) -> int:
        for _ in range(10):
            time.sleep(seconds / 10)
            self.done += 1
        return threading.get_ident()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_rank_that_is_stopped_is_lost_busy_or_idle_and_one_that_works_for_long_is_not() -> None:
    def make(rank: int, name: str) -> Any:
        remote = ray.remote(num_cpus=0.1, max_restarts=0, concurrency_groups=HEALTH_GROUP)
        return remote(Rank).remote()

    async def run() -> None:
        told = asyncio.Event()
        ping = sign_of_life(concurrent=False)
        ranks = Ranks(
            CriticSpec(strategy="deepspeed", ranks=2), make, ping, Patience(3.0), told.set
        )
        started = await ranks.start()
        first, second = await ranks.all("work", 6.0), await ranks.all("work", 0.0)
        assert first == second, "one thread does all the work"
        await until(lambda: ranks.progress == 40)
        stacks = ranks._handles[0].stacks.options(concurrency_group=HEALTH).remote()
        assert "thread" in await stacks

        os.kill(started[1][1]["pid"], signal.SIGSTOP)
        busy = asyncio.create_task(ranks.all("work", 600.0))
        with pytest.raises(PolicyLost, match=r"critic-1: no sign of life for \d+ s \(train\."):
            async with asyncio.timeout(30):
                await busy
        ranks.kill()

        told.clear()
        started = await ranks.start()
        os.kill(started[0][1]["pid"], signal.SIGKILL)
        async with asyncio.timeout(30):
            await told.wait()
        with pytest.raises(PolicyLost, match="critic-0"):
            await ranks.all("work", 0.0)
        ranks.kill()

    asyncio.run(run())


def test_what_a_ping_raised_is_told_without_the_header_of_ray() -> None:
    trace = "Traceback (most recent call last):\n  ...\nRuntimeError: the engine has ended"
    raised = RayTaskError(
        "ping", trace, RuntimeError("the engine has ended"), "ray::Rollout.ping", 1, "10.0.0.1"
    ).as_instanceof_cause()

    async def run() -> str:
        async def ping() -> int:
            raise raised

        return await listen(lambda: Later(ping()), QUICK, lambda done: None)

    assert asyncio.run(run()) == "the engine has ended"
