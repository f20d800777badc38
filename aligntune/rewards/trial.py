"""One call of a reward as the run would make it: the same child process, limits and checks.

No Ray. What comes back is one finite number or None per completion, or `RewardFailed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.sandbox import VARIABLE, Mode
from actors.scoring.children import FunctionScorer
from actors.scoring.criteria import RewardCriterion, RewardFailed, RewardFailure
from actors.scoring.said import Completion, text_of
from aligntune import loops
from aligntune.data.errors import DataError
from aligntune.data.messages import TOOLS, check_tools
from aligntune.rewards.catalogue import REWARDS

if TYPE_CHECKING:
    from actors.messages import Messages
    from actors.scoring.model import RewardModelCriterion
    from actors.transcript import Transcript

SHOWN_CHARACTERS = 200  # of a completion that is made of a column
REMOTE = {registered.target for registered in REWARDS.values() if registered.remote} | {
    "aligntune.rewards.remote:remote_scores"
}
"""Rewards that ask another machine: a trial may cost, and may be refused here but not there."""


@dataclass(frozen=True)
class Group:
    """Completions of one prompt, with its data columns."""

    prompt: str | Messages
    completions: tuple[Completion, ...]
    columns: Mapping[str, Any]
    asked: tuple[Messages, ...] = ()  # of episodes: what stood before the policy's first message
    rendered: str = ""  # the prompt as the model saw it, where that is known
    transcript: Transcript | None = None  # both forms of a prompt that is one


async def called(
    criterion: RewardCriterion | RewardModelCriterion,
    groups: Sequence[Group],
    *,
    log: str | None = None,
    sandbox: Mode = "auto",
    variables: Mapping[str, str] | None = None,
) -> list[list[float | None] | RewardFailed]:
    """What the reward says of each group, one after the other, or why it says nothing.

    A reward model is loaded in this process, and runs on a GPU where there is one. `log` is the
    file for what a function prints; default: this process's standard output. `variables` are added
    to the environment of its process.

    Raises:
        RewardFailed: it cannot be imported.
        ModelError: the reward model cannot be loaded.
    """
    scorer: FunctionGroups | ModelGroups
    if isinstance(criterion, RewardCriterion):
        scorer = FunctionGroups(criterion, log, {VARIABLE: sandbox, **(variables or {})})
    else:
        scorer = ModelGroups(criterion)
    said: list[list[float | None] | RewardFailed] = []
    try:
        await scorer.start()
        for group in groups:
            try:
                said.append(await scorer.call(group))
            except RewardFailed as failed:
                said.append(failed)
    finally:
        await scorer.close()
    return said


class FunctionGroups:
    """A function that is called with groups."""

    def __init__(
        self, criterion: RewardCriterion, log: str | None, variables: Mapping[str, str]
    ) -> None:
        self._scorer = FunctionScorer(criterion, log, max_concurrent_groups=1, variables=variables)
        self.start, self.close = self._scorer.start, self._scorer.close

    async def call(self, group: Group) -> list[float | None]:
        """The scores of one group. Raises RewardFailed."""
        return await self._scorer.call(
            group.prompt, group.completions, group.columns, group.rendered
        )


class ModelGroups:
    """A reward model that is asked about groups."""

    def __init__(self, criterion: RewardModelCriterion) -> None:
        from actors.scoring.model import ModelScorer  # torch: seconds

        self._stuck: str | None = None
        self._scorer = ModelScorer(criterion)
        self.start, self.close = self._scorer.start, self._scorer.close

    async def call(self, group: Group) -> list[float | None]:
        """The scores of one group, of episodes as whole conversations. Raises RewardFailed, from
        where the model answers no more on for each."""
        import numpy as np

        from actors.messages import Conversations, Prompt
        from actors.scoring.model import ModelStuck

        if self._stuck is not None:
            raise RewardFailed(self._scorer.name, RewardFailure.DIED, self._stuck)

        columns = dict(group.columns)
        try:
            tools = tuple(check_tools(columns.get(TOOLS)))
        except DataError as error:
            raise RewardFailed(self._scorer.name, RewardFailure.RAISED, str(error)) from error
        ids = np.zeros(0, np.int32)
        prompt = Prompt(0, group.prompt, "", ids, columns, tools, group.transcript)
        texts, talks = [*map(text_of, group.completions)], None
        if group.asked:
            both = zip(group.asked, group.completions, strict=True)
            messages = tuple([*asked, *said] for asked, said in both if not isinstance(said, str))
            talks = Conversations(messages, tuple(map(len, group.asked)), last_rows=())
        try:
            return [*await self._scorer.score(prompt, texts, talks)]
        except ModelStuck as stuck:
            self._stuck = str(stuck)
            raise RewardFailed(self._scorer.name, RewardFailure.DIED, self._stuck) from stuck


def called_once(
    criteria: Mapping[str, RewardCriterion],
    group: Group,
    log: str | None,
    sandbox: Mode,
    gpus: float,
) -> dict[str, list[float | None] | RewardFailed]:
    """What each reward says of one group, side by side, by the keys of `criteria`. Without `gpus`
    they see none, as in an actor that has none."""
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}

    async def one(criterion: RewardCriterion) -> list[float | None] | RewardFailed:
        try:
            return (await called(criterion, [group], log=log, sandbox=sandbox, variables=hidden))[0]
        except RewardFailed as failed:
            return failed

    async def all_of_them() -> list[list[float | None] | RewardFailed]:
        return await asyncio.gather(*map(one, criteria.values()))

    return dict(zip(criteria, loops.run(all_of_them()), strict=True))


def is_ours(criterion: RewardCriterion) -> bool:
    """Whether the function is one of this project's, and none of the user's own."""
    target = criterion.target
    return isinstance(target, str) and target.startswith("aligntune.rewards.")


def why(criterion: RewardCriterion | RewardModelCriterion, failed: RewardFailed) -> tuple[str, str]:
    """A failure for a person: one line, and the lines of the user's own code below it; none where
    the reward is of ours."""
    if isinstance(criterion, RewardCriterion) and is_ours(criterion):
        last = failed.detail.splitlines()[-1]
        return f"reward {failed.criterion!r} failed ({failed.reason}): {last}", ""
    first, *below = str(failed).splitlines()
    return first, "".join(f"{line}\n" for line in below)


def short_completions(columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Two completions for a trial: an empty one, as a model may write, and a short one, the first
    column's text where there is such."""
    texts = (value for value in columns.values() if isinstance(value, str) and value.strip())
    return "", next(texts, "A short answer.")[:SHOWN_CHARACTERS]
