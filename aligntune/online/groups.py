"""A scored group, and the arithmetic from its scores to what the ranks are sent. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.messages import GroupRecord, GroupWork, Prompt, Scores
from aligntune.algorithms.advantages import weighted_total
from aligntune.algorithms.base import SCORE, Algorithm
from aligntune.config.episodes import scores_itself
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed

if TYPE_CHECKING:
    import torch


LARGEST = 1e100
"""Of a score, and of a weighted sum: squares of larger ones, and their sums, may be no numbers."""


@dataclass(frozen=True)
class ReadyGroup:
    """A scored group: of a step to come, or of an evaluation."""

    prompt: Prompt
    record: GroupRecord
    scores: Scores
    texts: Any  # reference to the decoded completions, tuple[str, ...] [G]
    tensors: Any  # reference to GroupTensors
    conversations: Any | None = None  # reference to Conversations, where rollouts are episodes
    reference: Any | None = None  # reference to the reference log-probs [N]


def total_reward(config: RunConfig, values: tuple[float | None, ...]) -> float | None:
    """The weighted sum of a completion's scores; None where all criteria that count abstain."""
    return weighted_total(values, [spec.weight for spec in config.rewards])


def out_of_range(config: RunConfig, scores: Scores) -> str | None:
    """What is wrong with scores that no mean or deviation can be taken of; None for all others."""
    for row in scores.values:
        each = [(f"reward {name!r}", x) for name, x in zip(scores.criteria, row, strict=True)]
        for what, value in [*each, ("the weighted sum of the rewards", total_reward(config, row))]:
            if value is not None and not abs(value) <= LARGEST:
                return (
                    f"{what} gave a completion {value:g}, which no mean can be taken of; keep "
                    f"scores, with their weights, within {LARGEST:g}"
                )
    return None


def raw_scores(config: RunConfig, scores: Scores) -> dict[str, list[float]]:
    """A group's scores per criterion and, as `SCORE`, their weighted sum: [G] each, fewer where a
    criterion abstains."""
    columns: dict[str, list[float | None]] = {
        name: [row[k] for row in scores.values] for k, name in enumerate(scores.criteria)
    }
    columns[SCORE] = [total_reward(config, row) for row in scores.values]
    return {name: [v for v in column if v is not None] for name, column in columns.items()}


def compared_scores(config: RunConfig, scores: Scores) -> dict[str, list[float]]:
    """`raw_scores` of what tells completions apart: without the criteria of weight 0, but for the
    one that the algorithm filters by."""
    weighty = {
        name for name, spec in zip(scores.criteria, config.rewards, strict=True) if spec.weight
    }
    shown = {*weighty, SCORE, config.algorithm.sampling_metric}
    return {name: of for name, of in raw_scores(config, scores).items() if name in shown}


def truncated(record: GroupRecord) -> tuple[bool, ...]:
    """[G] which rollouts were cut by a limit."""
    return tuple(reason.truncated for reason in record.finish_reasons)


def group_works(
    config: RunConfig, algorithm: Algorithm, groups: Sequence[ReadyGroup]
) -> list[GroupWork]:
    """Sequence advantages of a step's groups, and what the policy ranks need with them.

    Raises ValueError where a group does not have one score per rollout.
    """
    import torch

    for group in groups:
        scored, made = len(group.scores.values), len(group.record.finish_reasons)
        if scored != made:
            raise ValueError(f"group {group.record.group_id}: {scored} scores for {made} rollouts")
    scores, advantages = algorithm.scores_and_advantages(
        [_rewards(config, algorithm, group) for group in groups],
        torch.tensor([spec.weight for spec in config.rewards], dtype=torch.float64),
        [torch.tensor(group.record.sampled_lengths) for group in groups],
        config.rollout.max_completion_length,
    )
    return [
        GroupWork(
            group_id=group.record.group_id,
            prompt_tokens=group.record.prompt_tokens,
            lengths=group.record.lengths,
            trained=_trained(algorithm, group.record, scores[index]),
            truncated=truncated(group.record),
            advantages=tuple(advantages[index].tolist()),
            scores=tuple(scores[index].tolist()),
            tensors=group.tensors,
            reference=group.reference,
            rollouts=group.record.rollouts,
            turn_weight=_turn_weight(config, algorithm, group),
        )
        for index, group in enumerate(groups)
    ]


def _trained(algorithm: Algorithm, record: GroupRecord, scores: torch.Tensor) -> tuple[bool, ...]:
    """[G] which rollouts enter the loss. One without a score does not where a critic is the
    baseline; else its advantage is 0."""
    absent = scores.isnan() & algorithm.needs.critic
    return tuple(
        algorithm.trains_on(cut) and not gone
        for cut, gone in zip(truncated(record), absent.tolist(), strict=True)
    )


def _rewards(config: RunConfig, algorithm: Algorithm, group: ReadyGroup) -> torch.Tensor:
    """[G, K] float64, NaN where a criterion abstains. Where the algorithm places the rewards of
    single turns, the environment's is what is left without them."""
    import torch

    values = [list(row) for row in group.scores.values]
    episodes = group.record.episodes
    if episodes is not None and episodes.final is not None and algorithm.places_turn_rewards:
        for row, final in zip(values, episodes.final, strict=True):
            for index, spec in enumerate(config.rewards):
                if scores_itself(spec):
                    row[index] = final
    absent = math.nan
    return torch.tensor(
        [[absent if value is None else value for value in row] for row in values],
        dtype=torch.float64,
    )


def _turn_weight(config: RunConfig, algorithm: Algorithm, group: ReadyGroup) -> float:
    """The weight of the rewards of single turns, where the algorithm places them."""
    episodes = group.record.episodes
    if episodes is None or episodes.final is None or not algorithm.places_turn_rewards:
        return 0.0
    return sum(spec.weight for spec in config.rewards if scores_itself(spec))


def check_age(groups: Sequence[ReadyGroup], version: int, max_staleness: int) -> None:
    """The bound itself, looked at before every update. Raises RunFailed: aligntune is wrong."""
    for group in groups:
        age = version - group.record.oldest_version
        if not 0 <= age <= max_staleness:
            raise RunFailed(
                f"group {group.record.group_id} has tokens of policy version "
                f"{group.record.oldest_version}, {age} versions behind version {version}; "
                f"train.max_staleness={max_staleness} allows no training on it. This is a defect "
                "of aligntune: please report it with events.jsonl"
            )
