"""RewardActor: decodes a group's completions and has every criterion score them.

Invariant: a group's scores are what the criteria returned, or the call raises `RewardFailed`; and
the next group finds every criterion usable. User code runs in child processes, which end with the
actor. Reward models run in the actor itself. Groups are scored side by side.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from actors.liveness import Alive
from actors.messages import Conversations, GroupTensors, Prompt, Scores
from actors.sandbox import VARIABLE, Mode, SandboxBusy, SandboxMissing, in_force
from actors.scoring.children import FunctionScorer
from actors.scoring.criteria import (
    EpisodeCriterion,
    RewardCriterion,
    RewardFailed,
    RewardFailure,
)
from actors.scoring.model import ModelScorer, ModelStuck, RewardModelCriterion
from actors.specs import MAX_CONCURRENT_GROUPS, ModelSpec
from actors.whereabouts import whereabouts

KEPT_TRIES = 1024  # groups whose scores are kept for another try

Criterion = RewardCriterion | RewardModelCriterion | EpisodeCriterion


class Scorer(Protocol):
    """One criterion at work: a function in child processes, or a model in this one."""

    name: str

    async def start(self) -> None:
        """Get ready. Raises `RewardFailed` when that cannot be."""

    async def score(
        self, prompt: Prompt, completions: Sequence[str], conversations: Conversations | None = None
    ) -> Sequence[float | None]:
        """One finite number per completion, None where it abstains; `conversations` where they are
        of episodes. Raises `RewardFailed`."""

    async def close(self) -> None:
        """Let go of what it holds."""


class RewardActor(Alive):
    """Scores groups, several at a time; to be wrapped by `ray.remote`."""

    def __init__(
        self,
        criteria: tuple[RewardCriterion | RewardModelCriterion, ...],
        tokenizer_spec: ModelSpec,
        log: str | None = None,
        max_concurrent_groups: int = MAX_CONCURRENT_GROUPS,
        sandbox: Mode = "auto",
    ) -> None:
        """`log`: the file in the run directory for what functions print. Where this node does not
        see that directory it goes to the actor's own output, which Ray keeps.
        `max_concurrent_groups`: groups that it is given at a time; a slow function may have as many
        processes. `sandbox` is for programs that functions run by `actors.sandbox`."""
        self._sandbox = sandbox
        if log is not None:
            folder = os.path.dirname(log)
            if os.path.isdir(os.path.dirname(folder)):
                os.makedirs(folder, exist_ok=True)
            else:
                log = None
        self._tokenizer_spec = tokenizer_spec
        self._tokenizer: Any = None
        # By group and place: what criteria said in a try that another criterion failed.
        self._answered: dict[tuple[Any, ...], dict[int, Sequence[float | None]]] = {}
        self._ends: frozenset[int] = frozenset()  # tokens that are no part of what was written
        self._scorers: tuple[Scorer, ...] = tuple(
            FunctionScorer(c, log, max_concurrent_groups, {VARIABLE: sandbox})
            if isinstance(c, RewardCriterion)
            else ModelScorer(c)
            for c in criteria
        )

    async def start(self) -> dict[str, Any]:
        """Load the tokenizer and start every criterion. Returns the criteria and the process id.

        Raises:
            RewardFailed: a function could not be imported here, or a required sandbox is missing.
            ModelError: the tokenizer or a reward model cannot be loaded.
        """
        try:
            sandbox = await asyncio.to_thread(in_force, self._sandbox)
        except SandboxMissing as missing:
            raise RewardFailed("sandbox", RewardFailure.IMPORT, str(missing)) from missing
        except SandboxBusy as busy:  # this is for a person; who runs a program asks again
            sandbox = f"not known yet ({busy})"
        await asyncio.to_thread(self._load_tokenizer)
        await _all(scorer.start() for scorer in self._scorers)
        criteria = tuple(scorer.name for scorer in self._scorers)
        return {"criteria": criteria, "sandbox": sandbox, **whereabouts()}

    async def score(
        self, prompt: Prompt, tensors: GroupTensors, conversations: Conversations | None = None
    ) -> tuple[Scores, tuple[str, ...]]:
        """The scores of one group, [G][K], criteria in the order they were given, and its texts.

        Called with `num_returns=2`: the driver waits for the scores, and fetches the decoded texts
        [G] of the groups that it writes to the samples file, and no others. `conversations` are
        those of episodes: functions get what came after the prompt as messages, as TRL gives it;
        reward models with a chat template read the whole, and others what the model says last.

        Raises:
            RewardFailed: the first criterion in that order that had no scores. The others are
                waited for, each within its own limit, so that no child is left amid a call; their
                scores are kept for the next try of the group.
        """
        if self._tokenizer is None:
            raise RuntimeError("RewardActor.score was called before RewardActor.start returned")
        began = time.monotonic()
        self.done += 1
        rows = range(len(tensors.lengths)) if conversations is None else conversations.last_rows
        texts = [self._text(tensors.token_ids[tensors.completion(row)].tolist()) for row in rows]
        try:
            by_criterion = await self._by_criterion(prompt, tensors, texts, conversations)
        except ModelStuck as stuck:  # a thread cannot be ended; the next actor has the groups
            print(f"reward actor ends: {stuck}", file=sys.stderr, flush=True)
            os._exit(1)
        scores = Scores(
            group_id=tensors.group_id,
            criteria=tuple(scorer.name for scorer in self._scorers),
            values=tuple(
                tuple(values[index] for values in by_criterion) for index in range(len(texts))
            ),
            seconds=time.monotonic() - began,
        )
        return scores, tuple(texts)

    async def _by_criterion(
        self,
        prompt: Prompt,
        tensors: GroupTensors,
        texts: Sequence[str],
        conversations: Conversations | None,
    ) -> list[Sequence[float | None]]:
        """[K][G]. A criterion that had scores in a try before is not asked again: a judge costs
        money, and the one that is away may be away for minutes."""
        tokens = hashlib.sha256(tensors.token_ids.tobytes()).digest()
        group = (tensors.group_id, prompt.row, tensors.lengths, tokens)
        known = self._answered.pop(group, {})
        wanted = [place for place in range(len(self._scorers)) if place not in known]
        calls = (self._scorers[place].score(prompt, texts, conversations) for place in wanted)
        results = await asyncio.gather(*calls, return_exceptions=True)
        for place, result in zip(wanted, results, strict=True):
            if not isinstance(result, BaseException):
                known[place] = result
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            self._answered[group] = known
            if len(self._answered) > KEPT_TRIES:  # of groups that were given up, or went elsewhere
                del self._answered[next(iter(self._answered))]
            raise failures[0]
        return [known[place] for place in range(len(self._scorers))]

    def _load_tokenizer(self) -> None:
        # transformers: seconds, and only needed here
        from actors.engines.base import stop_token_ids
        from actors.models.loading import load_tokenizer

        spec = self._tokenizer_spec
        self._tokenizer = load_tokenizer(spec)
        self._ends = frozenset((*stop_token_ids(spec), self._tokenizer.pad_token_id))

    def _text(self, token_ids: Sequence[int]) -> str:
        """What the model wrote: tags that are special tokens too, but no end and no padding."""
        written = [token for token in token_ids if token not in self._ends]
        text: str = self._tokenizer.decode(written, skip_special_tokens=False)
        return text

    async def ping(self) -> int:  # type: ignore[override]
        """As every actor's, while its event loop turns."""
        return self.done

    async def close(self) -> None:
        """End every child process."""
        await _all(scorer.close() for scorer in self._scorers)


async def _all(calls: Any) -> list[Any]:
    """The results of `calls`, run together; when all are done, the first exception is raised."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
