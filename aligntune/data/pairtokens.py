"""Tokens of preference pairs, as TRL's trainers take them; the same on every worker.

Invariant: a reward model's tokens are those of `actors.reward_model.scored_text`, which reward
actors use too; a DPO pair's are the model's own rendering of prompt and completion, and the prompt
is what its two sides begin with in common, never more than the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actors.messages import Messages
from actors.reward_model import scored_ids
from aligntune.data.errors import DataError
from aligntune.data.preference import Pair, Pairs, bad_rows_message, read_pairs
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
        DataError: as `read_pairs`; messages without a chat template; pairs over `max_length` under
            policy `error`; nothing left to train on.
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
    make = _reward_tokens if kind == "reward_model" else _dpo_tokens
    sides: list[dict[str, list[int]]] = []
    for first in range(0, len(found.pairs), BATCH):
        batch = found.pairs[first : first + BATCH]
        try:
            sides += make(batch, tokenizer, template, system_prompt)
        except ValueError as error:
            raise DataError(f"{rows.origin}: {error}") from error
    return _within(rows, found, sides, max_length, long_pairs, bad_pairs)


def _within(
    rows: Rows,
    found: Pairs,
    sides: list[dict[str, list[int]]],
    max_length: int,
    long_pairs: str,
    bad_pairs: str,
) -> PairTokens:
    """Apply the length policy."""
    kept, bad, long, longest = [], dict(found.bad), 0, 0
    for row, side in zip(found.rows, sides, strict=True):
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
        elif long_pairs != "drop":
            kept.append(side)
    if len(bad) > len(found.bad) and bad_pairs == "error":
        new = {row: why for row, why in bad.items() if row not in found.bad}
        raise DataError(bad_rows_message(rows, new, "set data.bad_pairs: drop to leave them out"))
    if not kept:
        raise DataError(f"{rows.origin}: no pair is left to train on ({long} too long)")
    columns = {name: [side[name] for side in kept] for name in kept[0]}
    return PairTokens(columns, len(rows), bad, long, longest)


def _reward_tokens(
    pairs: Sequence[Pair], tokenizer: Any, template: bool, system_prompt: str | None
) -> list[dict[str, list[int]]]:
    rendered = [pair.as_messages() if template else pair for pair in pairs]
    chosen = scored_ids(tokenizer, [(p.prompt, p.chosen) for p in rendered], template)
    rejected = scored_ids(tokenizer, [(p.prompt, p.rejected) for p in rendered], template)
    return [
        {"chosen_ids": better, "rejected_ids": worse}
        for better, worse in zip(chosen, rejected, strict=True)
    ]


def _dpo_tokens(
    pairs: Sequence[Pair], tokenizer: Any, template: bool, system_prompt: str | None
) -> list[dict[str, list[int]]]:
    render = _by_template(tokenizer, system_prompt) if template else _as_text(tokenizer)
    texts = [text for pair in pairs for text in render(pair)]
    ids: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=not template,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    tokens = []
    for prompt, chosen, rejected in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
        # A token may span the end of the prompt: it then belongs to the completion.
        asked = min(_common(prompt, chosen), _common(prompt, rejected))
        tokens.append(
            {
                "prompt_ids": chosen[:asked],
                "chosen_ids": chosen[asked:],
                "rejected_ids": rejected[asked:],
            }
        )
    return tokens


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
        template = tokenizer.apply_chat_template
        return (
            template(asked, tokenize=False, add_generation_prompt=True),
            template([*asked, *pair.chosen], tokenize=False),
            template([*asked, *pair.rejected], tokenize=False),
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
