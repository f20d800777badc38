"""An engine of one's own: its settings, its class, and one entry in the table of engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import Field

from actors.engines.base import Turn, Work, completion
from actors.engines.specs import ENGINES, EngineSpec
from actors.messages import (
    Completion,
    FinishReason,
    GroupSampling,
    Prompt,
    Sampling,
    VersionSpan,
)
from actors.rollout import RolloutActor
from actors.specs import ModelSpec, RolloutSpec
from actors.transfer.bundle import WeightBundle


class EchoSpec(EngineSpec):
    """Says the prompt again, some times over."""

    implementation: ClassVar[str] = f"{__name__}:EchoEngine"
    package: ClassVar[str] = "numpy"

    name: Literal["echo"] = "echo"
    times: int = Field(1, gt=0, description="how often")


class EchoEngine:
    """See `RolloutEngine`."""

    max_concurrent_groups = 4
    work = Work()

    def __init__(
        self, model: ModelSpec, spec: RolloutSpec, version: int, sequences: int, seed: int
    ) -> None:
        assert isinstance(spec.engine, EchoSpec)
        self.version = version
        self._times = spec.engine.times

    async def start(self) -> None:
        """Nothing to load."""

    async def sample(
        self, token_ids: np.ndarray, sampling: Sampling, n: int, key: str
    ) -> list[Completion]:
        """The prompt, as often as told."""
        said = np.tile(token_ids, self._times)
        spans = (VersionSpan(self.version, len(said)),)
        one = completion(said, np.zeros(len(said), np.float32), FinishReason.STOP, spans)
        return [one] * n

    async def sample_turns(self, turns: Sequence[Turn]) -> list[Completion]:
        """The prompt of each, as often as told."""
        return [(await self.sample(t.token_ids, t.sampling, 1, t.key))[0] for t in turns]

    async def load_weights(self, bundle: WeightBundle) -> None:
        """Has none."""

    async def check(self) -> None:
        """It lives."""

    async def answers(self) -> None:
        """It lives."""

    async def close(self) -> None:
        """Nothing to free."""


def test_an_engine_is_configured_and_run_by_its_entry_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENGINES, "echo", EchoSpec)
    spec = RolloutSpec.model_validate({"engine": {"name": "echo", "times": 2}})
    assert RolloutSpec.model_validate(spec.model_dump(mode="json")) == spec

    async def group() -> tuple[dict[str, Any], Any]:
        actor = RolloutActor(ModelSpec(name="none"), spec, "rollout-0", 7, 3, 0)
        started = await actor.start()
        prompt = Prompt(0, "a b", "a b", np.array([5, 6], np.int32))
        sampling = GroupSampling(completions=3, max_tokens=8, temperature=1.0, seed=1, group_id=9)
        made = await actor.generate(prompt, sampling)
        await actor.close()
        return started, made

    started, (record, tensors) = asyncio.run(group())
    assert (started["engine"], started["version"]) == ("echo", 7)
    assert (record.group_id, record.lengths) == (9, (4, 4, 4))
    assert tensors.token_ids.tolist() == [5, 6, 5, 6] * 3
