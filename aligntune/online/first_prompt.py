"""Every reward function called once on the first prompt, before anything starts, and whether reward
models can read the prompts.

A function runs as the run would run it: in its own process, with its time limit, its answer
checked. What asks another machine is left out, for that may cost, or answer the cluster's nodes
alone; so are reward models, which want the run's GPUs, and `try_first: false`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from actors.messages import Prompt
from actors.reward import Criterion
from actors.scoring.criteria import RewardCriterion, RewardFailed, RewardFailure
from actors.scoring.model import RewardModelCriterion
from actors.scoring.said import Completion
from actors.specs import RewardFunctionSpec
from aligntune.config.online import RunConfig
from aligntune.data.prompts import PromptSource
from aligntune.errors import UserError
from aligntune.rewards.trial import REMOTE, Group, called_once, is_ours, short_completions, why

TEXT_CHARACTERS = 40  # of a completion, where it is shown
NOTE = "note: "  # begins a line that a run tells too, not the dry run alone


def check_read(
    criteria: Sequence[Criterion], by_template: Collection[str], prompts: PromptSource
) -> None:
    """Whether the prompts are text for reward models that read text, which are all that are not
    named in `by_template` and read prompts. Raises ValueError."""
    for criterion in criteria:
        if (
            isinstance(criterion, RewardModelCriterion)
            and criterion.reads == "conversation"
            and criterion.name not in by_template
            and (row := prompts.first_messages()) is not None
        ):
            raise ValueError(
                f"reward {criterion.name!r} reads prompt and completion as text, for its model has "
                f"no chat template in use, and the prompt of row {row} is messages: name a reward "
                "model that has one, give prompts as strings, or set its reads: completion"
            )


def try_rewards(
    config: RunConfig, criteria: Sequence[Criterion], first: Prompt, log: str | None
) -> list[str]:
    """What each reward said of two short completions, a line each, in the order of the config.

    `log` is the file for what they print; default: standard output.

    Raises:
        UserError: a reward failed; with the user's own frames.
    """
    functions: dict[str, RewardCriterion] = {}
    for index, (spec, criterion) in enumerate(zip(config.rewards, criteria, strict=True)):
        if (
            isinstance(spec, RewardFunctionSpec)
            and isinstance(criterion, RewardCriterion)
            and spec.try_first
            and criterion.target not in REMOTE
        ):
            functions[f"rewards.{index}"] = criterion
    texts = short_completions(first.columns)
    said: Sequence[Completion] = texts
    if config.plays:  # as every call of the run has it
        said = [[{"role": "assistant", "content": text}] for text in texts]
    group = Group(first.source, tuple(said), first.columns)
    # Whether the nodes have what `required` asks for, they say themselves.
    sandbox = "auto" if config.reward.sandbox == "required" else config.reward.sandbox
    answers = called_once(functions, group, log, sandbox, config.reward.resources.gpus)
    lines = []
    for key, criterion in functions.items():
        scores = answers[key]
        if isinstance(scores, RewardFailed):
            raise UserError(*_told(key, criterion, scores, texts, first.row))
        values = ", ".join(
            f"{_cut(text)!r} -> {'abstains' if score is None else f'{score:.4g}'}"
            for text, score in zip(texts, scores, strict=True)
        )
        lines.append(f"reward {criterion.name}: {values} (row {first.row})")
        messages = config.plays or not isinstance(first.source, str)
        if messages and not is_ours(criterion) and scores[0] == scores[1] is not None:
            lines.append(
                f"{NOTE}reward {criterion.name} gives two completions the same score. They are "
                "lists of messages here: the text of one is completion[-1]['content']"
            )
    return lines


def _told(
    key: str, criterion: RewardCriterion, failed: RewardFailed, texts: Sequence[str], row: int
) -> tuple[str, str]:
    """What a failed trial says: its first line, and those below."""
    longer = f"raise {key}.timeout_s; " if failed.reason is RewardFailure.TIMEOUT else ""
    reason, frames = why(criterion, failed)
    return f"{key}: {reason}", (
        f"{frames}It was called with row {row} and the completions "
        f"{list(map(_cut, texts))} before anything starts; mend it and try it with "
        f"`aligntune rewards try`. {longer}"
        f"{key}.try_first=false leaves this call out."
    )


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else f"{text[: TEXT_CHARACTERS - 3]}..."
