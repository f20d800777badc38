"""The roles of an online run: what each one is, said once.

A role has a section of the config, asks the cluster for places, and is made in them. Replicas serve
calls and are replaced one by one; ranks are called together and lost together. Light: actors are
named, not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.specs import ModelSpec, RoleResources
from aligntune.config.online import RunConfig
from aligntune.errors import UserError


@dataclass(frozen=True)
class Start:
    """What there is to make one replica or rank of a role with; models are located."""

    config: RunConfig
    index: int  # of the replica or rank
    name: str  # for records and logs
    total_steps: int
    criteria: Sequence[Any]  # the rewards, as reward actors take them


@dataclass(frozen=True)
class Role:
    """What a role is."""

    name: str  # of its section too
    actor: Callable[[RunConfig], str]  # module:Class
    arguments: Callable[[Start], tuple[Any, ...]]  # of the class
    ranks: bool = False
    needed: Callable[[RunConfig], bool] = lambda config: True
    resources: Callable[[RunConfig], RoleResources] | None = None  # default: those of its section
    slots: Callable[[RunConfig], int] = lambda config: 1  # calls given to a replica at a time
    concurrent: bool = False  # whether it works on all of them at once
    models: tuple[str, ...] = ()  # keys of its section that name a model

    def section(self, config: RunConfig) -> Any:
        """Its settings."""
        return getattr(config, self.name)

    def size(self, config: RunConfig) -> int:
        """How many replicas or ranks it has."""
        section = self.section(config)
        return int(section.ranks if self.ranks else section.replicas)

    def takes(self, config: RunConfig) -> RoleResources:
        """What one replica or rank takes. Raises UserError where its settings contradict."""
        return self.resources(config) if self.resources else self.section(config).resources


def _of_all_shards(config: RunConfig) -> RoleResources:
    """The resources of one rollout replica: on GPUs, one for each tensor-parallel shard."""
    spec = config.rollout
    resources, shards = spec.resources, spec.engine.shards
    if shards == 1 or resources.gpus == 0:
        return resources
    if resources.gpus not in (1, shards):
        raise UserError(
            f"rollout.resources.gpus={resources.gpus:g} with rollout.engine.tensor_parallel_size="
            f"{shards}: each shard has one GPU, so write 1 (each) or {shards} (of the replica)"
        )
    return resources.model_copy(update={"gpus": float(shards)})


def _rollout(start: Start) -> tuple[Any, ...]:
    """Its model is the run's starting model, version 0."""
    config = start.config
    completions = max(config.train.completions_per_group or 1, config.eval.completions)
    return (config.model, config.rollout, start.name, 0, completions, config.train.seed)


def _reward(start: Start) -> tuple[Any, ...]:
    """What user code prints goes to a log of the run."""
    log = os.path.join(os.path.abspath(start.config.output_dir), "logs", "reward.log")
    return (tuple(start.criteria), start.config.model, log)


def _reference_model(config: RunConfig) -> ModelSpec:
    """The policy's starting model, unless the config names another."""
    name = config.reference.model or config.model.name
    return config.model.model_copy(update={"lora": None, "name": name})


def _reference(start: Start) -> tuple[Any, ...]:
    policy = start.config.policy
    model = _reference_model(start.config)
    return (model, policy.tokens_per_microbatch, policy.tokens_per_chunk)


def _policy_actor(config: RunConfig) -> str:
    if config.backend == "unsloth":
        return "actors.unsloth_policy:UnslothPolicyActor"
    return "actors.policy:PolicyActor"


def _rank(start: Start, role: str) -> tuple[Any, ...]:
    config, spec = start.config, getattr(start.config, role)
    return (config.model, spec, start.index, spec.ranks, start.total_steps, config.train.seed)


def _policy(start: Start) -> tuple[Any, ...]:
    unsloth = start.config.backend == "unsloth"
    return _rank(start, "policy") + ((start.config.rollout.max_length,) if unsloth else ())


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("policy", _policy_actor, _policy, ranks=True),
        Role(
            "rollout",
            lambda config: "actors.rollout:RolloutActor",
            _rollout,
            resources=_of_all_shards,
            slots=lambda config: config.rollout.max_concurrent_groups,
            concurrent=True,
        ),
        Role(
            "reward",
            lambda config: "actors.reward:RewardActor",
            _reward,
            slots=lambda config: config.reward.max_concurrent_groups,
            concurrent=True,
        ),
        Role(
            "reference",
            lambda config: "actors.reference:ReferenceActor",
            _reference,
            needed=lambda config: config.algorithm.needs.reference,
            slots=lambda config: 2,  # the next group is there when one is done
            models=("model",),
        ),
        Role(
            "critic",
            lambda config: "actors.critic:CriticActor",
            lambda start: _rank(start, "critic"),
            ranks=True,
            needed=lambda config: config.algorithm.needs.critic,
            models=("model",),
        ),
    )
}
"""By name, in the order in which places are asked for."""


def roles_of(config: RunConfig) -> list[Role]:
    """The roles that a run has."""
    return [role for role in ROLES.values() if role.needed(config)]
