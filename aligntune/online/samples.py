"""Whole groups as rows for people: what was asked, every completion, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.answers import ObjectsLost, ReplicaLost, answer
from actors.messages import Conversations
from aligntune.config.online import RunConfig
from aligntune.online.groups import ReadyGroup, total_reward
from aligntune.plain import plain

T = TypeVar("T")


@dataclass(frozen=True)
class Said:
    """What the completions of a group say."""

    texts: tuple[str, ...]  # [G] decoded
    conversations: Conversations | None = None  # of episodes


Texts = Said | None  # None: lost

TEXTS_SECONDS = 60.0  # for the texts of a group that a reward actor's node still holds


async def texts_of(groups: Sequence[ReadyGroup]) -> list[Texts]:
    """What the completions of the groups that are shown say, fetched; None where it was lost with a
    node."""
    return await asyncio.gather(*(_texts(group) for group in groups))


def sample_rows(
    config: RunConfig,
    groups: Sequence[ReadyGroup],
    texts: Sequence[Texts],
    advantages: Sequence[tuple[float, ...]] | None = None,
) -> list[dict[str, Any]]:
    """One object for each group that has its texts here; docs/architecture.md has its keys.

    `advantages` are those of each group's completions, where it was trained on by such.
    """
    return [
        _row(config, group, text, None if advantages is None else advantages[index])
        for index, (group, text) in enumerate(zip(groups, texts, strict=False))
    ]


def _row(
    config: RunConfig,
    group: ReadyGroup,
    texts: Texts,
    advantages: tuple[float, ...] | None,
) -> dict[str, Any]:
    record, scores = group.record, group.scores
    versions = rows_of(record.version_spans, record.rollouts)
    completions, transcript = [], group.prompt.transcript
    for index, values in enumerate(scores.values):
        completions.append(
            {
                "text": None if texts is None else texts.texts[index],
                **_episode(group, texts, index),
                "tokens": record.sampled_lengths[index],
                "finish_reason": record.finish_reasons[index].value,
                "scores": dict(zip(scores.criteria, values, strict=True)),
                "reward": total_reward(config, values),
                **({} if advantages is None else {"advantage": advantages[index]}),
                "versions": [
                    [span.version, span.tokens] for spans in versions[index] for span in spans
                ],
            }
        )
    return {
        "group": record.group_id,
        "row": group.prompt.row,
        "source": plain(group.prompt.source),
        **({} if transcript is None else {"transcript": vars(transcript)}),
        "prompt": group.prompt.text,
        "columns": plain(group.prompt.columns),
        "completions": completions,
    }


def _episode(group: ReadyGroup, said: Texts, index: int) -> dict[str, Any]:
    """What is told of an episode: its turns and, as messages, the whole conversation, of which the
    first `asked` stood before the policy's first."""
    if group.record.episodes is None:
        return {}
    talks = None if said is None else said.conversations
    return {
        "turns": group.record.turns[index],
        "messages": None if talks is None else plain(talks.messages[index]),
        "asked": None if talks is None else talks.asked[index],
    }


def rows_of(rows: Sequence[T], rollouts: Sequence[int]) -> list[list[T]]:
    """The rows [R] of each rollout [G]."""
    gathered: list[list[T]] = [[] for _ in range(max(rollouts, default=-1) + 1)]
    for row, rollout in zip(rows, rollouts, strict=True):
        gathered[rollout].append(row)
    return gathered


async def said_of(group: ReadyGroup) -> Said:
    """What the completions of a group say, fetched. Raises ObjectsLost or ReplicaLost."""
    texts = await answer(group.texts, "reward", "texts", TEXTS_SECONDS)
    if group.conversations is None:
        return Said(texts)
    talks = await answer(group.conversations, "environment", "conversations", TEXTS_SECONDS)
    return Said(texts, talks)


async def _texts(group: ReadyGroup) -> Texts:
    try:
        return await said_of(group)
    except (ObjectsLost, ReplicaLost):
        return None
