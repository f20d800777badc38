"""RunConfig: the one typed tree of a run, composed of the specs that live beside each part.

A tree comes from YAML or keyword arguments plus `key.path=value` overrides; unknown keys are
refused with the nearest valid one. `resolve` fills in the algorithm's defaults and refuses what
does not fit together, so that a resolved tree says everything a run will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
)

from actors.environments.specs import EpisodesSpec
from actors.settings import OneKind
from actors.specs import (
    REWARD_KINDS,
    CriticSpec,
    ModelSpec,
    PolicySpec,
    Positive,
    ReferenceSpec,
    RewardActorSpec,
    RewardFunctionSpec,
    RewardModelSpec,
    RewardUrlSpec,
    RolloutSpec,
    Spec,
)
from actors.strategies.specs import STRATEGIES
from aligntune.algorithms import registry
from aligntune.algorithms.base import Algorithm
from aligntune.config.backends import check_backend, check_shared_prompts, check_weight_sync
from aligntune.config.episodes import AgentField, check_episodes
from aligntune.config.ignored import check_held_out, check_length, check_online_keys, is_set
from aligntune.config.records import EvalSpec, HubSpec, OnlineCheckpointSpec, OnlineTrackingSpec
from aligntune.config.tree import explain
from aligntune.data.spec import DataSpec
from aligntune.errors import UserError, nearest
from cluster.specs import ClusterSpec


def _parse_algorithm(value: Any) -> Any:
    """'grpo', {'name': 'grpo', 'beta': 0.04} or an Algorithm become an Algorithm."""
    if isinstance(value, Algorithm):
        return value
    if not isinstance(value, str | Mapping):
        raise ValueError(f"algorithm is a name, or a section with a name, not {value!r}")
    options = {"name": value} if isinstance(value, str) else dict(value)
    if "name" not in options:
        raise ValueError(f"algorithm needs a name; {nearest('', registry.names())}")
    return registry.get(str(options.pop("name"))).model_validate(options)


def name_of(algorithm: type[Algorithm]) -> str:
    """The name an algorithm is registered under, or its `module:Class` path."""
    if (ours := registry.name_of_ours(algorithm)) is not None:
        return ours
    for name in registry.names():
        if registry.get(name) is algorithm:
            return name
    return f"{algorithm.__module__}:{algorithm.__qualname__}"


def _dump_algorithm(value: Algorithm) -> dict[str, Any]:
    return {"name": name_of(type(value)), **value.model_dump(mode="json")}


AlgorithmField = Annotated[
    Algorithm, BeforeValidator(_parse_algorithm), PlainSerializer(_dump_algorithm)
]
RewardField = Annotated[RewardFunctionSpec | RewardModelSpec | RewardUrlSpec, OneKind(REWARD_KINDS)]


class TrainSpec(Spec):
    """How much is trained and in which units."""

    steps: Positive | None = Field(
        None, description="of the run, each with groups_per_step prompts; or give epochs"
    )
    epochs: float | None = Field(None, gt=0, description="passes over the prompts; default 1")
    groups_per_step: Positive = Field(32, description="prompts of a step")
    completions_per_group: Positive | None = Field(None, description="G; default: the algorithm's")
    groups_per_minibatch: Positive | None = Field(None, description="per optimiser step")
    epochs_per_batch: Positive | None = Field(None, description="default: the algorithm's")
    max_staleness: int = Field(0, ge=0, description="policy versions; 0 is on-policy")
    seed: int = Field(
        0,
        ge=0,
        description="of data order, sampling and LoRA; completions repeat bit for bit with the "
        "transformers engine alone",
    )
    max_quarantined_fraction: float = Field(
        0.1, ge=0, le=1, description="of the admitted groups; beyond it the run stops"
    )
    silence_timeout_s: float = Field(
        45.0,
        gt=0,
        description="longest time without a sign of life of a process, busy or idle; then it is "
        "replaced",
    )
    step_timeout_s: float = Field(3600.0, gt=0, description="longest wait for a step's groups")
    stall_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="longest time in which nothing moves, in no role; then what every process is "
        "at is written to logs/, and the run ends. What starts, is loaded, written or exported has "
        "a limit of its own and counts as movement",
    )
    time_limit_s: float | None = Field(
        None,
        gt=0,
        description="of one process of the run, from when it is called, Ray's start included: "
        "then it stops as SIGTERM stops it, with a checkpoint and exit code 143; default: none",
    )


class RunConfig(Spec):
    """Everything a run will do."""

    algorithm: AlgorithmField
    model: ModelSpec
    data: DataSpec
    output_dir: str = Field(description="the run directory")
    backend: Literal["trl", "unsloth"] = Field(
        "trl", description="what loads and steps the trained model"
    )
    rewards: list[RewardField] = []
    tools: list[str] = Field(
        [], description="functions that the policy may call, each as package.module:function"
    )
    environment: str | dict[str, str] | None = Field(
        None,
        description="package.module:Class, or several by name, of which a row's `environment` "
        "column says one",
    )
    agent: AgentField = Field(
        None,
        description="package.module:function, or {command: [program, ...]}, that plays the "
        "episodes; in place of tools and environment",
    )
    episodes: EpisodesSpec = EpisodesSpec()
    train: TrainSpec = TrainSpec()
    rollout: RolloutSpec = RolloutSpec()
    reward: RewardActorSpec = RewardActorSpec()
    reference: ReferenceSpec = ReferenceSpec()
    policy: PolicySpec = PolicySpec()
    critic: CriticSpec = CriticSpec()
    eval: EvalSpec = EvalSpec()
    checkpoint: OnlineCheckpointSpec = OnlineCheckpointSpec()
    tracking: OnlineTrackingSpec = OnlineTrackingSpec()
    hub: HubSpec = HubSpec()
    cluster: ClusterSpec = ClusterSpec()

    @property
    def algorithm_name(self) -> str:
        """The registered name of the algorithm."""
        return name_of(type(self.algorithm))

    @property
    def plays(self) -> bool:
        """Whether rollouts are episodes, with tools, an environment or an agent."""
        return bool(self.tools or self.environment is not None or self.agent is not None)

    @property
    def longest_row(self) -> int:
        """Tokens that a row may have. Raises ValueError where that is not settled yet."""
        if self.plays and self.episodes.max_tokens is not None:
            return self.episodes.max_tokens
        return self.rollout.max_length


def load_online_config(tree: Mapping[str, Any]) -> RunConfig:
    """The resolved config of an online run. Raises UserError, one line, for anything wrong."""
    return resolve(validate(tree))


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from a mapping; UserError names the first wrong key and its cure."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, tree, RunConfig, _algorithm_options)) from error


def _algorithm_options(name: str) -> Iterable[str]:
    return registry.get(name).model_fields


def resolve(config: RunConfig) -> RunConfig:
    """Fill the algorithm's defaults in and refuse what does not fit together (UserError)."""
    algorithm, train = config.algorithm, config.train
    policy, critic = config.policy, config.critic
    defaults = algorithm.defaults
    group = train.completions_per_group or defaults.completions_per_group
    if train.groups_per_minibatch is not None:
        minibatch = train.groups_per_minibatch
    elif train.groups_per_step % defaults.minibatches == 0:
        minibatch = train.groups_per_step // defaults.minibatches
    else:
        raise UserError(
            f"train.groups_per_step={train.groups_per_step} does not split into "
            f"{config.algorithm_name}'s {defaults.minibatches} mini-batches; "
            "set train.groups_per_minibatch to a divisor of it"
        )
    filled = {
        "train": train.model_copy(
            update={
                "epochs": train.epochs if train.epochs or train.steps else 1.0,
                "completions_per_group": group,
                "groups_per_minibatch": minibatch,
                "epochs_per_batch": train.epochs_per_batch or defaults.epochs,
            }
        ),
        "policy": policy.model_copy(
            update={
                "learning_rate": policy.learning_rate or defaults.learning_rate,
                "adam_betas": policy.adam_betas or defaults.adam_betas,
            }
        ),
    }
    if algorithm.needs.critic:
        filled["critic"] = critic.model_copy(
            update={
                "learning_rate": critic.learning_rate or defaults.critic_learning_rate,
                "adam_betas": critic.adam_betas or defaults.adam_betas,
            }
        )
    resolved = config.model_copy(update=filled)
    check(resolved)
    return resolved


