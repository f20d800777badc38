"""A tiny policy at three versions, and a replica of the transformers engine in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from actors.engines.specs import TransformersSpec
from actors.rollout import RolloutActor
from actors.transfer.bundle import WeightBundle
from tests.actors.engines.replicas import (
    WAIT_S,
    Replica,
    model_spec,
    policies_of,
    rollout_spec,
    tiny_policy,
    tokenizer_of_characters,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model of 0.3M random parameters with tied embeddings, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_policy(seed=0).save_pretrained(path)
    tokenizer_of_characters().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def policies(folder: Path) -> dict[int, PreTrainedModel]:
    """See `policies_of`."""
    return policies_of(folder)


@pytest.fixture(scope="module")
def bundles(policies: dict[int, PreTrainedModel]) -> dict[int, WeightBundle]:
    return {
        version: WeightBundle.pack(version, model.named_parameters())
        for version, model in policies.items()
    }


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread, as an async Ray actor has one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)


@pytest.fixture(scope="module")
def transformers_replica(folder: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Replica]:
    spec = rollout_spec(TransformersSpec())
    actor = RolloutActor(model_spec(folder), spec, "t0", 0, 8, 11)

    def call(method: str, *args: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(getattr(actor, method)(*args), loop)

    yield Replica("transformers", call, actor)
    call("close").result(WAIT_S)
