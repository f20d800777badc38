"""The actors of a run: how one of each role is made in its reserved place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.critic import CriticActor
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.reward import Criterion, RewardActor
from actors.rollout import RolloutActor
from actors.unsloth_policy import UnslothPolicyActor
from aligntune.config.online import RunConfig
from aligntune.paths import located, located_model
from cluster.reservation import Reservation

SPARE_CALLS = 8  # pings, weight updates and statistics beside the groups in flight


class Roles:
    """Makes the run's actors in their reserved places. Ray restarts none of them by itself: a
    replacement must be brought up to date before it serves, which is the supervisor's work."""

    def __init__(
        self,
        config: RunConfig,
        reservation: Reservation,
        criteria: Sequence[Criterion],
        total_steps: int,
    ) -> None:
        self._config = _located(config)
        self._reservation = reservation
        self._criteria = tuple(criteria)
        self._total_steps = total_steps

    def _create(
        self, cls: type, role: str, index: int, concurrency: int | None, *args: Any
    ) -> ActorHandle:
        options = self._reservation.options(role, index)
        threads = getattr(self._config, role).resources.threads
        if threads is not None:  # else Ray sets it to the CPUs that are reserved
            options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
        if concurrency is not None:
            options["max_concurrency"] = concurrency
        return ray.remote(cls).options(max_restarts=0, **options).remote(*args)

    def rollout(self, index: int, name: str) -> ActorHandle:
        """A rollout replica; its model is the run's starting model, version 0."""
        spec, train = self._config.rollout, self._config.train
        return self._create(
            RolloutActor,
            "rollout",
            index,
            spec.max_concurrent_groups + SPARE_CALLS,
            self._config.model,
            spec,
            name,
            0,
            max(train.completions_per_group or 1, self._config.eval.completions),
            train.seed,
        )

    def room_for_rollout(self, index: int) -> bool:
        """Whether the cluster has a place for rollout replica `index`, beyond those reserved."""
        return self._reservation.room("rollout", index)

    def reward(self, index: int, name: str) -> ActorHandle:
        """A reward replica."""
        return self._create(
            RewardActor,
            "reward",
            index,
            self._config.reward.max_concurrent_groups + SPARE_CALLS,
            self._criteria,
            self._config.model,
            os.path.join(os.path.abspath(self._config.output_dir), "logs", "reward.log"),
        )

    def reference(self, index: int, name: str) -> ActorHandle:
        """A reference replica; the policy's starting model unless the config names another."""
        config = self._config
        model = config.model.model_copy(
            update={"lora": None, "name": config.reference.model or config.model.name}
        )
        policy = config.policy
        return self._create(
            ReferenceActor,
            "reference",
            index,
            None,
            model,
            policy.tokens_per_microbatch,
            policy.tokens_per_chunk,
        )

    def policy(self, rank: int) -> ActorHandle:
        """One policy rank."""
        config = self._config
        return self._create(
            UnslothPolicyActor if config.backend == "unsloth" else PolicyActor,
            "policy",
            rank,
            None,
            config.model,
            config.policy,
            rank,
            config.policy.ranks,
            self._total_steps,
            config.train.seed,
            *([config.rollout.max_length] if config.backend == "unsloth" else []),
        )

    def critic(self, rank: int) -> ActorHandle:
        """One critic rank."""
        config = self._config
        return self._create(
            CriticActor,
            "critic",
            rank,
            None,
            config.model,
            config.critic,
            rank,
            config.critic.ranks,
            self._total_steps,
            config.train.seed,
        )


def _located(config: RunConfig) -> RunConfig:
    """The config with every model that is a local folder named by its absolute path."""
    changed: dict[str, Any] = {"model": located_model(config.model)}
    for role in ("reference", "critic"):
        spec = getattr(config, role)
        if spec.model is not None:
            changed[role] = spec.model_copy(update={"model": located(spec.model)})
    return config.model_copy(update=changed)