def _check_waits(config: RunConfig) -> None:
    """Refuse a call that was given more time than a run in which nothing moves has (UserError)."""
    of_episodes = "episode_timeout_s" if config.agent is not None else "call_timeout_s"
    calls: list[tuple[str, Spec, str]] = [
        *((f"rewards.{index}", reward, "timeout_s") for index, reward in enumerate(config.rewards)),
        ("episodes", config.episodes, of_episodes),
    ]
    limit = config.train.stall_timeout_s
    for section, spec, key in calls:
        seconds = getattr(spec, key)
        if seconds >= limit and is_set(spec, key):
            raise UserError(
                f"{section}.{key}={seconds:g} lets one call take as long as "
                f"train.stall_timeout_s={limit:g}, which ends a run in which nothing moves; raise "
                f"train.stall_timeout_s above it, or lower {section}.{key}"
            )


def _check_groups(config: RunConfig) -> None:
    name, needs, train = config.algorithm_name, config.algorithm.needs, config.train
    group = train.completions_per_group or 0
    if group < needs.min_group:
        raise UserError(
            f"{name} compares the completions of a group: train.completions_per_group={group} "
            f"gives no signal, use {needs.min_group} or more"
        )
    if train.groups_per_step % (train.groups_per_minibatch or 1):
        raise UserError(
            f"train.groups_per_minibatch={train.groups_per_minibatch} does not divide "
            f"train.groups_per_step={train.groups_per_step}"
        )


