"""A rank's side of weights over NCCL, with vLLM's own engines on both sides and no GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.models.wrapped import TrainedModel
from actors.transfer import nccl, nccl_sender
from actors.transfer.nccl import Broadcast, check_library
from actors.transfer.nccl_sender import NcclSender, Pairs
from tests.actors.transfer.without_gpu import Communicator, stand_in

WAIT_S = 60


class Weights:
    """A rank's strategy: some weights of several types, which change with `version`."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.device = torch.device("cpu")
        self.model = TrainedModel(torch.nn.Module())
        self.version = 0
        self.passes = 0

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        draw = torch.Generator().manual_seed(self.version)
        yield "embed", torch.randn(50, 8, generator=draw).to(torch.bfloat16)
        yield "turned", torch.randn(6, 4, generator=draw).T
        yield "norm", torch.randn(8, generator=draw)
        yield "large", torch.randn(4000, generator=draw)

    def now(self) -> dict[str, torch.Tensor]:
        return dict(self.full_state())


class Receiver:
    """One worker of a replica: vLLM's NCCL engine over a model that keeps what it is given."""

    def __init__(self, name: str) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.name = name
        self.got: dict[str, torch.Tensor] = {}
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        model: Any = SimpleNamespace(load_weights=self._load)
        self.engine = NCCLWeightTransferEngine(None, config, torch.device("cpu"), model)

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.got |= {name: tensor.clone() for name, tensor in weights}

    def take(self, sent: Broadcast) -> None:
        arrival = sent.arrival(self.name)
        assert arrival is not None
        if arrival.meeting:
            info = self.engine.parse_init_info(dict(arrival.meeting))
            self.engine.init_transfer_engine(info)
        self.engine.receive_weights(self.engine.parse_update_info(dict(arrival.update)))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    stand_in(monkeypatch.setattr)
    # So that the weights take several buffers.
    monkeypatch.setitem(nccl.PACKING, "packed_buffer_size_bytes", 500)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return list(got) == list(wanted) and all(
        got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
        for name, tensor in wanted.items()
    )


def send(
    pool: ThreadPoolExecutor, sender: NcclSender, replicas: list[Receiver], version: int = 1
) -> None:
    """One version, from rank 0 to all `replicas`."""
    names = tuple(each.name for each in replicas)
    sent = Broadcast(version, names, 1, sender.meet(names))
    taking = [pool.submit(each.take, sent) for each in replicas]
    sender.send(2)
    for each in taking:
        each.result(WAIT_S)


@pytest.mark.slow
def test_replicas_get_the_weights_bit_for_bit_and_meet_rank_0_once(
    threads: ThreadPoolExecutor,
) -> None:
    weights = Weights()
    sender = NcclSender(weights)  # type: ignore[arg-type]
    replicas = [Receiver("r0"), Receiver("r1")]
    for version in (1, 2):
        weights.version = version
        send(threads, sender, replicas, version)
        assert all(same(each.got, weights.now()) for each in replicas)
    groups = [each.engine.model_update_group for each in replicas]
    replacement = Receiver("r1.1")
    weights.version = 3
    send(threads, sender, [replicas[0], replacement], 3)
    assert same(replacement.got, weights.now())
    assert same(replicas[0].got, weights.now())
    assert replicas[0].engine.model_update_group is groups[0]


def test_to_meet_a_replica_leaves_training_in_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators import pynccl

    now = ["training's"]

    @contextlib.contextmanager
    def stream(one: str) -> Iterator[None]:
        before, now[:] = now[:], [one]
        yield
        now[:] = before

    class OfVLLM(Communicator):
        """Sets a stream for good, as vLLM's does."""

        def __init__(self, group: Any, device: Any) -> None:
            super().__init__(group, device)
            now[:] = ["vLLM's"]

    monkeypatch.setattr(pynccl, "PyNcclCommunicator", OfVLLM)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    assert isinstance(nccl_sender.communicator(None), OfVLLM)
    assert now == ["training's"]


