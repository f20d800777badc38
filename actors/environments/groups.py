"""From the episodes of a group to its tokens, rewards and conversations. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from actors.environments.base import Episode, EpisodeFailed, EpisodeFigures
from actors.environments.child import ENVIRONMENT
from actors.environments.record import common_prompt, rows_of, turn_ends
from actors.groups import pack_group
from actors.messages import Conversations, EpisodesRecord, GroupRecord, GroupTensors, last_rows

EpisodesGroup = tuple[GroupRecord, GroupTensors, Conversations]


def made_group(
    group_id: int, episodes: Sequence[Episode], discount: float, seconds: float, replica: str
) -> EpisodesGroup:
    """A group of episodes: what the controller learns of it, its tokens, its conversations.

    Raises:
        EpisodeFailed: the conversations have no first token in common.
    """
    rows = [rows_of(episode.calls, episode.finish_reason) for episode in episodes]
    try:
        prompt_ids, cut = common_prompt(rows)
    except ValueError as error:
        raise EpisodeFailed(str(error)) from error
    record, tensors = pack_group(group_id, prompt_ids, cut, seconds, replica)
    said = EpisodesRecord(
        rewards=rewards_of(episodes, discount),
        figures={
            field.name: sum(getattr(episode.figures, field.name) for episode in episodes)
            for field in fields(EpisodeFigures)
        },
    )
    if any(episode.turn_rewards is not None for episode in episodes):
        said = replace(said, final=tuple(_final(episode) for episode in episodes))
        ends = turn_ends([episode.calls for episode in episodes], len(prompt_ids))
        tensors = replace(tensors, rewards=turn_rewards(episodes, ends, len(tensors.token_ids)))
    conversations = Conversations(
        messages=tuple(episode.messages for episode in episodes),
        asked=tuple(episode.prompt_messages for episode in episodes),
        last_rows=tuple(last_rows(record.rollouts)),
    )
    return replace(record, episodes=said), tensors, conversations


def rewards_of(episodes: Sequence[Episode], discount: float) -> dict[str, tuple[float | None, ...]]:
    """[G] by criterion. `environment` is what an episode's end was worth and the sum of its turns'
    rewards, each turn's discounted once more than the one before; None: it abstains."""
    names = {name for episode in episodes for name in episode.rewards}
    names |= {ENVIRONMENT for episode in episodes if episode.turn_rewards is not None}
    return {
        name: tuple(
            _whole(episode, discount) if name == ENVIRONMENT else episode.rewards.get(name)
            for episode in episodes
        )
        for name in sorted(names)
    }


def _final(episode: Episode) -> float | None:
    """What an episode's end was worth; 0 where only its turns were worth something."""
    final = episode.rewards.get(ENVIRONMENT)
    return 0.0 if final is None and episode.turn_rewards is not None else final


def _whole(episode: Episode, discount: float) -> float | None:
    if episode.turn_rewards is None:
        return _final(episode)
    turns = (reward * discount**turn for turn, reward in enumerate(episode.turn_rewards))
    return (_final(episode) or 0.0) + sum(turns)


def turn_rewards(
    episodes: Sequence[Episode], ends: Sequence[Sequence[int]], tokens: int
) -> np.ndarray:
    """[N] float32: each turn's reward at its last token, 0 elsewhere.

    Raises ValueError where an episode has not one reward for each of its turns.
    """
    rewards = np.zeros(tokens, dtype=np.float32)
    for episode, own in zip(episodes, ends, strict=True):
        if episode.turn_rewards is not None:
            for end, reward in zip(own, episode.turn_rewards, strict=True):
                rewards[end] += reward
    return rewards
