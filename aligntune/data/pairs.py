"""Preference pairs from the rows of a data set: prompt, chosen and rejected, checked one by one.

Three forms are read. Explicit: columns prompt, chosen and rejected, strings or messages; the sides
may repeat the prompt. Implicit: chosen and rejected begin with the same messages or the same text,
which is the prompt. Transcripts: strings of `Human: ... \\n\\nAssistant: ...` turns, perhaps with a
system text before them, whose prompt reaches up to and including the last Assistant marker the two
share.

Invariant: nothing is lost. Prompt and completion, joined again, are what the row had on each side,
a prompt that a side repeats counted once and the line ends of a transcript brought to one form.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from actors.messages import Messages
from actors.transcript import Transcript
from aligntune.data.errors import DataError, Reason
from aligntune.data.messages import CONVERSATIONS, TOOLS, check_messages, check_tools, check_unseen
from aligntune.data.sources import Rows, require_column

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"  # the columns' names by default
MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
LINE_MARKER = re.compile(r"\n+(?=(?:Human|Assistant):)")
SPEAKER = {"Human": "user", "Assistant": "assistant"}
ASKING = ("system", "developer", "user")  # roles that ask, and do not answer


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse completion, all strings or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    transcript: bool = False  # strings of Human and Assistant turns
    split: bool = field(default=False, compare=False)  # the sides have no prompt of their own
    tools: tuple[dict[str, Any], ...] = ()  # schemas of what the answers may call

    def as_messages(self) -> Pair:
        """The pair as messages: a transcript turn by turn, without the blanks around each turn;
        another string as what one user asks and the assistant answers."""
        if not isinstance(self.prompt, str):
            return self
        if not self.transcript:
            return Pair(
                [{"role": "user", "content": self.prompt}],
                [{"role": "assistant", "content": self.chosen}],
                [{"role": "assistant", "content": self.rejected}],
                tools=self.tools,
            )
        whole = [turns(self.prompt + str(side)) for side in (self.chosen, self.rejected)]
        asked = len(turns(self.prompt)) - 1  # the last marker opens the completion
        chosen, rejected = whole
        return Pair(chosen[:asked], chosen[asked:], rejected[asked:], tools=self.tools)

    def both_forms(self, blanks: bool) -> Transcript | None:
        """The prompt of a transcript as messages and as text, None of another pair. With `blanks`
        the text ends with those that the answer begins with, for completions that have none."""
        if not self.transcript:
            return None
        prompt, chosen = str(self.prompt), str(self.chosen)
        between = chosen[: len(chosen) - len(chosen.lstrip())] if blanks else ""
        return Transcript(turns(prompt)[:-1], prompt + between)  # the last marker opens the answer


def turns(transcript: str) -> Messages:
    """The turns of a transcript as messages, contents without the blanks around them. What stands
    before the first turn is the system's."""
    before, *parts = MARKER.split(transcript)
    opening = [{"role": "system", "content": before.strip()}] if before.strip() else []
    return opening + [
        {"role": SPEAKER[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


class PairRows:
    """The pairs of a data set, one by one."""

    def __init__(
        self,
        rows: Rows,
        *,
        prompt_column: str = PROMPT,
        chosen_column: str = CHOSEN,
        rejected_column: str = REJECTED,
    ) -> None:
        """Raises DataError for columns that are not there."""
        if chosen_column not in rows.columns and rejected_column not in rows.columns:
            raise DataError(
                f"{rows.origin}: has no columns {chosen_column!r} and {rejected_column!r} "
                "(data.chosen_column, data.rejected_column), so it holds no preference pairs; its "
                f"columns are {', '.join(rows.columns)}"
            )
        require_column(rows, chosen_column, "data.chosen_column")
        require_column(rows, rejected_column, "data.rejected_column")
        if prompt_column != PROMPT:
            require_column(rows, prompt_column, "data.prompt_column")
        elif PROMPT not in rows.columns and CONVERSATIONS in rows.columns:
            prompt_column = CONVERSATIONS
        self.columns = (prompt_column, chosen_column, rejected_column)
        self._rows = rows
        self.repeating = 0  # pairs that were given without the prompt that both sides repeat
        self._ends: list[int] = getattr(rows, "ends", [len(rows)])
        self._repeat = [
            prompt_column in rows.columns and self._most_repeat_the_prompt(range(start, end))
            for start, end in pairwise([0, *self._ends])
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def pair(self, row: int) -> Pair:
        """The pair of a row. Raises DataError, with a reason, where it has none."""
        pair = self._as_written(row)
        repeat = self._repeat[bisect_right(self._ends, row)]
        if not repeat or not isinstance(pair.prompt, str) or pair.split:
            return pair
        if _repeats(pair.prompt, pair.chosen, pair.rejected) < 2:
            raise DataError(
                "most rows repeat the prompt in front of both sides, and this one does not"
            )
        cut = len(pair.prompt)
        pair = _checked(replace(pair, chosen=pair.chosen[cut:], rejected=pair.rejected[cut:]))
        self.repeating += 1
        return pair

    def take(self, row: int, columns: dict[str, Any]) -> Pair:
        """The pair of a row whose `columns` these are: there its answers, as rewards get them, take
        the place of prompt and sides. Raises DataError as `pair` does."""
        pair = self.pair(row)
        for column in self.columns:
            columns.pop(column, None)
        blanks = pair.transcript
        for name, side in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
            columns[name] = side.strip() if blanks and isinstance(side, str) else side
        return pair

    def _as_written(self, row: int) -> Pair:
        values = self._rows[row]
        said = [values.get(column) for column in self.columns]
        check_unseen(values, *said)
        pair = to_pair(*said)
        tools = check_tools(values.get(TOOLS))
        return replace(pair, tools=tuple(tools)) if tools else pair

    def _most_repeat_the_prompt(self, rows: range) -> bool:
        """Whether most pairs of strings of a source have the prompt in front of their sides.

        Of one row it cannot be told, for an answer may begin with the words of the question, as a
        greeting does; of a column it can.
        """
        plain = repeating = 0
        for row in rows:
            try:
                pair = self._as_written(row)
            except DataError:
                continue  # told where the row is used
            if isinstance(pair.prompt, str) and not pair.split:
                plain += 1
                repeating += _repeats(pair.prompt, pair.chosen, pair.rejected) == 2
        return 2 * repeating > plain


def to_pair(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    """The pair of one row; `prompt` is None where the row has none.

    Raises:
        DataError: a side that is missing, empty, of another type than the other, or equal to it;
            sides that do not share the prompt.
    """
    # ShareGPT's answers are one message each.
    chosen, rejected = ([side] if isinstance(side, dict) else side for side in (chosen, rejected))
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side is None:
            raise DataError(f"{name} is missing or null", Reason.EMPTY)
        if not isinstance(side, str | list):
            raise DataError(f"{name} is a {type(side).__name__}; give a string or messages")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("one side is a string and the other messages; give both in one form")
    if isinstance(chosen, list):
        pair = _of_messages(
            prompt, check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
        )
    else:
        pair = _of_text(*_lines_alike(prompt, chosen, rejected))
        if not pair.transcript:
            pair = _of_text(prompt, chosen, rejected)
    return _checked(pair)


def _lines_alike(prompt: Any, chosen: str, rejected: str) -> tuple[Any, str, str]:
    """The texts with the line ends of a transcript: "\\n", and an empty line before each turn.

    Single line ends part the turns only where no answer has an empty line before it: text that a
    speaker wrote may hold lines that look like turns.
    """
    ends = [
        re.sub(r"\r\n?", "\n", text) if isinstance(text, str) else text
        for text in (prompt, chosen, rejected)
    ]
    texts = [text for text in ends if isinstance(text, str)]
    if not any("\n\nAssistant:" in text.lstrip() for text in texts):
        ends = [LINE_MARKER.sub("\n\n", t) if isinstance(t, str) else t for t in ends]
    return ends[0], str(ends[1]), str(ends[2])


def _of_text(prompt: Any, chosen: str, rejected: str) -> Pair:
    if prompt is not None:
        return _of_strings(prompt, chosen, rejected)
    if _is_transcript(chosen) or _is_transcript(rejected):
        return split_transcripts(chosen, rejected)
    return _of_shared_text(chosen, rejected)


def _checked(pair: Pair) -> Pair:
    """`pair`, where none of its parts is empty and the sides differ. Raises DataError."""
    if _empty(pair.prompt):
        raise DataError("the prompt is empty", Reason.EMPTY)
    for name, said in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if _empty(said):
            raise DataError(f"{name} is empty: nothing follows the prompt", Reason.EMPTY)
    if pair.chosen == pair.rejected:
        raise DataError("chosen and rejected are equal, which prefers neither", Reason.EQUAL)
    return pair


def split_transcripts(chosen: str, rejected: str) -> Pair:
    """Two transcripts as prompt and completions.

    Raises:
        DataError: they share no turn up to an Assistant marker.
    """
    shared = in_common(chosen, rejected)
    markers = [m for m in MARKER.finditer(chosen) if m[1] == "Assistant" and m.end() <= shared]
    if not markers:
        raise DataError(
            "chosen and rejected share no text up to an '\\n\\nAssistant:' marker: their prompts "
            "differ"
        )
    end = markers[-1].end()
    if len(turns(chosen[:end])) < 2:
        raise DataError("the prompt is empty: no turn is before the Assistant's", Reason.EMPTY)
    return Pair(chosen[:end], chosen[end:], rejected[end:], transcript=True, split=True)


def _of_messages(prompt: Any, chosen: Messages, rejected: Messages) -> Pair:
    """Messages with the prompt in a column, in front of both sides, or both."""
    if isinstance(prompt, list):
        asked = check_messages(prompt, "prompt")
        cut = len(asked) if _repeat_both(asked, chosen, rejected) else 0
        for name, side in (("chosen", chosen[cut:]), ("rejected", rejected[cut:])):
            if side and side[0]["role"] in ASKING:
                raise DataError(
                    f"{name} opens with a {side[0]['role']} message, and the prompt column holds "
                    "the prompt; give the answers alone, or the same prompt in front of both"
                )
        return Pair(asked, chosen[cut:], rejected[cut:])
    openers = {chosen[0]["role"], rejected[0]["role"]}
    if isinstance(prompt, str) and openers == {"assistant"}:
        return Pair([{"role": "user", "content": prompt}], chosen, rejected)
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"the prompt is a {type(prompt).__name__}; give a string or messages")
    cut = in_common(chosen, rejected)
    while cut and chosen[cut - 1]["role"] == "assistant":
        cut -= 1  # an answer the two share is no question
    if not cut:
        raise DataError("chosen and rejected begin with different messages: their prompts differ")
    if (
        prompt is not None
        and chosen[cut - 1].get("content") != prompt
        and (chosen[0].get("content") != prompt)
    ):
        raise DataError("the prompt column is not what chosen and rejected begin with")
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:])


def _of_strings(prompt: Any, chosen: str, rejected: str) -> Pair:
    if isinstance(prompt, list):
        return Pair(
            check_messages(prompt, "prompt"),
            [{"role": "assistant", "content": chosen}] if chosen.strip() else [],
            [{"role": "assistant", "content": rejected}] if rejected.strip() else [],
        )
    if not isinstance(prompt, str):
        raise DataError(f"the prompt is a {type(prompt).__name__}; give a string or messages")
    if _ends_at_assistant(prompt):
        cut = len(prompt) if _repeat_both(prompt, chosen, rejected) else 0
        return Pair(prompt, chosen[cut:], rejected[cut:], transcript=True, split=True)
    openers = [MARKER.match(side) for side in (chosen, rejected)]
    if all(opener and opener[1] == "Human" for opener in openers):
        return _of_text_and_transcripts(prompt, chosen, rejected)
    shared = openers[0][0] if openers[0] else ""
    if MARKER.search(prompt) and shared.endswith("Assistant:") and rejected.startswith(shared):
        cut = len(shared)
        return Pair(prompt + shared, chosen[cut:], rejected[cut:], transcript=True, split=True)
    return Pair(prompt, chosen, rejected)


def _of_text_and_transcripts(prompt: str, chosen: str, rejected: str) -> Pair:
    """Transcripts whose question stands in the prompt column too."""
    pair = split_transcripts(chosen, rejected)
    said = turns(str(pair.prompt))
    whole = str(pair.prompt).startswith(prompt)  # a transcript itself
    if not whole and prompt.strip() not in (said[0]["content"], said[-2]["content"]):
        raise DataError("the prompt column is not what chosen and rejected begin with")
    return pair


def _repeats(prompt: Any, chosen: Any, rejected: Any) -> int:
    """How many of the two sides begin with the prompt."""
    return sum(side[: len(prompt)] == prompt for side in (chosen, rejected))


def _repeat_both(prompt: Any, chosen: Any, rejected: Any) -> bool:
    """Whether the sides begin with the prompt. Raises DataError where only one does."""
    found = _repeats(prompt, chosen, rejected)
    if found == 1:
        raise DataError("one side repeats the prompt and the other does not; give both in one form")
    return found == 2


def _of_shared_text(chosen: str, rejected: str) -> Pair:
    """The prompt is the text the two share, back to the end of a word."""
    shared = in_common(chosen, rejected)
    words = [match.start() for match in re.finditer(r"\s", chosen[: shared + 1])]
    cut = words[-1] if words else 0
    if not chosen[:cut].strip():
        raise DataError("there is no prompt column, and chosen and rejected begin differently")
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:], split=True)


def _is_transcript(text: str) -> bool:
    """Whether a text opens with a turn, or has a question and an answer after some other text."""
    if MARKER.match(text):
        return True
    speakers = [marker[1] for marker in MARKER.finditer(text)]
    return "Human" in speakers and "Assistant" in speakers[speakers.index("Human") :]


def _ends_at_assistant(prompt: str) -> bool:
    """Whether a prompt is a transcript up to the marker of its answer, with or without a blank."""
    markers = list(MARKER.finditer(prompt))
    return (
        bool(markers)
        and markers[-1][1] == "Assistant"
        and not prompt[markers[-1].end() :].strip()
        and len(turns(prompt)) > 1
    )


def in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items the two begin with in common."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _empty(side: str | Messages) -> bool:
    if isinstance(side, str):
        return not side.strip()
    return not any(m.get("content", "").strip() or m.get("tool_calls") for m in side)
