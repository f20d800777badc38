"""What is waited for together ends together."""

from __future__ import annotations

import asyncio
import errno
import gc
import time
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.answers import ObjectsLost, ReplicaLost, answer
from actors.waiting import all_of
from aligntune.runs.failure import reason
from tests.actors.stand_in_actors import Ref


def test_all_answers_come_in_order() -> None:
    async def one(number: int) -> int:
        await asyncio.sleep(0)
        return number

    async def main() -> list[int]:
        return await all_of(*(one(number) for number in (3, 1, 2)))

    assert asyncio.run(main()) == [3, 1, 2]


def test_where_one_fails_the_others_are_ended_first_and_nothing_is_left_unheard() -> None:
    ended: list[str] = []
    unheard: list[Any] = []

    async def fails() -> None:
        raise ReplicaLost("reward-0.0", "start had no answer within 300 s")

    async def starts_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")
            raise ReplicaLost("rollout-0.0", "it was let go")  # as a cancelled start may say

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, said: unheard.append(said))
        with pytest.raises(ReplicaLost, match=r"reward-0\.0: start had no answer"):
            await all_of(starts_slowly(), fails(), starts_slowly())
        assert ended == ["ended", "ended"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert unheard == []


def test_a_start_that_is_too_slow_names_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ref:
        def future(self) -> Any:
            return asyncio.Future()  # never answered

    monkeypatch.setattr(asyncio, "wrap_future", lambda future: future)

    async def main() -> None:
        await answer(Ref(), "reward-0.0", "start", 0.01, "reward.start_timeout_s")

    with pytest.raises(ReplicaLost) as lost:
        asyncio.run(main())
    said = "reward-0.0: start had no answer within 0.01 s (reward.start_timeout_s)"
    assert str(lost.value) == said


@pytest.mark.slow
@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("said", [1, RayActorError()])
def test_a_caller_that_is_cancelled_as_the_answer_comes_is_cancelled(
    turns: int, said: object
) -> None:
    """Not one that goes on as if nobody had cancelled it."""
    unheard: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, said: unheard.append(said))
        ref = Ref()
        asking = asyncio.create_task(answer(ref, "reward-0", "score", 60))
        await asyncio.sleep(0)
        if isinstance(said, Exception):
            ref.value.set_exception(said)
        else:
            ref.value.set_result(said)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = asking.cancel()  # False: it had its answer
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled() == cancelled

    asyncio.run(main())
    gc.collect()
    assert unheard == []


def test_an_answer_that_is_there_counts_though_its_caller_comes_late_to_it() -> None:
    async def main() -> int:
        ref = Ref()
        asking = asyncio.create_task(answer(ref, "reward-0", "score", 0.01))
        await asyncio.sleep(0)
        ref.value.set_result(1)
        time.sleep(0.02)  # noqa: ASYNC251 - the loop stands still, as it does for a long pickle
        return await asking

    assert asyncio.run(main()) == 1


@pytest.mark.parametrize("raised", [TimeoutError("x"), OSError(errno.ETIMEDOUT, "x")])
def test_an_actor_that_found_something_else_too_slow_is_not_lost(raised: Exception) -> None:
    """A file system of the network, say: the actor has answered, and in time."""

    async def main() -> None:
        ref = Ref()
        told = RayTaskError("write", "its traceback", raised, "proc", 1, "ip").as_instanceof_cause()
        assert isinstance(told, TimeoutError)
        ref.value.set_exception(told)
        await answer(ref, "policy-0", "write", 10)

    with pytest.raises(TimeoutError) as came:
        asyncio.run(main())
    assert came.value is raised


@pytest.mark.parametrize(
    "death",
    [
        RayActorError(),
        WorkerCrashedError(),
        NodeDiedError("its node died"),
        OutOfMemoryError("4 worker(s) were killed due to the node running low on memory."),
    ],
)
def test_whatever_ray_says_of_a_death_the_replica_is_lost_and_not_the_run(death: RayError) -> None:
    class Ref:
        def future(self) -> Any:
            future: Future[Any] = Future()
            future.set_exception(death)
            return future

    async def main() -> None:
        await answer(Ref(), "policy-0", "update", 10)

    with pytest.raises(ReplicaLost, match=r"policy-0: died during update") as lost:
        asyncio.run(main())
    if isinstance(death, OutOfMemoryError):
        assert "; end what else takes memory there" in reason(lost.value)


@pytest.mark.parametrize("death", [RayActorError(), OutOfMemoryError("low on memory")])
def test_what_waits_for_the_answer_of_one_that_died_has_lost_an_argument(death: RayError) -> None:
    class Ref:
        def future(self) -> Any:
            future: Future[Any] = Future()
            future.set_exception(RayTaskError("score", "its argument", death))
            return future

    async def main() -> None:
        await answer(Ref(), "reward-0.0", "score", 10)

    with pytest.raises(ObjectsLost, match="an argument of score is lost"):
        asyncio.run(main())
