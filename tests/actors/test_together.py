"""Why ranks that are called together failed: the cause, not what it did to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest
import torch

from actors import together as module
from actors.answers import ReplicaLost
from actors.together import broken_connection, together

PEER = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed")
DEATH = ReplicaLost("policy-1", "died during update")


async def after(turns: int, outcome: object) -> object:
    """`outcome`, returned or raised, once the loop has gone round `turns` times."""
    for _ in range(turns):
        await asyncio.sleep(0)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def cause(*waits: Awaitable[object]) -> BaseException:
    async def run() -> BaseException:
        with pytest.raises(Exception) as raised:  # noqa: PT011 - which one is what is asked
            await together("policy", waits)
        return raised.value

    return asyncio.run(run())


def test_all_answers_come_in_order() -> None:
    async def run() -> list[object]:
        return await together("policy", [after(3, "a"), after(1, "b"), after(2, "c")])

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_a_death_that_is_known_after_the_others_lost_their_connection_is_the_cause() -> None:
    assert cause(after(1, PEER), after(9, DEATH), after(2, PEER)) is DEATH


def test_an_error_of_a_rank_s_own_comes_before_what_it_did_to_the_others() -> None:
    own = ValueError("no such layout")
    assert cause(after(1, PEER), after(9, own)) is own
    assert cause(after(1, PEER), after(1, own), after(9, DEATH)) is DEATH


def test_connections_that_break_without_a_death_are_a_lost_rank() -> None:
    """A link that is cut: the node is declared dead long after."""
    lost = cause(after(1, PEER), after(2, PEER))
    assert isinstance(lost, ReplicaLost)
    assert lost.replica == "policy-0"
    assert "lost its connection to the other ranks" in lost.reason


def test_ranks_that_wait_for_a_failed_one_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PEER_SECONDS", 0.01)
    out_of_memory = RuntimeError("out of memory")

    async def stuck() -> None:
        await asyncio.Event().wait()

    assert cause(after(1, out_of_memory), stuck()) is out_of_memory


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (PEER, True),
        (torch.distributed.DistNetworkError("the client socket has timed out"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (ValueError("gloo"), False),
    ],
)
def test_what_a_broken_connection_looks_like(error: Exception, is_one: bool) -> None:
    assert broken_connection(error) is is_one
