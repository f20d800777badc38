"""Tokens of preference pairs, as TRL's trainers take them; the same on every worker.

Invariant: a reward model's tokens are those of `actors.scoring.model.scored_text`, which reward
actors use too; a DPO pair's are the model's own rendering of prompt and completion, and the prompt
is what its two sides begin with in common, never more than the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from actors.messages import Messages
from actors.scoring.model import rendered, scored_text, tokens_of
from aligntune.data.dropped import RowRules, settle_rows
from aligntune.data.errors import DataError, Reason
from aligntune.data.messages import check_instructions, check_unicode, what_is_lost
from aligntune.data.pairs import CHOSEN, REJECTED, Pair, PairRows, in_common
from aligntune.data.row_tokens import RowTokens
from aligntune.data.sources import Rows

BATCH = 512  # pairs tokenised at once
NO_PLACE_FOR_TOOLS = (
    "the row has tools, but the tokenizer has no chat template to say where they go; use a model "
    "that has one, or remove column 'tools'"
)


@dataclass(frozen=True)
class TokenisedPairs:
    """Every row of a data set as tokens, of whatever length, or with what is wrong with it."""

    rows: Rows
    sides: dict[int, dict[str, np.ndarray]]  # by row: what RowTokens.columns has of a pair, int32
    wrong: dict[int, DataError]
    repeating: int  # as in `Dropped`

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of the prompt and the longer of its answers, by row."""
        return {row: _length(side) for row, side in self.sides.items()}

    def within(self, max_length: int, rules: RowRules) -> RowTokens:
        """The pairs of `max_length` tokens at most.

        Raises:
            DataError: rows that are wrong or longer, where the rules refuse them or they are more
                than may be dropped.
        """
        wrong, kept, cut, lengths = dict(self.wrong), {}, 0, self.lengths
        for row, side in self.sides.items():
            if lengths[row] <= max_length:
                kept[row] = side
            elif rules.long_rows in ("drop", "error"):
                wrong[row] = DataError(
                    f"the pair has {lengths[row]} tokens, and data.max_length is {max_length}",
                    Reason.TOO_LONG,
                )
            elif spoiled := _spoiled_by_a_cut(side, max_length, rules.long_rows):
                wrong[row] = spoiled
            else:
                kept[row] = side
                cut += 1
        dropped = settle_rows(self.rows, wrong, rules, cut=cut, repeating=self.repeating)
        names = next(iter(kept.values()))
        columns = {name: [side[name] for side in kept.values()] for name in names}
        every = [*lengths.values()]
        return RowTokens(columns, dropped, max(every), [*kept], every, [*kept])


def tokenise_pairs(
    rows: Rows,
    tokenizer: Any,
    kind: Literal["dpo", "reward_model"],
    *,
    prompt_column: str,
    chosen_column: str,
    rejected_column: str,
    apply_chat_template: bool,
    system_prompt: str | None = None,
) -> TokenisedPairs:
    """Every pair of a data set, tokenised for a job of `kind`.

    A row is wrong where `to_pair` says so, where it cannot be rendered, and where its sides are
    the same tokens.

    Raises:
        DataError: no such columns, or a system prompt without a template.
    """
    template = apply_chat_template and bool(tokenizer.chat_template)
    if system_prompt is not None and not template:
        raise DataError(
            "data.system_prompt: there is no chat template to say where it goes; write it into the "
            "prompts, or use a model with a template"
        )
    pairs = PairRows(
        rows,
        prompt_column=prompt_column,
        chosen_column=chosen_column,
        rejected_column=rejected_column,
    )
    render = _scored(tokenizer, template)
    if kind == "dpo":
        render = _by_template(tokenizer, system_prompt) if template else _as_text(tokenizer)
    sides: dict[int, dict[str, np.ndarray]] = {}
    wrong: dict[int, DataError] = {}
    for first in range(0, len(pairs), BATCH):
        texts: dict[int, tuple[str, ...]] = {}
        for row in range(first, min(first + BATCH, len(pairs))):
            try:
                made_of = render(pairs.pair(row))
                for part in made_of:
                    check_unicode(part, "the pair")
                texts[row] = made_of
            except DataError as error:
                wrong[row] = error
            except ValueError as error:
                wrong[row] = DataError(str(error))
        every = [text for parts in texts.values() for text in parts]
        ids = iter(tokens_of(tokenizer, every, special=not template))
        for row, parts in texts.items():
            own = [next(ids) for _ in parts]
            made = _dpo_sides(*own) if kind == "dpo" else _reward_sides(*own)
            if made["chosen_ids"] == made["rejected_ids"]:
                wrong[row] = DataError(
                    "the tokenizer makes chosen and rejected the same tokens", Reason.EQUAL
                )
            else:
                sides[row] = {name: np.asarray(ids, np.int32) for name, ids in made.items()}
    return TokenisedPairs(rows, sides, wrong, pairs.repeating)


