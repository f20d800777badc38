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

from actors.engines.base import resolve_engine
from actors.environments.base import EpisodeLimits
from actors.environments.specs import EpisodeCode
from actors.scoring.criteria import EpisodeCriterion
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
    code: EpisodeCode | None = None  # the user's tools, environments or agent


@dataclass(frozen=True)
class Role:
    """What a role is."""

    name: str
    actor: Callable[[RunConfig], str]  # module:Class
    arguments: Callable[[Start], tuple[Any, ...]]  # of the class
    ranks: bool = False
    needed: Callable[[RunConfig], bool] = lambda config: True
    resources: Callable[[RunConfig], RoleResources] | None = None  # default: those of its section
    # Groups given to a replica at a time: so many slots it has.
    max_concurrent_groups: Callable[[RunConfig], int] = lambda config: 1
    concurrent: bool = False  # whether it works on all of them at once
    calls: Callable[[RunConfig], int] = lambda config: 1  # at a time, of a group
    leave_s: float = 0.0  # for a replica to `close` by itself at the end; 0: it has nothing to
    key: str = ""  # of its section; default: its name
    models: tuple[str, ...] = ()  # keys of its section that name a model

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.name)

    def section(self, config: RunConfig) -> Any:
        """Its settings."""
        return getattr(config, self.key)

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
    """Its model is the run's starting model, version 0. What it may see is as long as a row."""
    config = start.config
    spec = config.rollout
    if config.plays:
        before = config.longest_row - spec.max_completion_length
        spec = spec.model_copy(update={"max_prompt_length": before})
    return (config.model, spec, start.name, 0, completions_of(config), config.train.seed)


def completions_of(config: RunConfig) -> int:
    """Rollouts that a group has, at most."""
    return max(config.train.completions_per_group or 1, config.eval.completions)


def _log(start: Start) -> str:
    """What user code prints goes to a log of the run."""
    return os.path.join(os.path.abspath(start.config.output_dir), "logs", "reward.log")


def _reward(start: Start) -> tuple[Any, ...]:
    """All criteria but those that are said where the episodes are played."""
    criteria = tuple(c for c in start.criteria if not isinstance(c, EpisodeCriterion))
    reward = start.config.reward
    told = (reward.max_concurrent_groups, reward.sandbox)
    return (criteria, start.config.model, _log(start), *told)


def _environment(start: Start) -> tuple[Any, ...]:
    config = start.config
    return (
        config.model,
        config.episodes,
        start.code,
        limits_of(config),
        start.name,
        config.rollout.generation_timeout_s,
        resolve_engine(config.rollout).name == "transformers",
        _log(start),
    )


def limits_of(config: RunConfig) -> EpisodeLimits:
    """What bounds one episode."""
    episodes = config.episodes
    return EpisodeLimits(
        max_turns=episodes.max_turns,
        max_tool_calls=episodes.max_tool_calls,
        max_sampled_tokens=config.rollout.max_completion_length,
        max_tokens=config.longest_row,
        call_timeout_s=episodes.call_timeout_s,
        episode_timeout_s=episodes.episode_timeout_s,
        max_output_characters=episodes.max_output_characters,
        memory_gib=episodes.memory_gib,
    )


def _reference_model(config: RunConfig) -> ModelSpec:
    """The policy's starting model, unless the config names another."""
    named = config.model.renamed(config.reference.model or config.model.name)
    return named.model_copy(update={"lora": None})


def _reference(start: Start) -> tuple[Any, ...]:
    policy = start.config.policy
    model = _reference_model(start.config)
    return (
        model,
        policy.tokens_per_microbatch,
        policy.tokens_per_chunk,
        policy.shared_prompts,
    )


def _policy_actor(config: RunConfig) -> str:
    if config.backend == "unsloth":
        return "actors.unsloth_policy:UnslothPolicyActor"
    return "actors.policy:PolicyActor"


def _rank(start: Start, role: str) -> tuple[Any, ...]:
    config, spec = start.config, getattr(start.config, role)
    return (config.model, spec, start.index, spec.ranks, start.total_steps, config.train.seed)


def _policy(start: Start) -> tuple[Any, ...]:
    unsloth = start.config.backend == "unsloth"
    return _rank(start, "policy") + ((start.config.longest_row,) if unsloth else ())


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("policy", _policy_actor, _policy, ranks=True),
        Role(
            "rollout",
            lambda config: "actors.rollout:RolloutActor",
            _rollout,
            resources=_of_all_shards,
            max_concurrent_groups=lambda config: config.rollout.max_concurrent_groups,
            concurrent=True,
            calls=lambda config: completions_of(config) if config.plays else 1,
        ),
        Role(
            "environment",
            lambda config: "actors.environment:EnvironmentActor",
            _environment,
            needed=lambda config: config.plays,
            max_concurrent_groups=lambda config: config.episodes.max_concurrent_groups,
            concurrent=True,
            leave_s=30.0,  # its environments have 10 of them, see `LEAVE_SECONDS`
            key="episodes",
        ),
        Role(
            "reward",
            lambda config: "actors.reward:RewardActor",
            _reward,
            max_concurrent_groups=lambda config: config.reward.max_concurrent_groups,
            concurrent=True,
        ),
        Role(
            "reference",
            lambda config: "actors.reference:ReferenceActor",
            _reference,
            needed=lambda config: config.algorithm.needs.reference,
            max_concurrent_groups=lambda config: 2,  # the next group is there when one is done
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