def test_the_other_ranks_gather_beside_it_and_send_nothing() -> None:
    weights = Weights(rank=1)
    sender = NcclSender(weights)  # type: ignore[arg-type]
    assert sender.meet(("r0",)).ports == {}
    assert weights.passes == 1, "once, for names and shapes"
    sender.send(2)
    sender.meet(("r0",))
    assert weights.passes == 2


class Dead(Communicator):
    """Of a replica that has died: a broadcast to it ends when the communicator does."""

    begun: threading.Event
    over: threading.Event

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.begun.set()  # enqueued; what waits is the stream

    def destroy(self) -> None:
        super().destroy()
        self.over.set()


def test_a_replica_that_dies_amid_it_is_left_out_and_the_others_get_all(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the stream waits for the dead one, and the abort lets it go on."""
    from vllm.distributed.weight_transfer import packed_tensor

    begun, over = threading.Event(), threading.Event()
    monkeypatch.setattr(Dead, "begun", begun, raising=False)
    monkeypatch.setattr(Dead, "over", over, raising=False)

    class Waits:
        def synchronize(self) -> None:
            assert not begun.is_set() or over.wait(WAIT_S)

    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, number: (Waits(),) * number)
    weights = Weights()
    sender = NcclSender(weights)  # type: ignore[arg-type]
    lives = Receiver("r1")
    sent = Broadcast(1, ("r0", "r1"), 1, sender.meet(("r0", "r1")))
    sender._doors.pop("r0").close()
    sender._pairs.add("r0", Dead(None, None))
    taking = threads.submit(lives.take, sent)
    sending = threads.submit(sender.send, 2)
    assert begun.wait(WAIT_S)
    assert not sending.done()
    sender.leave_out(("r0",))
    sending.result(WAIT_S)
    taking.result(WAIT_S)
    assert same(lives.got, weights.now())


class Broken(Communicator):
    """Of a replica that has died: NCCL finds the connection broken at the second buffer."""

    sent = 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert not self.destroyed
        self.sent += 1
        if self.sent == 2:
            raise RuntimeError(self.group)


def test_a_replica_that_nccl_finds_gone_is_left_out_and_the_others_get_all(
    threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Weights()
    sender = NcclSender(weights)  # type: ignore[arg-type]
    lives = Receiver("r1")
    sent = Broadcast(1, ("r0", "r1"), 1, sender.meet(("r0", "r1")))
    sender._doors.pop("r0").close()
    sender._pairs.add("r0", gone := Broken("NCCL error: remote process exited", None))
    taking = threads.submit(lives.take, sent)
    assert sender.send(2) == {"r0": "NCCL error: remote process exited"}
    taking.result(WAIT_S)
    assert same(lives.got, weights.now())
    assert gone.sent == 2
    assert gone.destroyed
    assert "r0 gets no weights: NCCL error: remote process exited" in caplog.text
    assert sender.meet(("r0", "r1")).ports.keys() == {"r0"}, "it is met again"


def test_an_error_that_is_not_a_replicas_ends_the_sending() -> None:
    pairs = Pairs()
    pairs.add("r0", Broken("CUDA out of memory", None))
    pairs.broadcast(torch.zeros(1), src=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        pairs.broadcast(torch.zeros(1), src=0)


def test_a_replica_that_dies_as_its_communicator_is_made_is_left_out(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.utils import StatelessProcessGroup

    met = threading.Event()

    def communicator(group: Any) -> Communicator:
        if not met.is_set():
            met.set()
            raise RuntimeError("NCCL error: unhandled system error")
        return Communicator(group, None)

    monkeypatch.setattr(nccl_sender, "communicator", communicator)
    weights = Weights()
    sender = NcclSender(weights)  # type: ignore[arg-type]
    sent = Broadcast(1, ("r0", "r1"), 1, sender.meet(("r0", "r1")))
    sending = threads.submit(sender.send, 2)
    said = sent.meeting
    coming = threads.submit(StatelessProcessGroup.create, said.address, said.ports["r0"], 1, 2)
    assert met.wait(WAIT_S)
    coming.result(WAIT_S)
    (lives := Receiver("r1")).take(sent)
    sending.result(WAIT_S)
    assert same(lives.got, weights.now())


def test_a_replica_is_met_though_others_before_it_do_not_come_and_who_is_lost_is_not_waited_for(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = threading.Event()
    made = nccl_sender.communicator

    def communicator(group: Any) -> Any:
        met.set()
        return made(group)

    monkeypatch.setattr(nccl_sender, "communicator", communicator)
    monkeypatch.setattr(nccl_sender, "MEET_S", 2 * WAIT_S)
    weights = Weights()
    sender = NcclSender(weights)  # type: ignore[arg-type]
    comes = Receiver("r2")
    names = ("r0", "r1", "r2")
    sent = Broadcast(1, names, 1, sender.meet(names))
    taking: Future[None] = threads.submit(comes.take, sent)
    sending = threads.submit(sender.send, 2)
    assert met.wait(WAIT_S)
    assert not sending.done()
    sender.leave_out(("r0", "r1"))
    sending.result(WAIT_S)
    taking.result(WAIT_S)
    assert same(comes.got, weights.now())


@pytest.mark.slow
def test_one_that_does_not_come_is_left_out(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_sender, "MEET_S", 1)
    weights = Weights()
    sender = NcclSender(weights)  # type: ignore[arg-type]
    comes = Receiver("r1")
    sent = Broadcast(1, ("r0", "r1"), 1, sender.meet(("r0", "r1")))
    taking: Future[None] = threads.submit(comes.take, sent)
    sender.send(2)
    taking.result(WAIT_S)
    assert same(comes.got, weights.now())
    assert sender.meet(("r0", "r1")).ports.keys() == {"r0"}, "it is waited for again"


def test_where_nccl_would_be_left_out_in_silence_nothing_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm.envs
    from vllm.distributed.device_communicators import pynccl_wrapper

    def missing() -> None:
        raise OSError("libnccl.so.2: cannot open shared object file")

    with monkeypatch.context() as broken:
        broken.setattr(pynccl_wrapper, "NCCLLibrary", missing)
        with pytest.raises(ValueError, match=r"cannot load NCCL.*use rollout\.weight_sync=full"):
            NcclSender(Weights())  # type: ignore[arg-type]
        NcclSender(Weights(rank=1))  # type: ignore[arg-type]
    check_library()
    monkeypatch.setattr(vllm.envs, "VLLM_DISABLE_PYNCCL", True, raising=False)
    with pytest.raises(ValueError, match="VLLM_DISABLE_PYNCCL is set; unset it"):
        check_library()


class Heard:
    """A communicator that counts."""

    def __init__(self) -> None:
        self.tensors = 0
        self.destroyed = 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert not self.destroyed, "a communicator is used after its end"
        self.tensors += 1

    def destroy(self) -> None:
        self.destroyed += 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.sets(st.sampled_from("abcd"))),
        st.tuples(st.just("add"), st.sampled_from("abcd").map(lambda name: {name})),
        st.tuples(st.just("leave_out"), st.sets(st.sampled_from("abcd"))),
        st.tuples(st.just("broadcast"), st.just(set())),
    ),
    max_size=30,
)


@pytest.mark.slow
@given(STEPS)
def test_whoever_is_left_out_hears_nothing_more_and_every_other_hears_all(
    steps: list[tuple[str, set[str]]],
) -> None:
    pairs, made, out = Pairs(), {}, set()  # type: ignore[var-annotated]
    every: list[Heard] = []
    tensor = torch.zeros(1)
    for what, names in steps:
        if what == "begin":
            assert set(pairs.begin(sorted(names))) == names - made.keys()
            made, out = {name: made[name] for name in made.keys() & names}, set()
        elif what == "add":
            (name,) = names
            if name in made:
                continue
            every.append(heard := Heard())
            pairs.add(name, heard)
            if name in out:
                assert heard.destroyed == 1
            else:
                made[name] = heard
        elif what == "leave_out":
            pairs.leave_out(sorted(names))
            out |= names
            made = {name: heard for name, heard in made.items() if name not in names}
        else:
            before = {name: heard.tensors for name, heard in made.items()}
            pairs.broadcast(tensor, src=0)
            assert all(heard.tensors == before[name] + 1 for name, heard in made.items())
        lives = {id(heard) for heard in made.values()}
        assert all(heard.destroyed == (id(heard) not in lives) for heard in every)
