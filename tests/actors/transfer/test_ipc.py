"""Weights out of a GPU's memory, with vLLM's own engine and no GPU: handles name tensors here."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.models.wrapped import TrainedModel
from actors.transfer import ipc_sender
from actors.transfer.base import Offer
from actors.transfer.ipc import SENDER, Ipc, Shared
from actors.transfer.ipc_sender import IpcSender

GPU = "GPU-0"
BOTH = {"rollout-0.0": 0, "rollout-1.1": 1}


class Weights:
    """A strategy of two ranks, on GPUs of their own; of the other one it has the handles, where
    that shares too."""

    def __init__(self, rank: int = 0, both: bool = True) -> None:
        self.rank = rank
        self.both = both
        self.device = torch.device("cpu")
        self.model = TrainedModel(torch.nn.Module())

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "embed", torch.arange(12, dtype=torch.bfloat16).view(3, 4)
        yield "turned", torch.arange(6.0).view(2, 3).T

    def gather(self, value: Any) -> list[Any]:
        other = ("GPU-1", [("elsewhere",)] * 2 if self.both else [])
        return [value, other] if self.rank == 0 else [other, value]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """What ranks share now, by the number that the handle is."""
    found: dict[int, torch.Tensor] = {}

    def reduce_tensor(tensor: torch.Tensor) -> tuple[None, tuple[Any, ...]]:
        assert tensor.is_contiguous()
        found[len(found)] = tensor
        return None, (*"012345", "device", len(found) - 1)

    monkeypatch.setattr(ipc_sender, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(ipc_sender, "_gpu", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    return found


def share(version: int = 5) -> tuple[IpcSender, Shared]:
    sender = IpcSender(Weights())  # type: ignore[arg-type]
    shared = sender.share(version, BOTH)
    assert shared is not None
    return sender, shared


@pytest.mark.slow
def test_vllms_engine_opens_what_the_rank_on_its_gpu_shares(
    exported: dict[int, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer import ipc_engine

    from actors.engines import vllm_ipc

    def rebuild(*args: Any) -> torch.Tensor:
        *_, device, number = args
        assert device == 0, "that of the worker"
        return exported[number]

    gpu = SimpleNamespace(uuid=GPU)
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    _, shared = share()
    arrival = shared.arrival("rollout-0.0")
    assert arrival is not None
    told = dict(arrival.update)
    got: dict[str, torch.Tensor] = {}

    def load(weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        got.update(weights)
        return set(got)

    config: Any = SimpleNamespace(parallel_config=None, model_config=None)
    model: Any = SimpleNamespace(load_weights=load)
    device = torch.device("cuda", 0)
    engine = vllm_ipc.SharedWeightTransferEngine(None, config, device, model)
    engine.init_transfer_engine(engine.parse_init_info({}))
    engine._expected = {"embed", "turned"}
    engine.update_weights(told)
    assert list(got) == ["embed", "turned"]
    for name, tensor in Weights().full_state():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    engine._expected = {"embed", "turned", "norm"}
    with pytest.raises(ValueError, match="do not hold 'norm'"):
        engine.update_weights(told)
    gpu.uuid = "GPU-7"
    with pytest.raises(ValueError, match="IPC handle not found for GPU UUID GPU-7"):
        engine.update_weights(told)


def test_a_weight_has_a_handle_for_the_gpu_of_every_rank(
    exported: dict[int, torch.Tensor],
) -> None:
    _, shared = share()
    assert shared.shapes == ((3, 4), (3, 2))
    assert shared.dtypes == ("bfloat16", "float32")
    handles = pickle.loads(shared.handles)
    assert [list(each) for each in handles] == [[GPU, "GPU-1"]] * 2
    other = IpcSender(Weights(rank=1))  # type: ignore[arg-type]
    assert other.share(5, BOTH) is None
    assert len(other._kept) == 2, "it shares its own"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_replica_is_down_shares_nothing(
    exported: dict[int, torch.Tensor], rank: int
) -> None:
    """Nobody would open it, and torch frees only what was opened."""
    sender = IpcSender(Weights(rank, both=rank == 0))  # type: ignore[arg-type]
    name, other = list(BOTH)[rank], list(BOTH)[1 - rank]
    shared = sender.share(5, {other: 1 - rank})
    assert sender._kept == []
    assert exported == {}
    if shared is not None:
        assert shared.names == ("embed", "turned")
        assert [list(each) for each in pickle.loads(shared.handles)] == [["GPU-1"]] * 2
        assert shared.arrival(other) is not None
        assert shared.arrival(name) is None, "it takes the version from the store"


def test_a_replica_beside_no_rank_takes_the_version_from_the_store(
    exported: dict[int, torch.Tensor],
) -> None:
    shared = IpcSender(Weights()).share(5, BOTH | {"rollout-2.2": 2})  # type: ignore[arg-type]
    assert shared is not None
    assert shared.arrival("rollout-1.1") is not None
    assert shared.arrival("rollout-2.2") is None


def test_a_version_is_kept_until_it_is_let_go_and_no_two_at_once(
    exported: dict[int, torch.Tensor],
) -> None:
    sender, _ = share(5)
    first = sender._kept
    sender.share(6, BOTH)
    assert len(sender._kept) == len(first)
    assert all(new is not old for new, old in zip(sender._kept, first, strict=True))
    sender.let_go()
    assert sender._kept == []
    sender.let_go()


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_let_go_once_all_replicas_have_loaded(fails: bool) -> None:
    calls: list[tuple[Any, ...]] = []

    async def ask(sender: str, method: str, *args: Any, deadline_s: float) -> Any:
        assert (sender, deadline_s) == (SENDER, 30)
        calls.append((method, *args))
        if method == "let_go":
            return None
        return Shared(4, tuple(args[1]), ("a",), ("float32",), ((2,),), b"handles")

    async def receive(offer: Offer) -> None:
        calls.append((offer.version, offer.method))
        assert offer.payload.arrival("rollout-0.0").update["handles"] == b"handles"
        await asyncio.sleep(0)
        if fails:
            raise KeyError("weights do not fit")

    async def main() -> None:
        transport = Ipc(ask, lambda: BOTH, timeout_s=30)
        assert not transport.rereadable
        if fails:
            with pytest.raises(KeyError):
                await transport.publish(4, receive)
        else:
            await transport.publish(4, receive)
        wanted = [("share", 4, BOTH), (4, "receive_weights")]
        assert calls == wanted + [("let_go",)] * (not fails)

    asyncio.run(main())
