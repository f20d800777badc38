"""A resolved config as what the plan has to know of it: sizes and numbers, no place yet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from actors.engines.base import resolve_engine, vllm_is_installed
from actors.engines.specs import VLLMSpec
from actors.specs import CriticSpec, PolicySpec, RewardModelSpec, rows_at_once
from actors.strategies.specs import StrategySpec
from actors.transfer.nccl import PACKING
from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.role_requests import role_requests
from aligntune.online.role_table import ROLES
from aligntune.shapes import adapts_experts, known_shape
from cluster.plan.shapes import ModelShape
from cluster.plan.work import Frozen, Kept, Other, Rollout, Step, Trained, Work, microbatch

PROMPT_TOKENS = 512  # where rollout.max_prompt_length is open: a plan reads no data
REWARD_TEXT_TOKENS = 512  # of a text, where neither its limit nor the rollouts' is longer


def work_of(config: RunConfig, shape_of: Callable[[str], ModelShape] | None = None) -> Work:
    """What the plan has to know of a resolved config.

    `shape_of` gives the sizes of a model by its name; `known_shape` unless said.

    Raises:
        UnknownName: a model that is no local folder and not in the table.
        BadModelConfig: a folder whose config.json does not say how large the model is.
        UserError: see `role_requests`; a `tensor_parallel_size` with which vLLM does not start.
    """
    step = _step(config)
    of = shape_of or known_shape
    shape = of(config.model.name)
    dtype_bytes = _bytes(config.model.dtype)
    needs = config.algorithm.needs
    frozen = []
    if needs.reference:
        of_reference = of(config.reference.model or config.model.name)
        frozen.append(
            Frozen(
                "reference",
                of_reference,
                config.reference.replicas,
                dtype_bytes,
                microbatch(config.policy.tokens_per_microbatch, step.completions, step.row),
                _head_rows(config, of_reference),
                longest=step.row,
                scores=of_reference.keeps_scores(config.model.attention),
            )
        )
    for index, reward in enumerate(config.rewards):
        if isinstance(reward, RewardModelSpec):
            text = reward.max_tokens or max(step.row, REWARD_TEXT_TOKENS)
            tokens = min(reward.batch_size, step.completions) * text
            of_reward = of(reward.model)
            frozen.append(
                Frozen(
                    "reward",
                    of_reward,
                    config.reward.replicas,
                    _bytes(reward.dtype),
                    tokens,
                    section=f"rewards.{index}",
                    longest=text,
                    scores=of_reward.caps,
                )
            )
    return Work(
        step=step,
        policy=_trained(config, config.policy, shape, step),
        critic=_trained(config, config.critic, of(config.critic.model or config.model.name), step)
        if needs.critic
        else None,
        rollout=_rollout(config, shape, dtype_bytes),
        requests=tuple(role_requests(config)),
        frozen=tuple(frozen),
        colocate=config.cluster.colocate,
        threads=_threads(config),
    )


def _threads(config: RunConfig) -> dict[str, int]:
    threads = {role.name: role.section(config).resources.threads for role in ROLES.values()}
    return {role: count for role, count in threads.items() if count is not None}


def _step(config: RunConfig) -> Step:
    train, rollout = config.train, config.rollout
    minibatch = train.groups_per_minibatch or train.groups_per_step
    prompt = rollout.max_prompt_length or PROMPT_TOKENS
    return Step(
        groups=train.groups_per_step,
        completions=train.completions_per_group or 1,
        prompt_tokens=prompt,
        completion_tokens=rollout.max_completion_length,
        passes=train.epochs_per_batch or 1,
        updates=train.groups_per_step // minibatch,
        max_staleness=train.max_staleness,
        episode_tokens=_episode_tokens(config, prompt),
        old_passes=_old_passes(config, train.groups_per_step // minibatch),
    )


def _old_passes(config: RunConfig, updates: int) -> float:
    """Forward passes over a batch for the policy's old log-probs, of `updates` in one epoch.

    As the ranks make them: of all that `prepare` needs or an update's dropout would spoil, else of
    all but the first mini-batch, whose update gives its own (`plan_step`, `PolicyActor`).
    """
    algorithm, lora = config.algorithm, config.model.lora
    if algorithm.old == "rollout":
        return 0.0
    noisy = lora is not None and lora.dropout > 0
    alone = updates * (config.train.epochs_per_batch or 1) == 1
    if algorithm.prepares or (noisy and (not alone or algorithm.correction != "none")):
        return 1.0
    return 1 - 1 / updates


def _episode_tokens(config: RunConfig, prompt: int) -> int | None:
    """Of a row with all its turns; None where no episodes are played. Where it is open and no data
    are read, as `settle_data` decides it for a model with positions enough."""
    if not config.plays:
        return None
    return config.episodes.max_tokens or 2 * (prompt + config.rollout.max_completion_length)


def _trained(
    config: RunConfig, spec: PolicySpec | CriticSpec, shape: ModelShape, step: Step
) -> Trained:
    model = config.model
    policy = isinstance(spec, PolicySpec)
    rows = math.ceil(step.sequences / step.updates / spec.ranks)
    return Trained(
        role=spec.role,
        shape=shape,
        ranks=spec.ranks,
        kept=kept_of(spec.strategy),
        dtype_bytes=_bytes(model.dtype),
        tokens=microbatch(spec.tokens_per_microbatch, rows, step.row),
        longest=step.row,
        others=others_of(spec.strategy) if config.backend != "unsloth" or not policy else (),
        several=spec.strategy.several,
        lora_rank=model.lora.r if model.lora and policy else None,
        lora_experts=adapts_experts(model.lora),
        checkpointing=model.gradient_checkpointing,
        head_rows=_head_rows(config, shape) if policy else 0,
        four_bit=model.load_in_4bit and policy,
        scores=shape.keeps_scores(model.attention),
        has_four_bit=config.backend == "unsloth" and policy,
        sends_changes=policy and config.rollout.weight_sync.name == "delta",
        send_buffer=_send_buffer(config) if policy else 0,
        shares_weights=policy and config.rollout.weight_sync.name == "ipc",
        timeout_s=spec.update_timeout_s,
    )


def _send_buffer(config: RunConfig) -> int:
    """Bytes of one of the buffers in which weights go from GPU to GPU; 0 where they do not."""
    return PACKING["packed_buffer_size_bytes"] if config.rollout.weight_sync.name == "nccl" else 0


def _head_rows(config: RunConfig, shape: ModelShape) -> int:
    return config.policy.tokens_per_chunk or rows_at_once(shape.vocabulary, shape.hidden)


def kept_of(strategy: StrategySpec) -> Kept:
    """What ranks keep under `strategy`."""
    return Kept(**vars(strategy.sharding))


def others_of(now: StrategySpec) -> tuple[Other, ...]:
    """What could be set in place of `now`, as the keys below the role that would change."""
    others = []
    for other in now.alternatives():
        changed = other.model_dump(mode="json")
        if other.name == now.name:
            changed = {k: v for k, v in changed.items() if v != getattr(now, k)}
        else:
            defaults = type(other)(name=other.name).model_dump(mode="json")
            changed = {k: v for k, v in changed.items() if k != "name" and v != defaults[k]}
        settings = {f"strategy.{key}": json.dumps(value) for key, value in changed.items()}
        if other.name != now.name:
            settings = {"strategy": other.name, **settings}
        others.append(Other(settings, kept_of(other)))
    return tuple(others)


def _rollout(config: RunConfig, shape: ModelShape, dtype_bytes: int) -> Rollout:
    spec = config.rollout
    engine = spec.engine
    if engine.name == "auto":  # it follows from the GPUs, where these are known
        open_ = "gpus" not in spec.resources.model_fields_set and vllm_is_installed()
        engine = VLLMSpec() if open_ or spec.resources.gpus > 0 else resolve_engine(spec)
    vllm = engine if isinstance(engine, VLLMSpec) else None
    if vllm and vllm.tensor_parallel_size not in shape.shards:
        size = f"rollout.engine.tensor_parallel_size={vllm.tensor_parallel_size}"
        raise UserError(shape.uneven(size))
    set_ = vllm is not None and "kv_cache_gib" in vllm.model_fields_set  # else it follows
    cache = int(vllm.kv_cache_gib * 2**30) if vllm and set_ and vllm.kv_cache_gib else None
    return Rollout(
        shape=shape,
        replicas=spec.replicas,
        engine="vllm" if vllm else "transformers",
        dtype_bytes=dtype_bytes,
        max_concurrent_groups=spec.max_concurrent_groups,
        named=spec.engine.name != "auto",
        tensor_parallel=engine.shards,
        memory_share=(vllm or VLLMSpec()).gpu_memory_utilization,
        kv_cache_bytes=cache,
        gpus_as_set=spec.resources.gpus,
        most_replicas=spec.max_replicas,
        takes_changes=spec.weight_sync.name == "delta",
        takes_whole=spec.weight_sync.name == "full",
        send_buffer=_send_buffer(config),
        scores=shape.keeps_scores(config.model.attention),
        timeout_s=spec.generation_timeout_s,
        held_out=config.eval.completions if config.data.evaluates else 0,
    )


def _bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4
