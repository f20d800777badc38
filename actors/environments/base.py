"""What an episode is: one rollout of many turns, and what makes it.

An episode is turns of the policy, each a call of the model, with what tools and environments say
in between. Whoever runs the episodes asks a `Sampler` for each turn and never sees an engine.
Tokens in, tokens out: the ids of a turn's prompt begin with ids at hand, never with text that was
tokenised again. Light: importing this loads no framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from actors.messages import FinishReason, Messages, Prompt, Segment


@dataclass(frozen=True)
class ModelCall:
    """One answer of the policy: what it saw, and what it sampled."""

    prompt_ids: np.ndarray  # [P] int32, every token before the answer
    sampled: Segment  # with log-probs and version spans
    finish_reason: FinishReason  # STOP, or LENGTH where the budget cut it


@dataclass(frozen=True)
class EpisodeFigures:
    """Counts and times of one episode."""

    tool_calls: int = 0
    tools_failed: int = 0  # raised, unknown tool, wrong arguments: a message to the model each
    tools_timed_out: int = 0
    malformed_calls: int = 0  # the model's text was no call that a parser reads
    tool_seconds: float = 0.0  # the policy waited for tools and the environment
    retried: int = 0  # times the episode was begun anew
    lost: int = 0  # its environment could not go on, time and again at the same turn
    extended: int = 0  # turns whose prompt extends the last turn's tokens
    realigned: int = 0  # turns whose history was rendered anew and agrees up to the end of a turn
    forked: int = 0  # turns whose history differs earlier: another row


@dataclass(frozen=True)
class Episode:
    """One rollout that has ended."""

    calls: tuple[ModelCall, ...]  # in their order; at least one
    finish_reason: FinishReason
    messages: Messages  # the whole conversation as data: for rewards and samples
    prompt_messages: int = 0  # the first so many of them stood before the policy's first turn
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by criterion; None abstains
    turn_rewards: tuple[float, ...] | None = None  # one per call, of a step environment
    figures: EpisodeFigures = EpisodeFigures()

    def lost(self) -> Episode:
        """This one, as it is where its environment could not go on: nothing is said of its
        worth."""
        figures = replace(self.figures, lost=1)
        return replace(
            self,
            finish_reason=FinishReason.ERROR,
            rewards={},
            turn_rewards=None,
            figures=figures,
        )


class EpisodeFailed(RuntimeError):
    """An episode that came to no end: no score, ever.

    `infrastructure` tells a fault of a process or machine, which another try may mend, from one of
    the row or the user's code. `so_far` is the episode up to the policy's last turn, where what was
    done with that has lost the process; it stays where the error is raised.
    """

    def __init__(
        self, reason: str, infrastructure: bool = False, so_far: Episode | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.infrastructure = infrastructure
        self.so_far = so_far

    def __reduce__(self) -> tuple[type, tuple[str, bool]]:
        return type(self), (self.reason, self.infrastructure)


class Sampler(Protocol):
    """The policy, for one episode."""

    async def __call__(
        self, token_ids: Sequence[int] | np.ndarray, max_tokens: int, turn: int
    ) -> tuple[Segment, FinishReason]:
        """What the policy writes after `token_ids`, at most `max_tokens` tokens, its end-of-turn
        token included. `turn` counts the episode's calls from 0 and names the draws.

        A replica that dies meanwhile costs a wait: the turn is asked again of another one.
        """


@dataclass(frozen=True)
class EpisodeLimits:
    """What bounds one episode, whoever runs it."""

    max_turns: int  # calls of the model
    max_tool_calls: int
    max_sampled_tokens: int  # over all turns: rollout.max_completion_length
    max_tokens: int  # all tokens of a row, prompt included: the model's positions at most
    call_timeout_s: float  # of one tool call or step
    episode_timeout_s: float  # of the whole, without the time spent on sampling
    max_output_characters: int  # of one tool's answer; longer ones are cut, and say so
    memory_gib: float | None = None  # of a process of the user's, above what its imports take


class Episodes(Protocol):
    """What runs episodes: tools and environments in our processes, or an agent that calls us."""

    async def start(self) -> str:
        """Get ready: import, check and serve. Returns what sandbox is in force, for a person.

        Raises:
            EpisodeFailed: that cannot be.
        """

    async def run(self, prompt: Prompt, rollout: int, seed: int, sample: Sampler) -> Episode:
        """One episode of a data row; `rollout` is its place among its siblings, and `seed` fixes
        what the environment draws. Cancelling it ends the episode and everything it started.

        Raises:
            EpisodeFailed: it came to no end.
        """

    async def close(self) -> None:
        """End every process and session."""
