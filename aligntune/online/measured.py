"""What the held-out figures of an online run are made by. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aligntune.config.online import RunConfig
from aligntune.online.settle import decoding_set
from aligntune.runs.measure import measure, scored_by


def measure_of(config: RunConfig, held_out: str, positions: int | None, ends: Sequence[int]) -> str:
    """`runs.measure` of a settled config: `held_out` is the digest of its prompts, `positions` and
    `ends` are as `decoding_set` takes them."""
    rewards = [
        scored_by(reward.model_dump(mode="json", exclude_defaults=True))
        for reward in config.rewards
    ]
    drawn = [config.eval.completions, config.eval.temperature]
    played = config.model_dump(mode="json", include={"tools", "environment", "agent"})
    turns: list[Any] = [config.episodes.max_turns, config.episodes.max_tool_calls]
    # Where all of this is as by default, runs of earlier versions have a measure without it.
    if changed := decoding_set(config, positions, ends):
        turns.append(changed)
    return measure(held_out, rewards, drawn, config.rollout.max_completion_length, played, turns)
