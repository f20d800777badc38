"""What the model will see of a data set, as lines of text: rows, tokens, lengths, what is dropped.

Invariant: no character of the data acts on a terminal: what is no character to see is escaped, and
no line is wider than `WIDTH` columns, but for names and messages that are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.cells import cell_len

from aligntune.data.dropped import Dropped
from aligntune.data.mixture import sources_shown
from aligntune.data.prompts import PromptSource
from aligntune.data.row_tokens import RowTokens
from aligntune.data.sources import Rows
from aligntune.data.taught_tokens import MASKED
from aligntune.errors import printable, shown

WIDTH = 80
BINS = 10  # of the histogram, at most
MOST = 200  # tokens of a part; of a longer one the first and the last half of these
INDENT = "    "
LEGEND = "  (tokens are divided by ·, special ones stand in «», a line end is ⏎)"


@dataclass(frozen=True)
class Bound:
    """The setting that bounds a row, in tokens, and what becomes of longer ones."""

    key: str  # of the config tree
    tokens: int
    long_rows: str  # as in RowRules


@dataclass(frozen=True)
class Part:
    """Tokens of a row that are treated alike."""

    name: str
    fate: str  # as in "not trained"
    ids: Sequence[int]


def prompts_shown(
    source: PromptSource, tokenizer: Any, bound: Bound, count: int, reads: Mapping[str, str]
) -> Iterator[str]:
    """The lines for prompts; `reads` says by the name of a reward what columns it gets."""
    yield _origin(source.rows, source.dropped)
    yield from sources_shown(source.rows, source.used)
    yield f"Used: {len(source)} prompts"
    yield ""
    first = source.first(count)
    yield f"The first {len(first)} as the model gets them:"
    yield LEGEND
    for prompt in first:
        yield f"  {printable(source.rows.where(prompt.row))}: {len(prompt.token_ids)} tokens"
        part = Part("prompt", "not trained; what the model answers is", prompt.token_ids.tolist())
        yield from _part(part, tokenizer)
        if prompt.tools:
            names = [str(tool.get("function", tool).get("name")) for tool in prompt.tools]
            yield f"  column tools, in the prompt: {printable(', '.join(names))}"
    yield ""
    yield from _lengths(source.lengths, "prompts", bound)
    yield ""
    yield from _dropped({"train": source.dropped})
    yield ""
    columns = first[0].columns
    yield "Columns that rewards get:"
    yield from (
        f"  {printable(name)} = {printable(shown(value))}" for name, value in columns.items()
    )
    if not columns:
        yield "  none"
    yield from (f"  reward {printable(name)}: {printable(said)}" for name, said in reads.items())


def pairs_shown(
    rows: Rows,
    pairs: RowTokens,
    tokenizer: Any,
    bound: Bound,
    count: int,
    dropped: Mapping[str, Dropped],
    reads: Mapping[str, str],
) -> Iterator[str]:
    """The lines for pairs; `dropped` by what the rows are for, `reads` as in `prompts_shown`."""
    yield _origin(rows, pairs.dropped)
    yield from sources_shown(rows, pairs.kept)
    yield f"Used: {len(pairs)} pairs"
    yield ""
    count = min(count, len(pairs))
    yield f"The first {count} as the model gets them:"
    yield LEGEND
    for index in range(count):
        side = {name: ids[index] for name, ids in pairs.columns.items()}
        yield f"  {printable(rows.where(pairs.rows[index]))}:"
        for part in pair_parts(side, bound):
            yield from _part(part, tokenizer)
    yield ""
    yield from _lengths(pairs.lengths, "pairs (the prompt and the longer side)", bound)
    yield ""
    yield from _dropped(dropped)
    yield ""
    yield "Columns that rewards get:" if reads else "Columns that rewards get: no reward is called"
    yield from (f"  reward {printable(name)}: {printable(said)}" for name, said in reads.items())


def taught_shown(
    rows: Rows,
    taught: RowTokens,
    packs: int | None,
    tokenizer: Any,
    bound: Bound,
    count: int,
    dropped: Mapping[str, Dropped],
) -> Iterator[str]:
    """The lines for what a model is taught; `packs` sequences hold the rows, where packed."""
    yield _origin(rows, taught.dropped)
    yield from sources_shown(rows, taught.kept)
    yield f"Used: {len(taught)} rows" + (
        "" if packs is None else f", packed into {packs} sequences"
    )
    labels = taught.columns["labels"]
    trained = sum(int((np.asarray(row) != MASKED).sum()) for row in labels)
    yield f"Trained: {trained} of {sum(map(len, labels))} tokens"
    yield ""
    count = min(count, len(taught))
    yield f"The first {count} as the model gets them:"
    yield LEGEND
    for index in range(count):
        yield f"  {printable(rows.where(taught.rows[index]))}:"
        for part in taught_parts(taught.columns["input_ids"][index], labels[index]):
            yield from _part(part, tokenizer)
    yield ""
    yield from _lengths(taught.lengths, "rows", bound)
    yield ""
    yield from _dropped(dropped)


def taught_parts(ids: Sequence[int], labels: Sequence[int]) -> list[Part]:
    """What becomes of the tokens of a row that is taught, which are as in `RowTokens.columns`."""
    parts = []
    of_them = zip(np.asarray(ids).tolist(), np.asarray(labels).tolist(), strict=True)
    for is_masked, tokens in groupby(of_them, lambda token: token[1] == MASKED):
        fate = ("given", "masked, not trained") if is_masked else ("taught", "trained")
        parts.append(Part(*fate, [token for token, _ in tokens]))
    return parts


def pair_parts(side: Mapping[str, Sequence[int]], bound: Bound) -> list[Part]:
    """What becomes of the tokens of a pair, which are as in `RowTokens.columns`.

    Of a DPO pair the prompt is masked and the rest trained, cut as TRL's collator cuts it. A reward
    model reads the whole of both sides for one score each.
    """
    side = {name: np.asarray(ids).tolist() for name, ids in side.items()}
    if "prompt_ids" not in side:
        fate = "read whole for one score; trained"
        return [Part(n, fate, side[f"{n}_ids"]) for n in ("chosen", "rejected")]
    prompt = side["prompt_ids"]
    longer = max(len(side["chosen_ids"]), len(side["rejected_ids"]))
    shared = len(prompt) + longer <= bound.tokens
    parts = [Part("prompt", "masked, not trained", prompt)] if shared else []
    for name in ("chosen", "rejected"):
        answer = side[f"{name}_ids"]
        total, asked = len(prompt) + len(answer), len(prompt)
        first = max(0, total - bound.tokens) if bound.long_rows == "keep_end" else 0
        end = min(total, first + bound.tokens)  # of what is kept, from `first` on
        if not shared:
            of_it = f"prompt of {name}"
            parts += [
                Part(of_it, "cut off", prompt[:first]),
                Part(of_it, "masked, not trained", prompt[first:end]),
                Part(of_it, "cut off", prompt[end:]),
            ]
        start, stop = max(0, first - asked), max(0, end - asked)
        parts += [
            Part(name, "cut off", answer[:start]),
            Part(name, "trained", answer[start:stop]),
            Part(name, "cut off", answer[stop:]),
        ]
    return [part for part in parts if part.ids]


def _origin(rows: Rows, dropped: Dropped) -> str:
    parts: Sequence[Rows] = getattr(rows, "parts", ())
    origin = f"{len(parts)} sources" if parts else printable(rows.origin)
    return f"Source: {origin}, {dropped.rows} rows"


def _dropped(dropped: Mapping[str, Dropped]) -> Iterator[str]:
    lines = [f"  {name}: {line}" for name, of in dropped.items() for line in of.lines()]
    yield "Dropped:" if lines else "Dropped: nothing, every row is used whole"
    yield from map(printable, lines)


def _part(part: Part, tokenizer: Any) -> Iterator[str]:
    yield f"  {part.name} ({part.fate}), {len(part.ids)} tokens:"
    if len(part.ids) <= MOST:
        yield from _wrapped(pieces(tokenizer, part.ids))
        return
    half = MOST // 2
    yield from _wrapped(pieces(tokenizer, part.ids[:half]))
    yield f"{INDENT}[{len(part.ids) - MOST} tokens are not shown]"
    yield from _wrapped(pieces(tokenizer, part.ids[-half:]))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text without a control character; a special one in «».

    A piece of a character that takes several tokens is shown as the tokenizer names it.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = []
    for token in ids:
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" in text or not text:
            text = str(tokenizer.convert_ids_to_tokens(token))
        text = "⏎".join(printable(line) for line in text.split("\n"))
        found.append(f"«{text}»" if token in special else text)
    return found


def _wrapped(texts: Iterable[str]) -> Iterator[str]:
    """Tokens on lines of `WIDTH` columns at most; a new one after a line end."""
    line, width, room = "", 0, WIDTH - len(INDENT)
    for text in texts:
        for character in f"{text}·":
            wide = cell_len(character)
            if width + wide > room:
                yield INDENT + line
                line, width = "", 0
            line, width = line + character, width + wide
        if text.endswith("⏎"):
            yield INDENT + line
            line, width = "", 0
    if line:
        yield INDENT + line


def _lengths(lengths: Sequence[int], things: str, bound: Bound) -> Iterator[str]:
    longer = sum(length > bound.tokens for length in lengths)
    yield f"Tokens of {len(lengths)} {things}:"
    yield from histogram(lengths, bound.tokens)
    fate = {
        "drop": "dropped",
        "error": "refused",
        "keep_start": "cut at the end",
        "keep_end": "cut at the start",
    }[bound.long_rows]
    what = f"{longer} {'is' if longer == 1 else 'are'} longer, and {fate}"
    yield f"  {bound.key}={bound.tokens}: {what if longer else 'none is longer'}"


def histogram(lengths: Sequence[int], bound: int) -> list[str]:
    """A bar for each of at most `BINS` ranges of lengths; no line is wider than `WIDTH`.

    No range has lengths on both sides of `bound`; those above are marked.
    """
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    step = -(-(high - low + 1) // BINS)
    starts = sorted({*range(low, high + 1, step), *([bound + 1] if low <= bound < high else [])})
    ends = [*(start - 1 for start in starts[1:]), min(high, starts[-1] + step - 1)]
    counts = [0] * len(starts)
    for length in lengths:
        counts[bisect_left(ends, length)] += 1
    digits, wide = len(str(high)), len(str(max(counts)))
    room = WIDTH - (2 + digits + 1 + digits + 2) - (2 + wide + len("  too long"))
    lines = []
    for start, end, count in zip(starts, ends, counts, strict=True):
        bar = "█" * (max(1, count * room // max(counts)) if count else 0)
        over = "  too long" if start > bound else ""
        lines.append(f"  {start:>{digits}}-{end:<{digits}}  {bar:{room}}  {count:>{wide}}{over}")
    return lines