def _length(side: dict[str, np.ndarray]) -> int:
    longer = max(len(side["chosen_ids"]), len(side["rejected_ids"]))
    return len(side.get("prompt_ids", ())) + longer


def _spoiled_by_a_cut(
    side: dict[str, np.ndarray], max_length: int, long_rows: str
) -> DataError | None:
    """What is wrong with the pair once it is cut; None where it still says something."""
    asked = len(side.get("prompt_ids", ()))
    if long_rows == "keep_start" and asked >= max_length:
        return DataError(f"the prompt alone fills data.max_length={max_length}", Reason.EMPTY)
    if _equal_once_cut(side, asked, max_length, long_rows):
        return DataError(
            f"cut to data.max_length={max_length}, chosen and rejected are the same", Reason.EQUAL
        )
    return None


def _equal_once_cut(
    side: dict[str, np.ndarray], asked: int, max_length: int, long_rows: str
) -> bool:
    """Whether what is left of the two completions is the same."""
    cut = slice(max_length - asked) if long_rows == "keep_start" else slice(-max_length, None)
    return np.array_equal(side["chosen_ids"][cut], side["rejected_ids"][cut])


def _reward_sides(chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def _dpo_sides(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    # A token may span the end of the prompt: it then belongs to the completion.
    asked = min(in_common(prompt, chosen), in_common(prompt, rejected))
    return {
        "prompt_ids": chosen[:asked],
        "chosen_ids": chosen[asked:],
        "rejected_ids": rejected[asked:],
    }


def _scored(tokenizer: Any, template: bool) -> Callable[[Pair], tuple[str, ...]]:
    """Both sides as a reward model reads them."""

    def render(pair: Pair) -> tuple[str, ...]:
        pair = pair.as_messages() if template else pair
        if pair.tools and not tokenizer.chat_template:
            raise ValueError(NO_PLACE_FOR_TOOLS)
        texts = tuple(
            scored_text(tokenizer, pair.prompt, side, template, pair.tools)[0]
            for side in (pair.chosen, pair.rejected)
        )
        if template:
            _check_whole(tokenizer, pair, texts)
        return texts

    return render


def _by_template(tokenizer: Any, system_prompt: str | None) -> Callable[[Pair], tuple[str, ...]]:
    def render(pair: Pair) -> tuple[str, ...]:
        pair = pair.as_messages()
        asked: Messages = list(pair.prompt)  # type: ignore[arg-type]  # messages by now
        if system_prompt is not None:
            if asked[0]["role"] in ("system", "developer"):
                raise ValueError(
                    "a prompt has a system message and data.system_prompt is set too; remove one"
                )
            asked = [{"role": "system", "content": system_prompt}, *asked]
        tools = [*pair.tools] or None
        chosen, rejected = (
            rendered(tokenizer, [*asked, *side], tools=tools)
            for side in (pair.chosen, pair.rejected)
        )
        _check_whole(tokenizer, replace(pair, prompt=asked), (chosen, rejected))
        return rendered(tokenizer, asked, tools=tools, add_generation_prompt=True), chosen, rejected

    return render


def _check_whole(tokenizer: Any, pair: Pair, texts: tuple[str, ...]) -> None:
    """Raise DataError where the template left out what the answers say or call, or the tools.

    What it leaves out of earlier turns, which are the prompt's, is the model's own way with them.
    """
    for name, text, side in zip(
        (CHOSEN, REJECTED), texts, (pair.chosen, pair.rejected), strict=True
    ):
        if lost := what_is_lost(text, list(side)):  # type: ignore[arg-type]  # messages by now
            raise DataError(
                f"the chat template leaves {lost} out of {name}; use a model whose template keeps "
                "it, or give the pairs as strings with data.apply_chat_template: false",
                Reason.NOT_WHOLE,
            )
    whole: Messages = [*pair.prompt, *pair.chosen]
    check_instructions(texts[0], whole, partial(rendered, tokenizer, tools=[*pair.tools] or None))
    if pair.tools and texts[0] == rendered(tokenizer, whole):
        raise DataError(
            "the chat template leaves out the row's tools; use a model whose template carries "
            "them, or remove column 'tools'",
            Reason.NOT_WHOLE,
        )


def _as_text(tokenizer: Any) -> Callable[[Pair], tuple[str, ...]]:
    def render(pair: Pair) -> tuple[str, ...]:
        if not (
            isinstance(pair.prompt, str)
            and isinstance(pair.chosen, str)
            and isinstance(pair.rejected, str)
        ):
            raise ValueError(
                "the pairs are messages, but no chat template is in use; use a model that has one "
                "with data.apply_chat_template: true, or give strings"
            )
        if pair.tools and not tokenizer.chat_template:
            raise ValueError(NO_PLACE_FOR_TOOLS)
        end = tokenizer.eos_token
        sides = (
            side if side.endswith(end) else side + end for side in (pair.chosen, pair.rejected)
        )
        return (pair.prompt, *(pair.prompt + side for side in sides))

    return render
