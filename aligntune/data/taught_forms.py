"""The form of rows that are taught: messages, a prompt with its completion, or plain text.

Invariant: a prompt that its completion repeats is there once, as in preference pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from actors.messages import Messages
from aligntune.data.errors import DataError, Reason
from aligntune.data.messages import CONVERSATIONS, check_messages
from aligntune.data.pairs import ASKING
from aligntune.data.sources import Rows, require_column

Form = Literal["messages", "completion", "text"]


@dataclass(frozen=True)
class Columns:
    """What the columns are called."""

    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"

    def named(self) -> dict[Form, str]:
        """The forms whose columns have other names than the usual ones, with the settings."""
        usual = Columns()
        keys: dict[Form, tuple[str, ...]] = {
            "messages": ("messages",),
            "completion": ("prompt", "completion"),
            "text": ("text",),
        }
        return {
            form: f"data.{other[0]}_column"
            for form, names in keys.items()
            if (other := [name for name in names if getattr(self, name) != getattr(usual, name)])
        }


def form_of(rows: Rows, columns: Columns) -> tuple[Form, str]:
    """The form of the data, and the column that it is named for: the form whose columns the config
    names, else the first that is there of messages, prompt and completion, conversations, text.

    Raises: DataError for two forms that are named, or a column that is not there.
    """
    named, there = columns.named(), {*rows.columns}
    if len(named) > 1:
        keys = list(named.values())
        raise DataError(
            f"{' and '.join(keys)} name columns of several forms, of which one is taught; remove "
            "all but one"
        )
    form = next(iter(named), None)
    if form == "messages" or (form is None and columns.messages in there):
        require_column(rows, columns.messages, "data.messages_column")
        return "messages", columns.messages
    if form == "completion" or (form is None and {columns.prompt, columns.completion} <= there):
        require_column(rows, columns.prompt, "data.prompt_column")
        require_column(rows, columns.completion, "data.completion_column")
        return "completion", columns.completion
    if form is None and CONVERSATIONS in there:
        require_column(rows, CONVERSATIONS, "of ShareGPT")
        return "messages", CONVERSATIONS
    if form == "text" or columns.text in there:
        require_column(rows, columns.text, "data.text_column")
        return "text", columns.text
    raise DataError(
        f"{rows.origin}: has no column {columns.messages!r} or {CONVERSATIONS!r}, nor "
        f"{columns.prompt!r} with {columns.completion!r}, nor {columns.text!r}; it has "
        f"{', '.join(rows.columns)}: name yours in data.messages_column, data.prompt_column and "
        "data.completion_column, or data.text_column"
    )


class Completions:
    """The prompts of a data set with what follows each."""

    def __init__(self, rows: Rows, columns: Columns) -> None:
        self._columns = columns
        self.repeating = 0  # rows that were given without the prompt that they repeat
        self._ends: list[int] = getattr(rows, "ends", [len(rows)])
        self._repeat = [
            self._most_repeat_the_prompt(rows, range(start, end))
            for start, end in pairwise([0, *self._ends])
        ]

    def parts(
        self, row: int, values: Mapping[str, Any]
    ) -> tuple[str, str] | tuple[Messages, Messages]:
        """The prompt of a row and its completion, both strings or both messages.

        Raises: DataError where one is empty or of another type, or they do not go together.
        """
        prompt, completion = values[self._columns.prompt], values[self._columns.completion]
        if isinstance(completion, dict):
            completion = [completion]  # ShareGPT's
        for name, value in (("the prompt", prompt), ("the completion", completion)):
            if value is None or value in ("", []) or (isinstance(value, str) and value.isspace()):
                raise DataError(f"{name} is empty", Reason.EMPTY)
            if not isinstance(value, str | list):
                raise DataError(f"{name} is a {type(value).__name__}; give a string or messages")
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt, self._after(prompt, completion, row)
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return _asked_and_said(prompt, check_messages(completion, "the completion"))

    def _after(self, prompt: str, completion: str, row: int) -> str:
        if not self._repeat[bisect_right(self._ends, row)]:
            return completion
        if not completion.startswith(prompt):
            raise DataError(
                "most rows repeat the prompt in front of the completion, and this one does not"
            )
        if not (said := completion[len(prompt) :]).strip():
            raise DataError("the completion is empty: nothing follows the prompt", Reason.EMPTY)
        self.repeating += 1
        return said

    def _most_repeat_the_prompt(self, rows: Rows, those: range) -> bool:
        """Whether most strings of a source begin with their prompt: of one row it cannot be told,
        for an answer may begin with the words of the question, as a greeting does."""
        plain = repeating = 0
        for row in those:
            values = rows[row]
            prompt, completion = values[self._columns.prompt], values[self._columns.completion]
            if isinstance(prompt, str) and isinstance(completion, str) and prompt.strip():
                plain += 1
                # One that is equal is an answer of its own: nothing would follow the prompt.
                repeating += completion.startswith(prompt) and len(completion) > len(prompt)
        return 2 * repeating > plain


def _asked_and_said(prompt: str | list[Any], said: Messages) -> tuple[Messages, Messages]:
    """The prompt as messages, and those of the completion that follow it."""
    if isinstance(prompt, list):
        asked = check_messages(prompt, "the prompt")
        repeated = said[: len(asked)] == asked
        said = said[len(asked) :] if repeated else said
        if said and said[0]["role"] in ASKING and asked[-1]["role"] == "user":
            raise DataError(
                f"the completion opens with a {said[0]['role']} message, and the prompt ends with "
                "a question; give the answer alone, or the whole prompt in front of it"
            )
    elif said[0]["role"] not in ASKING:
        asked = [{"role": "user", "content": prompt}]
    else:
        at = (n for n, m in enumerate(said) if m["role"] == "user" and m.get("content") == prompt)
        if (question := next(at, None)) is None:
            raise DataError(
                f"the completion opens with a {said[0]['role']} message, and the prompt is none of "
                "its questions; give the answer alone, or the whole prompt in front of it"
            )
        asked, said = said[: question + 1], said[question + 1 :]
    if not said:
        raise DataError("the completion is empty: nothing follows the prompt", Reason.EMPTY)
    return asked, said
