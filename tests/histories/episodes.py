"""Episodes of a history: the real environment actor, over an environment that is a function of the
row and breaks where the history says so."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from actors.environment import EnvironmentActor
from actors.environments.base import Episode, EpisodeFailed, ModelCall, Sampler
from actors.messages import FinishReason, GroupSampling, Prompt
from tests.histories.cast import check

PROMPT = 1  # the token that all prompts are
TOOL = 2  # the token that the environment writes
ANEW = 3  # the token after the prompt of a conversation that is begun anew: another row

Breaks = Callable[[], Awaitable[None]]


def turns_of(row: int, rollout: int) -> list[bool]:
    """The turns of an episode; True is one whose history was written anew, so a row of its own."""
    dice = random.Random(f"{row} {rollout}")
    return [False, *(dice.random() < 0.3 for _ in range(dice.randint(0, 3)))]


def owners_of(row: int, rollouts: int) -> list[int]:
    """The rollout that each row of a group belongs to."""
    return [i for i in range(rollouts) for anew in (True, *turns_of(row, i)) if anew]


class Played:
    """What runs episodes. Each turn sees what was said before, and a tool is asked in between."""

    def __init__(self, unplayable: Sequence[int], breaks: Breaks) -> None:
        self._unplayable = unplayable
        self._breaks = breaks

    async def start(self) -> str:
        """It is ready."""
        return "off"

    async def close(self) -> None:
        """Nothing is left."""

    async def run(self, prompt: Prompt, rollout: int, seed: int, sample: Sampler) -> Episode:
        """One episode. Raises EpisodeFailed."""
        said, calls, turns = [PROMPT], [], turns_of(prompt.row, rollout)
        for number, anew in enumerate(turns):
            said = [PROMPT, ANEW, number] if anew else said
            segment, reason = await sample(said, 4, number)
            calls.append(ModelCall(np.asarray(said, dtype=np.int32), segment, reason))
            said = [*said, *(int(token) for token in segment.token_ids), TOOL]
            await self._breaks()
            if prompt.row in self._unplayable:
                raise EpisodeFailed("it never works")
        return Episode(
            calls=tuple(calls),
            finish_reason=FinishReason.STOP,
            messages=[{"role": "user", "content": f"{prompt.row}"}],
            prompt_messages=1,
            rewards={"environment": 0.0},
            turn_rewards=(0.0,) * len(turns) if rollout % 2 else None,
        )


class Environment(EnvironmentActor):
    """The actor, whose groups say what they are of in place of arrays."""

    name: str

    async def stacks(self) -> str:  # type: ignore[override]
        """Nowhere."""
        return ""

    async def generate(
        self, life: str, prompt: Prompt, sampling: GroupSampling, rollout: Any, name: str
    ) -> Any:
        """A group, after a look at what it is made of."""
        made = await super().generate(life, prompt, sampling, rollout, name)
        record, tensors, conversations = made
        group, versions = record.group_id, {s.version for row in record.version_spans for s in row}
        check(group < 0 or prompt.row == group, f"group {group} has the prompt {prompt.row}")
        check(group >= 0 or len(versions) == 1, f"{group} of an evaluation is of {versions}")
        owners = owners_of(prompt.row, sampling.completions)
        check(list(record.rollouts) == owners, f"{group}: rows {record.rollouts}, not {owners}")
        sampled = tensors.token_ids[tensors.mask].tolist()
        turns = sum(len(turns_of(prompt.row, i)) for i in range(sampling.completions))
        check(len(set(sampled)) == len(sampled) == turns, f"{group}: {turns} turns are {sampled}")
        said = {"group": group, "version": record.oldest_version, "rows": len(owners)}
        return record, said, conversations

    def killed(self) -> None:
        """The process is gone, with all that ran in it; it drops none of its calls."""
        self._drop = lambda ref: None
        for life in self._lives.values():
            for task in (life.task, *life.turns._sending):
                task.cancel()
