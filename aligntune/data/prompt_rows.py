"""The prompts of a data set, row by row: checked, rendered and measured once, before any budget.

A row gives its prompt by a column of its own or, where the data are preference pairs, as what
chosen and rejected share; the two answers then are columns for the rewards, `chosen` and
`rejected`, in the form they have in the data (a transcript's as text, without the blanks around).
Where there is no prompt column, ShareGPT's `conversations` is the prompt, and stays a column too,
for the answer it may end in. A row's `tools` reach the chat template and stay a column.

Invariant: a row is in `usable`, with its tokens at the same place of `lengths`, or in `wrong` with
the reason, or repeats the prompt of an earlier one and is counted in `folded`.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from typing import Any

from actors.messages import Messages
from actors.scoring.model import adds_begin, tokens_of
from actors.transcript import Transcript
from aligntune.data.errors import DataError, Reason
from aligntune.data.formats import check_prompt, check_template, render, uses_template
from aligntune.data.messages import CONVERSATIONS, TOOLS, check_tools, check_unseen, is_sharegpt
from aligntune.data.pairs import CHOSEN, PROMPT, REJECTED, PairRows
from aligntune.data.sources import Rows, require_column

BATCH = 1024  # prompts tokenised at once when the data is checked


class PromptRows:
    """Every row of a data set as a prompt. `pairs` says whether they are preference data."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        *,
        prompt_column: str = PROMPT,
        chosen_column: str = CHOSEN,
        rejected_column: str = REJECTED,
        system_prompt: str | None = None,
        apply_chat_template: bool = True,
        fold_duplicates: bool = False,
        environment: bool = False,
    ) -> None:
        """`environment`: rows may lack the prompt, which an environment then makes.

        Raises DataError for what is no single row's fault: a column, or a template.
        """
        check_template(tokenizer, system_prompt, apply_chat_template)
        self.pairs = {chosen_column, rejected_column} <= {*rows.columns}
        if not self.pairs:
            if prompt_column == PROMPT not in rows.columns and CONVERSATIONS in rows.columns:
                prompt_column = CONVERSATIONS
            elif not environment or prompt_column != PROMPT:
                require_column(rows, prompt_column, "data.prompt_column")
        self.rows = rows
        self._sides = (
            PairRows(
                rows,
                prompt_column=prompt_column,
                chosen_column=chosen_column,
                rejected_column=rejected_column,
            )
            if self.pairs
            else None
        )
        self._tokenizer = tokenizer
        self._column = prompt_column
        self._environment = environment
        self._system = system_prompt
        self._wants_template = apply_chat_template
        self._template = uses_template(tokenizer, apply_chat_template)
        self.usable = array("q")  # rows, ascending
        self.lengths = array("q")  # tokens of each of them
        self.wrong: dict[int, DataError] = {}
        self.folded = 0  # rows that repeat the prompt of an earlier one
        self.fingerprint = self._check(fold_duplicates)
        self.repeating = 0 if self._sides is None else self._sides.repeating  # as in `Dropped`

    def _check(self, fold: bool) -> str:
        """Check, render and tokenise every row once; what changes with any usable one."""
        digest = hashlib.blake2b(digest_size=16)
        begins = not self._template and adds_begin(self._tokenizer)
        seen: set[str] = set()
        for first in range(0, len(self.rows), BATCH):
            texts: dict[int, str] = {}
            columns: dict[int, dict[str, Any]] = {}
            for row in range(first, min(first + BATCH, len(self.rows))):
                try:
                    _, text, columns[row] = self.prompt(row)
                except DataError as error:
                    self.wrong[row] = error
                    continue
                if fold and text in seen:
                    self.folded += 1
                    continue
                if fold:
                    seen.add(text)
                texts[row] = text
            for (row, text), ids in zip(texts.items(), self.tokens([*texts.values()]), strict=True):
                if not ids:
                    self.wrong[row] = DataError(
                        "the prompt has no tokens; the tokenizer knows none of its characters",
                        Reason.EMPTY,
                    )
                    continue
                digest.update(f"{text}\0{json.dumps(columns[row], default=_kind)}\0".encode())
                if begins and text.startswith(self._tokenizer.bos_token):
                    digest.update(b"begins once\0")  # earlier versions began it twice
                self.usable.append(row)
                self.lengths.append(len(ids))
        return digest.hexdigest()

    def prompt(self, row: int) -> tuple[str | Messages, str, dict[str, Any]]:
        """The prompt of a row as the data have it, its text, and the other columns.

        Raises: DataError, with a reason, where the row has no usable prompt.
        """
        columns = self.rows[row]
        pairs = self._sides
        if pairs is not None:
            source: Any = self._take(pairs, row, columns)
        elif self._column == CONVERSATIONS:
            source = columns[CONVERSATIONS]
        else:
            source = columns.pop(self._column, None)
        if not self._environment:  # which may show them
            check_unseen(columns, source)
        checked = check_prompt(source, self._environment)
        if not isinstance(source, str | list) or is_sharegpt(source):
            source = checked
        text = render(
            checked,
            self._tokenizer,
            system_prompt=self._system,
            apply_chat_template=self._wants_template,
            tools=check_tools(columns.get(TOOLS)),
        )
        return source, text, columns

    def _take(self, pairs: PairRows, row: int, columns: dict[str, Any]) -> str | Messages:
        """The prompt of a pair; its answers take the place of its sides in `columns`."""
        pair = pairs.take(row, columns)
        return pair.as_messages().prompt if pair.transcript and self._template else pair.prompt

    def is_text(self, row: int) -> bool:
        """Whether the prompt of a usable row is text in the data, as a transcript is too."""
        pairs = self._sides
        asked = self.rows[row].get(self._column) if pairs is None else pairs.pair(row).prompt
        return isinstance(asked, str)

    def transcript(self, row: int) -> Transcript | None:
        """Both forms of a usable row's prompt, where it is a transcript. What a policy with a
        template writes begins without the blanks of a transcript's turn."""
        if self._sides is None:
            return None
        return self._sides.pair(row).both_forms(blanks=self._template)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered prompts. Special tokens are added where no template writes them."""
        return tokens_of(self._tokenizer, texts, special=not self._template)


def _kind(value: object) -> str:
    """What stands for a value that is not JSON's, such as an image, in a fingerprint."""
    return type(value).__name__
