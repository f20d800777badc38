"""The policy's side of a step: its ranks, their update, the weights they export, their checkpoints.

Invariant: a policy rank that dies takes the whole set with it (`PolicyLost`); nothing is retried on
ranks that may be half-way through an update. The controller decides what to go back to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors.messages import GroupWork, LossTerms, Row, TokenBatch, UpdateJob, UpdateResult
from actors.packing import split_rows
from actors.supervise import RankSet, ReplicaLost, answer
from aligntune.config import RunConfig


class PolicyLost(RuntimeError):
    """A policy rank died or missed a deadline; the set must be rebuilt from a checkpoint."""


@dataclass(frozen=True)
class Weights:
    """One policy version's weights: a reference to the only copy the driver owns."""

    version: int
    bundle: Any
    nbytes: int


def plan_jobs(
    config: RunConfig,
    loss: Callable[[TokenBatch], LossTerms],
    step: int,
    groups: Sequence[GroupWork],
) -> list[UpdateJob]:
    """One job a rank: mini-batches of whole groups, each split over the ranks by tokens. Pure."""
    train, ranks = config.train, config.policy.ranks
    per_minibatch = train.groups_per_minibatch or train.groups_per_step
    shares: list[list[tuple[Row, ...]]] = [[] for _ in range(ranks)]
    for _ in range(train.epochs_per_batch or 1):
        for start in range(0, len(groups), per_minibatch):
            rows = [
                Row(index, completion, groups[index].prompt_tokens + length)
                for index in range(start, start + per_minibatch)
                for completion, length in enumerate(groups[index].lengths)
            ]
            for rank, share in enumerate(split_rows(rows, ranks)):
                shares[rank].append(tuple(share))
    return [
        UpdateJob(
            step=step,
            groups=tuple(groups),
            minibatches=tuple(share),
            loss=loss,
            recompute_old=len(share) > 1,
            temperature=config.rollout.temperature,
            budget=config.rollout.max_completion_length,
        )
        for share in shares
    ]


class Learner:
    """The set of policy ranks; `make(rank)` creates one."""

    def __init__(self, config: RunConfig, make: Callable[[int], ActorHandle]) -> None:
        self._config = config
        self._make = make
        self._ranks: RankSet | None = None

    @property
    def _set(self) -> RankSet:
        if self._ranks is None:
            raise PolicyLost("the policy ranks are not running")
        return self._ranks

    async def start(self) -> list[dict[str, Any]]:
        """Start the ranks and let them find each other; returns what each says of itself."""
        spec = self._config.policy
        ranks = RankSet("policy", [self._make(rank) for rank in range(spec.ranks)])
        self._ranks = ranks
        address = (await self._each("address", spec.start_timeout_s))[0]
        return await self._each("start", spec.start_timeout_s, *address)

    async def _each(self, method: str, deadline_s: float, *args: Any) -> list[Any]:
        try:
            return await self._set.all(method, *args, deadline_s=deadline_s)
        except ReplicaLost as lost:
            raise PolicyLost(str(lost)) from lost

    async def update(self, jobs: Sequence[UpdateJob]) -> UpdateResult:
        """Run one step's update on all ranks."""
        try:
            results = await self._set.each(
                "update", [(job,) for job in jobs], self._config.policy.update_timeout_s
            )
        except ReplicaLost as lost:
            raise PolicyLost(str(lost)) from lost
        return results[0]

    async def export(self, version: int) -> Weights:
        """The weights of `version` in the object store; the driver owns the one object."""
        ranks, deadline = self._set, self._config.policy.update_timeout_s
        others = [
            ranks.start_call(rank, "export_weights", version, returns=2)[0]
            for rank in range(1, ranks.size)
        ]
        size, bundle = ranks.start_call(0, "export_weights", version, returns=2)
        try:
            nbytes = await answer(size, "policy-0", "export_weights", deadline)
            for rank, ref in enumerate(others, start=1):
                await answer(ref, f"policy-{rank}", "export_weights", deadline)
        except ReplicaLost as lost:
            raise PolicyLost(str(lost)) from lost
        return Weights(version, bundle, nbytes)

    async def save(self, directory: Path) -> None:
        """Write every rank's part of a checkpoint."""
        await self._each("save", self._config.policy.update_timeout_s, str(directory))

    async def load(self, directory: Path) -> None:
        """Take a checkpoint's state."""
        await self._each("load", self._config.policy.update_timeout_s, str(directory))

    async def save_model(self, directory: Path) -> None:
        """Export for use: safetensors, tokenizer, generation config."""
        await self._each("save_model", self._config.policy.update_timeout_s, str(directory))

    def kill(self) -> None:
        """Stop every rank at once."""
        if self._ranks is not None:
            self._ranks.kill()
            self._ranks = None
