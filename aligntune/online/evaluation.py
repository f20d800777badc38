"""Scores the held-out prompts with the current policy, through the same actors as training."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.messages import GroupSampling, Prompt
from actors.reward import RewardFailed
from actors.supervise import ObjectsLost, ReplicaLost, ReplicaSet
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online.figures import completion_metrics, score_metrics
from aligntune.online.pipeline import QUEUE_SECONDS, ReadyGroup, scoring_deadline
from aligntune.online.roles import Roles
from aligntune.online.serving import Serving
from aligntune.tracking.metrics import EventKind


async def evaluate(
    config: RunConfig,
    prompts: Sequence[Prompt],
    rollouts: ReplicaSet,
    rewards: ReplicaSet,
    event: Callable[..., None],
) -> dict[str, float]:
    """`eval/*` figures over `prompts`. A prompt that keeps failing is counted in `eval/failed` and
    left out of the means. Raises RunFailed when none could be scored."""
    results = await asyncio.gather(
        *(_one(config, index, p, rollouts, rewards, event) for index, p in enumerate(prompts))
    )
    groups = [result for result in results if isinstance(result, ReadyGroup)]
    if not groups:
        raise RunFailed(f"not one of {len(prompts)} evaluation prompts was scored: {results[0]}")
    return {
        **score_metrics(config, groups, prefix="eval/"),
        **completion_metrics(groups, prefix="eval/"),
        "eval/prompts": float(len(groups)),
        "eval/failed": float(len(results) - len(groups)),
    }


async def _one(
    config: RunConfig,
    index: int,
    prompt: Prompt,
    rollouts: ReplicaSet,
    rewards: ReplicaSet,
    event: Callable[..., None],
) -> ReadyGroup | str:
    """One prompt's scored group, or why there is none."""
    sampling = GroupSampling(
        completions=config.eval.completions,
        max_tokens=config.rollout.max_completion_length,
        temperature=config.eval.temperature,
        seed=config.train.seed,
        group_id=index,
    )
    reason = ""
    for _ in range(config.rollout.max_attempts):
        try:
            record, tensors = await rollouts.call(
                "generate",
                prompt,
                sampling,
                deadline_s=config.rollout.generation_timeout_s,
                queue_s=QUEUE_SECONDS,
                returns=2,
            )
            scores, texts = await rewards.call(
                "score",
                prompt,
                tensors,
                deadline_s=scoring_deadline(config),
                queue_s=QUEUE_SECONDS,
                returns=2,
            )
            return ReadyGroup(prompt, record, scores, texts, tensors, None)
        except (ReplicaLost, ObjectsLost, RewardFailed) as failure:
            reason = str(failure)
            event(EventKind.GROUP_RETRIED, evaluation=index, reason=reason)
    return reason


async def evaluate_model(
    config: RunConfig, roles: Roles, prompts: Sequence[Prompt]
) -> dict[str, float]:
    """`evaluate` on actors of its own, for a model that is not being trained."""

    def ignore(*_: object, **__: object) -> None:
        """There is no run whose events these could be, nor a policy to rebuild."""

    serving = Serving(config, roles, ignore, ignore, ignore)
    try:
        await asyncio.gather(serving.rollouts.start(), serving.rewards.start())
        return await evaluate(config, prompts, serving.rollouts, serving.rewards, ignore)
    finally:
        await serving.close()
