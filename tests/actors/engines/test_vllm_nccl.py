"""vLLM's whole engine takes weights that a rank sends; NCCL and GPU streams are stood in for."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from actors.engines.specs import VLLMSpec
from actors.messages import Sampling
from actors.models.wrapped import TrainedModel
from actors.transfer.bundle import WeightBundle
from actors.transfer.nccl import Broadcast
from actors.transfer.nccl_sender import NcclSender
from actors.transfer.specs import NcclSpec
from tests.actors.engines.replicas import WAIT_S, greedy, model_spec, prompt_of, rollout_spec
from tests.actors.transfer.without_gpu import stand_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOKENS = 16


class OnCpu(NcclSpec):
    """NCCL as workers without a GPU have it."""

    vllm_workers: ClassVar[str] = "tests.actors.transfer.nccl_workers"


class Weights:
    """A rank's strategy, over the weights of one model after another."""

    rank = 0
    device = torch.device("cpu")
    model: TrainedModel

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.unwrapped.named_parameters():
            yield name, parameter.detach()


def test_what_is_sent_is_what_it_samples_with_and_it_still_reads_what_lies_in_the_store(
    folder: Path,
    policies: dict[int, PreTrainedModel],
    bundles: dict[int, WeightBundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    from actors.engines.vllm import VLLMEngine

    spec = rollout_spec(VLLMSpec(kv_cache_gib=0.25)).model_copy(update={"weight_sync": OnCpu()})
    prompt = prompt_of(3)

    async def main() -> None:
        others = multiprocessing.active_children()
        engine = VLLMEngine(model_spec(folder), spec, 0, 8, 0)
        await engine.start()
        own = [child for child in multiprocessing.active_children() if child not in others]
        stand_in(monkeypatch.setattr)  # in the process of the rank, which is this one
        weights: Any = Weights()
        weights.model = TrainedModel(policies[1])
        sender = NcclSender(weights)

        async def says(version: int) -> bool:
            (one,) = await engine.sample(prompt.token_ids, Sampling(TOKENS, 0.0), 1, "0/0")
            (segment,) = one.segments
            assert {span.version for span in segment.spans} == {version}
            return list(segment.token_ids) == greedy(policies[version], prompt, TOKENS)

        async def send(version: int) -> dict[str, Any]:
            weights.model = TrainedModel(policies[version])
            sent = Broadcast(version, ("r0",), 1, sender.meet(("r0",)))
            arrival = sent.arrival("r0")
            assert arrival is not None
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(
                    asyncio.to_thread(sender.send, 2), engine.load_weights(arrival)
                )
            return dict(arrival.meeting)

        try:
            assert await says(0)
            assert await send(1), "they meet"
            assert await says(1)
            assert not await send(2), "they have met"
            assert await says(2)
            await engine.load_weights(bundles[1])  # as one that joins late
            assert await says(1)
            assert not await send(2)
            assert await says(2)
            assert engine._weights._memory is None, "nobody reads that version again"
        finally:
            await engine.close()
            for child in own:  # vLLM does not wait for one that it has killed
                child.join(WAIT_S)

    asyncio.run(main())
