"""Tokens of preference pairs, as TRL's trainers take them; the same on every worker.

Invariant: a reward model's tokens are those of `actors.scoring.model.scored_text`, which reward
actors use too; a DPO pair's are the model's own rendering of prompt and completion, and the prompt
is what its two sides begin with in common, never more than the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from actors.messages import Messages
from actors.scoring.model import rendered, scored_text, tokens_of
from aligntune.data.errors import DataError
from aligntune.data.pairs import Pair, Pairs, bad_rows_message, read_pairs
from aligntune.data.sources import Rows

BATCH = 512  # pairs tokenised at once


@dataclass(frozen=True)
class PairTokens:
    """The usable pairs of a data set, tokenised."""

    columns: dict[str, list[list[int]]]  # TRL's: chosen_ids, rejected_ids and, for DPO, prompt_ids
    rows: int  # of the data set
    bad: dict[int, str]  # rows that were left out, and why
    long: int  # pairs over the limit, dropped or cut
    longest: int  # tokens of the longest pair's longer side

    def __len__(self) -> int:
        return len(self.columns["chosen_ids"])


def pair_tokens(
    rows: Rows,
    tokenizer: Any,
    kind: Literal["dpo", "reward_model"],
    *,
    prompt_column: str,
    chosen_column: str,
    rejected_column: str,
    bad_pairs: Literal["error", "drop"],
    max_length: int,
    long_pairs: Literal["error", "drop", "keep_start", "keep_end"],
    apply_chat_template: bool,
    system_prompt: str | None = None,
) -> PairTokens:
    """Every usable pair of a data set, tokenised for a job of `kind`.

    Raises:
        DataError: as `read_pairs`, and so for rows that cannot be rendered or are equal as tokens;
            pairs over `max_length` under policy `error`; nothing left to train on.
    """
    found = read_pairs(
        rows,
        prompt_column=prompt_column,
        chosen_column=chosen_column,
        rejected_column=rejected_column,
        bad_pairs=bad_pairs,
    )
    template = apply_chat_template and bool(tokenizer.chat_template)
    if system_prompt is not None and not template:
        raise DataError(
            "data.system_prompt: there is no chat template to say where it goes; write it into the "
            "prompts, or use a model with a template"
        )
    render = _scored(tokenizer, template)
    if kind == "dpo":
        render = _by_template(tokenizer, system_prompt) if template else _as_text(tokenizer)
    sides: dict[int, dict[str, list[int]]] = {}
    bad: dict[int, str] = {}
    for first in range(0, len(found.pairs), BATCH):
        texts: dict[int, tuple[str, ...]] = {}
        for position in range(first, min(first + BATCH, len(found.pairs))):
            row = found.rows[position]
            try:
                texts[row] = render(found.pairs[position])
            except ValueError as error:
                bad[row] = str(error)
        every = [text for parts in texts.values() for text in parts]
        ids = iter(tokens_of(tokenizer, every, special=not template))
        for row, parts in texts.items():
            own = [next(ids) for _ in parts]
            sides[row] = _dpo_sides(*own) if kind == "dpo" else _reward_sides(*own)
    return _within(rows, found, bad, sides, max_length, long_pairs, bad_pairs)


def _within(
    rows: Rows,
    found: Pairs,
    bad: dict[int, str],
    sides: dict[int, dict[str, list[int]]],
    max_length: int,
    long_pairs: str,
    bad_pairs: str,
) -> PairTokens:
    """Apply the policies for length and for bad rows; `bad` has those that were not rendered."""
    kept, long, longest = [], 0, 0
    for row, side in sides.items():
        asked = len(side.get("prompt_ids", ()))
        tokens = asked + max(len(side["chosen_ids"]), len(side["rejected_ids"]))
        longest = max(longest, tokens)
        if side["chosen_ids"] == side["rejected_ids"]:
            bad[row] = "the tokenizer makes chosen and rejected the same tokens"
            continue
        if tokens <= max_length:
            kept.append(side)
            continue
        long += 1
        if long_pairs == "error":
            raise DataError(
                f"{rows.where(row)}: the pair has {tokens} tokens and data.max_length is "
                f"{max_length}: raise it, or set data.long_pairs to drop, keep_start or keep_end"
            )
        if long_pairs == "keep_start" and asked >= max_length:
            bad[row] = f"the prompt alone fills data.max_length={max_length}"
        elif long_pairs != "drop" and _equal_once_cut(side, asked, max_length, long_pairs):
            bad[row] = f"cut to data.max_length={max_length}, chosen and rejected are the same"
        elif long_pairs != "drop":
            kept.append(side)
    bad = dict(sorted(bad.items()))
    if bad and bad_pairs == "error":
        raise DataError(bad_rows_message(rows, bad, "set data.bad_pairs: drop to leave them out"))
    if not kept and bad and not long:
        raise DataError(bad_rows_message(rows, found.bad | bad, "none is left to train on"))
    if not kept:
        raise DataError(f"{rows.origin}: no pair is left to train on ({long} too long)")
    columns = {name: [side[name] for side in kept] for name in kept[0]}
    return PairTokens(columns, len(rows), dict(sorted((found.bad | bad).items())), long, longest)


def _equal_once_cut(
    side: dict[str, list[int]], asked: int, max_length: int, long_pairs: str
) -> bool:
    """Whether what is left of the two completions is the same."""
    cut = slice(max_length - asked) if long_pairs == "keep_start" else slice(-max_length, None)
    return side["chosen_ids"][cut] == side["rejected_ids"][cut]


def _reward_sides(chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def _dpo_sides(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    # A token may span the end of the prompt: it then belongs to the completion.
    asked = min(_common(prompt, chosen), _common(prompt, rejected))
    return {
        "prompt_ids": chosen[:asked],
        "chosen_ids": chosen[asked:],
        "rejected_ids": rejected[asked:],
    }


def _scored(tokenizer: Any, template: bool) -> Callable[[Pair], tuple[str, ...]]:
    """Both sides as a reward model reads them."""

    def render(pair: Pair) -> tuple[str, ...]:
        pair = pair.as_messages() if template else pair
        return tuple(
            scored_text(tokenizer, pair.prompt, side, template)[0]
            for side in (pair.chosen, pair.rejected)
        )

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
        return (
            rendered(tokenizer, asked, add_generation_prompt=True),
            rendered(tokenizer, [*asked, *pair.chosen]),
            rendered(tokenizer, [*asked, *pair.rejected]),
        )

    return render


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
        end = tokenizer.eos_token
        sides = (
            side if side.endswith(end) else side + end for side in (pair.chosen, pair.rejected)
        )
        return (pair.prompt, *(pair.prompt + side for side in sides))

    return render


def _common(one: list[int], other: list[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
