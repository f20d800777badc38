"""Weights over NCCL as the driver sees it: who is asked for what, and what is lost with whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.answers import ReplicaLost
from actors.transfer import nccl
from actors.transfer.base import Offer
from actors.transfer.nccl import PACKING, SENDER, Broadcast, Meeting, Nccl

NAMES, DTYPES, SHAPES = ("a", "b"), ("bfloat16", "float32"), ((2, 3), (4,))


def meeting(*new: str) -> Meeting:
    return Meeting(
        "10.0.0.1", {name: 7000 + i for i, name in enumerate(new)}, NAMES, DTYPES, SHAPES
    )


class Side:
    """Rank 0 and the replicas: each waits until the other side is there, as in a broadcast."""

    def __init__(self, *serving: str) -> None:
        self.serving = list(serving)
        self.calls: list[tuple[Any, ...]] = []
        self.met: set[str] = set()
        self.sending: set[str] = set()  # whom rank 0 waits for
        self.free = asyncio.Event()  # it waits for nobody any more
        self.left_out = asyncio.Event()  # somebody was
        self.error: Exception | None = None  # of rank 0's, as it begins to send
        self.failed: dict[str, str] = {}  # what NCCL said of replicas

    async def ask(self, sender: str, method: str, *args: Any, deadline_s: float) -> Any:
        assert sender == SENDER
        assert deadline_s > 2 * 30, "later than that of a replica, and of one more"
        self.calls.append((method, *args))
        if method == "meet":
            self.sending = set(args[0])
            new = [name for name in args[0] if name not in self.met]
            self.met = set(args[0])
            return meeting(*new)
        if self.error is not None:
            raise self.error
        if self.sending:
            await self.free.wait()
        return self.failed

    async def beside(self, sender: str, method: str, *args: Any, deadline_s: float) -> None:
        assert sender == SENDER
        self.calls.append((method, *args))
        self.left_out.set()
        for name in args[0]:
            self.got(name)

    def got(self, name: str) -> None:
        """Rank 0 need not wait for this replica any more."""
        self.sending.discard(name)
        if not self.sending:
            self.free.set()

    def transport(self) -> Nccl:
        return Nccl(self.ask, self.beside, lambda: self.serving, workers=2, timeout_s=30)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "LOOK_S", 0.01)
    monkeypatch.setattr(nccl, "GRACE_S", 0.05)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(30):
            await main()

    asyncio.run(within())


def test_rank_0_says_where_it_waits_and_sends_while_all_receive() -> None:
    async def main() -> None:
        side = Side("r1", "r0")
        offers: list[Offer] = []

        async def receive(offer: Offer) -> None:
            assert [call[0] for call in side.calls] == ["meet", "send"]
            assert side.calls[-1] == ("send", 3), "rank 0 sends beside it, to two workers"
            offers.append(offer)
            for name in side.serving:
                side.got(name)

        transport = side.transport()
        assert not transport.rereadable
        given = await transport.publish(1, receive)
        assert offers == [given]
        assert (given.version, given.method) == (1, "receive_weights")
        sent = given.payload
        first, second = sent.arrival("r0"), sent.arrival("r1")
        assert sent.arrival("r2") is None
        assert first.update == {
            "names": ["a", "b"],
            "dtype_names": ["bfloat16", "float32"],
            "shapes": [[2, 3], [4]],
        }
        assert first.meeting == {
            "master_address": "10.0.0.1",
            "master_port": 7000,
            "rank_offset": 1,
            "world_size": 3,
            **PACKING,
        }
        assert second.meeting["master_port"] == 7001
        side.serving.append("r2")
        side.calls.clear()
        again = await transport.publish(2, receive)
        assert again.payload.arrival("r0").meeting == {}, "rank 0 has met it"
        assert again.payload.arrival("r2").meeting["master_port"] == 7000

    run(main)


def test_what_a_replica_is_told_is_what_vllm_takes() -> None:
    engine = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
    told = Broadcast(3, ("r0",), 2, meeting("r0")).arrival("r0")
    assert told is not None
    info = engine.NCCLWeightTransferInitInfo(**told.meeting)
    assert (info.master_port, info.rank_offset, info.world_size) == (7000, 1, 3)
    assert info.packed
    assert engine.NCCLWeightTransferUpdateInfo(**told.update).names == ["a", "b"]
    sender = engine.NCCLTrainerInitInfo("10.0.0.1", 7000, 3, rank=0, **PACKING)
    fields = ("packed", "packed_buffer_size_bytes", "packed_num_buffers")
    assert [getattr(info, f) for f in fields] == [getattr(sender, f) for f in fields]


def test_a_replica_that_is_lost_on_the_way_is_left_out_and_the_others_get_all() -> None:
    async def main() -> None:
        side = Side("r0", "r1")

        async def receive(offer: Offer) -> None:
            side.serving.remove("r1")  # its process dies; `broadcast` goes on with the others
            await side.left_out.wait()
            side.got("r0")

        await side.transport().publish(1, receive)
        assert side.calls[2:] == [("leave_out", ("r1",))]

    run(main)


def test_one_that_never_came_is_left_out_once_all_others_have_answered() -> None:
    async def main() -> None:
        side = Side("r0", "r1")

        async def receive(offer: Offer) -> None:
            side.got("r0")  # r1 serves, and was not called

        await side.transport().publish(1, receive)
        assert side.calls[2:] == [("leave_out", ("r0", "r1"))]

    run(main)


def test_where_nccl_fails_for_all_time_after_time_its_reason_ends_the_run() -> None:
    async def main() -> None:
        side = Side("r0", "r1")
        transport = side.transport()

        async def receive(offer: Offer) -> None:
            side.got("r0")
            side.got("r1")

        one, both = {"r0": "NCCL error: gone"}, dict.fromkeys(("r0", "r1"), "NCCL error: system")
        for version, failed in enumerate((both, both, one, both, both)):
            side.failed = failed
            await transport.publish(version, receive)
        with pytest.raises(RuntimeError, match=r"took 3 versions .*: NCCL error: system"):
            await transport.publish(5, receive)

    run(main)


def test_where_a_receiver_raises_rank_0_is_freed_first() -> None:
    async def main() -> None:
        side = Side("r0")

        async def receive(offer: Offer) -> None:
            raise KeyError("the weights do not fit")

        with pytest.raises(KeyError, match="do not fit"):
            await side.transport().publish(1, receive)
        assert side.free.is_set()

    run(main)


def test_where_rank_0_fails_the_receivers_are_told_to_give_up_at_once() -> None:
    async def main() -> None:
        side = Side("r0")
        side.error = ReplicaLost("policy-0", "died during send")
        ended = []

        async def receive(offer: Offer) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(offer.version)
                raise

        with pytest.raises(ReplicaLost, match="died during send"):
            await side.transport().publish(4, receive)
        assert ended == [4]

    run(main)


def test_a_publisher_that_is_cancelled_leaves_nobody_behind() -> None:
    async def main() -> None:
        side = Side("r0")
        begun, ended = asyncio.Event(), []

        async def receive(offer: Offer) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("receive")

        task = asyncio.create_task(side.transport().publish(1, receive))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["receive"]

    run(main)


def test_where_nobody_serves_nothing_is_waited_for() -> None:
    async def main() -> None:
        side = Side()

        async def receive(offer: Offer) -> None:
            assert offer.payload.arrival("r0") is None

        await side.transport().publish(1, receive)

    run(main)
