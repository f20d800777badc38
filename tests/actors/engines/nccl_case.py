"""A rank sends weights to vLLM's whole engine; NCCL and GPU streams are stood in for.

    python -m tests.actors.engines.nccl_case FOLDER

FOLDER holds the model of policy version 0. The program ends well, and says so in its last line, if
the engine samples with the weights it was sent, and with those that it read from the store.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from actors.engines.specs import VLLMSpec
from actors.engines.vllm import VLLMEngine
from actors.messages import Sampling
from actors.models.wrapped import TrainedModel
from actors.transfer.bundle import WeightBundle
from actors.transfer.nccl import Broadcast
from actors.transfer.nccl_sender import NcclSender
from actors.transfer.specs import NcclSpec
from tests.actors.engines.replicas import (
    WAIT_S,
    greedy,
    model_spec,
    policies_of,
    prompt_of,
    rollout_spec,
)
from tests.actors.transfer.without_gpu import stand_in

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


async def main(folder: Path) -> None:
    """Send, sample and compare."""
    torch.set_num_threads(1)
    policies = policies_of(folder)
    stored = WeightBundle.pack(1, policies[1].named_parameters())
    spec = rollout_spec(VLLMSpec(kv_cache_gib=0.25)).model_copy(update={"weight_sync": OnCpu()})
    prompt = prompt_of(3)
    engine = VLLMEngine(model_spec(folder), spec, 0, 8, 0)
    await engine.start()
    own = multiprocessing.active_children()
    stand_in(setattr)  # in the process of the rank, which is this one
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
            await asyncio.gather(asyncio.to_thread(sender.send, 2), engine.load_weights(arrival))
        return dict(arrival.meeting)

    try:
        assert await says(0)
        assert await send(1), "they meet"
        assert await says(1)
        assert not await send(2), "they have met"
        assert await says(2)
        await engine.load_weights(stored)  # as one that joins late
        assert await says(1)
        assert not await send(2)
        assert await says(2)
        assert engine._weights._memory is None, "nobody reads that version again"
    finally:
        await engine.close()
        for child in own:  # vLLM does not wait for one that it has killed
            child.join(WAIT_S)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
    print("every version was that of its weights")