def _check_growth(rollout: RolloutSpec, cluster: ClusterSpec) -> None:
    most = rollout.max_replicas
    if most is None:
        return
    if most < rollout.replicas:
        raise UserError(
            f"rollout.max_replicas={most} is less than rollout.replicas={rollout.replicas}, which "
            "the run starts with; raise it or leave it out"
        )
    if any("rollout" in group for group in cluster.colocate):
        raise UserError(
            "rollout.max_replicas adds replicas in places of their own, and cluster.colocate "
            "gives rollout none; drop one of the two"
        )


def _check_roles(config: RunConfig) -> None:
    """Whether critic and reference are those that the algorithm has."""
    name, needs = config.algorithm_name, config.algorithm.needs
    if needs.critic and config.critic.learning_rate is None:
        raise UserError(
            f"{name} has a critic and no default for its rate; set critic.learning_rate"
        )
    if not needs.critic and config.critic != CriticSpec():
        raise UserError(
            f"{name} has no critic, so the critic section would be ignored; remove it "
            "(critic=null takes it out)"
        )
    if not needs.reference and config.reference != ReferenceSpec():
        raise UserError(
            f"{name} has no reference model while algorithm.beta is 0, so the reference section "
            "would be ignored; remove it (reference=null takes it out) or raise algorithm.beta"
        )


def _check_ranks(config: RunConfig) -> None:
    for spec in (config.policy, config.critic):
        if spec.ranks > 1 and not spec.strategy.several and "strategy" in spec.model_fields_set:
            several = " or ".join(name for name, kind in STRATEGIES.items() if kind.several)
            raise UserError(
                f"{spec.role}.strategy={spec.strategy.name} is one rank and {spec.role}.ranks="
                f"{spec.ranks}; use {spec.role}.strategy={several} for several"
            )


def check(config: RunConfig) -> None:
    """Refuse a resolved tree that cannot be run, before anything starts (UserError)."""
    name, needs, train = config.algorithm_name, config.algorithm.needs, config.train
    check_length(train.steps, train.epochs)
    _check_groups(config)
    check_episodes(config)
    _check_waits(config)
    scored = any(isinstance(r, RewardModelSpec) for r in config.rewards)
    if needs.reward_model and not scored and not config.plays:
        raise UserError(
            f"{name} needs a reward model and rewards names none; add {{model: FOLDER_OR_HUB_NAME}}"
            " to rewards, or give --reward-model (algorithm: reward_model trains one from pairs)"
        )
    if config.backend not in config.algorithm.backends:
        raise UserError(
            f"{name} does not run with backend={config.backend}; "
            f"use backend={config.algorithm.backends[0]}"
        )
    policy = config.policy
    check_backend(
        config.backend,
        config.model,
        policy.resources,
        "policy",
        f"policy.strategy={policy.strategy.name}" if policy.strategy.several else None,
    )
    check_shared_prompts(config.backend, policy)
    rollout = config.rollout
    check_weight_sync(config.backend, config.model, policy, rollout, config.cluster)
    _check_growth(rollout, config.cluster)
    check_held_out(config.eval != EvalSpec(), config.data.evaluates)
    if config.checkpoint.best is not None and config.eval.every_steps is None:
        raise UserError(
            "checkpoint.best compares the evaluations of a run, and there are none between its "
            "ends; set eval.every_steps, or remove it"
        )
    _check_roles(config)
    stop = config.algorithm.early_stop
    if stop and train.epochs_per_batch == 1 and train.groups_per_minibatch == train.groups_per_step:
        raise UserError(
            f"{name} is to stop a step's updates where {stop[0]} is above {stop[1]:g}, and a step "
            "has one update, so that would do nothing; raise train.epochs_per_batch, lower "
            "train.groups_per_minibatch, or remove the limit"
        )
    _check_ranks(config)
    check_online_keys(config)
