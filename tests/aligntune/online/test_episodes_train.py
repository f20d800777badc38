"""Each algorithm trains on episodes: the real loop, episodes and ranks; the game is a toy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.critic import CriticActor
from actors.messages import GroupTensors, GroupWork, PrepareJob, UpdateResult
from actors.policy import PolicyActor
from aligntune.algorithms.base import Algorithm
from aligntune.online.sharing import plan_step
from aligntune.runs.checkpoint import POLICY
from aligntune.runs.jsonl import read_lines
from tests.actors.policy_cases import causal_lm
from tests.aligntune.online.episodes import Play
from tests.aligntune.online.world import STEPS, FakeLearner, World

ALGORITHMS = {
    "grpo": {"name": "grpo"},
    "drgrpo": {"name": "drgrpo"},
    "dapo": {"name": "dapo", "overlong_shaping": False},
    "gspo": {"name": "gspo"},
    "ppo": {"name": "tests.e2e.algorithms:PPOOnFunctions"},
}


class Frozen:
    """A reference actor, whose model is a little off what the rollouts were."""

    async def start(self) -> dict[str, Any]:
        """It is ready."""
        return {}

    async def logprobs(self, tensors: GroupTensors, temperature: float) -> tuple[int, np.ndarray]:
        """See `ReferenceActor`."""
        drift = np.linspace(-0.1, 0.1, len(tensors.logprobs), dtype=np.float32)
        return len(drift), tensors.logprobs + drift


class Learns(FakeLearner):
    """One rank of the policy and one of the critic, in this process."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        config = self._config = world.config
        self.policy = PolicyActor(config.model, config.policy, 0, 1, STEPS, 0)
        self.critic = CriticActor(config.model, config.critic, 0, 1, STEPS, 0)
        self.worth: list[float] = []  # of turns, in each group that was prepared

    async def start(self) -> list[tuple[str, dict[str, Any]]]:
        """Load."""
        self.policy.start("", 0)
        self.before = {n: p.detach().clone() for n, p in self.parameters()}
        if self._config.algorithm.needs.critic:
            self.critic.start("", 0)
        return await super().start()

    def parameters(self) -> Any:
        """Of the policy, by name."""
        return self.policy._strategy.model.model.named_parameters()

    async def prepare(
        self, step: int, algorithm: Algorithm, works: Sequence[GroupWork]
    ) -> tuple[list[GroupWork], dict[str, float]]:
        """As `Learner.prepare`."""
        works = [fetched(work) for work in works]
        _, *values = self.critic.values([work.tensors for work in works])
        works = [replace(w, values=v) for w, v in zip(works, values, strict=True)]
        self.worth += [float(w.turn_weight * w.tensors.rewards.sum()) for w in works]
        job = PrepareJob(step, tuple(works), algorithm.prepare, True, 1.0)
        figures, *targets = self.policy.prepare(job)
        made = [replace(w, targets=t, values=None) for w, t in zip(works, targets, strict=True)]
        return made, figures

    async def update(
        self, step: int, algorithm: Algorithm, works: Sequence[GroupWork]
    ) -> UpdateResult:
        """As `Learner.update`."""
        await super().update(step, algorithm, works)
        metrics: dict[str, float] = {}
        plans = plan_step(self._config, step, algorithm, [fetched(work) for work in works])
        for name, (job,) in plans.items():
            rank = self.policy if name == POLICY else self.critic
            metrics |= rank.update(job).metrics
        return UpdateResult(metrics, 0.1)


def fetched(work: GroupWork) -> GroupWork:
    """With its arrays, as a rank finds them."""

    def value(given: Any) -> Any:
        return given.value() if hasattr(given, "value") else given

    return replace(work, tensors=value(work.tensors), reference=value(work.reference))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    causal_lm(vocab_size=96).save_pretrained(folder)  # of all that the toys say
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_trains_on_episodes(
    play: Callable[..., Play], folder: Path, name: str
) -> None:
    # PPO discounts by its own gamma.
    own = {"episodes": {"replicas": 2, "max_tokens": 64}} if name == "ppo" else {}
    made = play(
        algorithm=ALGORITHMS[name],
        **own,
        model={"name": str(folder)},
        policy={"learning_rate": 1e-3},
    )
    made.company._make["reference"] = lambda _: Frozen()
    learners: list[Learns] = []
    made.world.learner = lambda world: learners.append(Learns(world)) or learners[-1]
    made.run()
    rows = read_lines(made.world.folder / "metrics.jsonl")
    assert len(rows) == STEPS
    (learner,) = learners
    for row in rows:
        assert math.isfinite(row["loss/total"])
        assert row["policy/grad_norm"] > 0
        assert row["turns/max"] == 2
        assert 0 < row["tokens/environment_fraction"] < 1
        assert ("kl/reference" in row) == learner._config.algorithm.needs.reference
    assert any(not torch.equal(learner.before[n], p) for n, p in learner.parameters())
    if name == "ppo":
        assert all(row["critic/grad_norm"] > 0 for row in rows)
        assert learner.worth == [1.0 + 1.0 + 2.0] * 2 * STEPS, "turns 1, and 1 and 2"
