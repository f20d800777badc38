"""Tokens of texts that a model is taught, and which of them are trained; the same on every worker.

Three forms are read: messages (ShareGPT's too), a prompt with its completion, and plain text.
Answers are marked by the chat template's own `{% generation %}`, or by the form of it that TRL
knows; what follows a prompt needs no marks.

Invariant: what is shown of a row is what the trainer gets: ids, and labels that are the token where
it is trained and `MASKED` where it is not. A row's first token is never trained, for nothing comes
before it; so the tokens that are trained are those that a loss is of.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from actors.messages import Messages
from actors.models.templates import check_given, fitted
from actors.scoring.model import rendered, tokens_of
from aligntune.data.dropped import RowRules, settle_rows
from aligntune.data.errors import DataError, Reason
from aligntune.data.formats import check_template, uses_template
from aligntune.data.messages import (
    TOOLS,
    check_instructions,
    check_messages,
    check_tools,
    check_unicode,
    check_unseen,
    what_is_lost,
)
from aligntune.data.row_tokens import RowTokens
from aligntune.data.sources import Rows
from aligntune.data.taught_forms import Columns, Completions, form_of

MASKED = -100  # the label of a token that no loss is of
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Taught = dict[str, np.ndarray]  # input_ids and labels, int32, of one row


@dataclass(frozen=True)
class TaughtRows:
    """Every row of a data set as tokens, of whatever length, or with what is wrong with it."""

    rows: Rows
    taught: dict[int, Taught]
    wrong: dict[int, DataError]
    repeating: int  # as in `Dropped`

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens by row."""
        return {row: len(made["input_ids"]) for row, made in self.taught.items()}

    def within(self, max_length: int, rules: RowRules) -> RowTokens:
        """The rows of `max_length` tokens at most. Raises DataError as `TokenisedPairs` does."""
        wrong, kept, cut = dict(self.wrong), dict[int, Taught](), 0
        for row, made in self.taught.items():
            length = len(made["input_ids"])
            if length <= max_length:
                kept[row] = made
                continue
            if rules.long_rows in ("drop", "error"):
                why = f"the row has {length} tokens, and {rules.length_key} is {max_length}"
                wrong[row] = DataError(why, Reason.TOO_LONG)
                continue
            part = (
                slice(max_length) if rules.long_rows == "keep_start" else slice(-max_length, None)
            )
            ids, labels = made["input_ids"][part], _first_masked(made["labels"][part])
            if (labels == MASKED).all():
                why = f"cut to {rules.length_key}={max_length}, nothing that is trained is left"
                wrong[row] = DataError(why, Reason.EMPTY)
                continue
            kept[row] = {"input_ids": ids, "labels": labels}
            cut += 1
        dropped = settle_rows(self.rows, wrong, rules, cut=cut, repeating=self.repeating)
        columns = {name: [made[name] for made in kept.values()] for name in ("input_ids", "labels")}
        every = [*self.lengths.values()]
        return RowTokens(columns, dropped, max(every), [*kept], every, [*kept])


def packed(tokens: RowTokens, max_length: int) -> RowTokens:
    """The rows side by side in sequences of `max_length` tokens at most, none of them cut, by TRL's
    best fit decreasing; `seq_lengths` has the tokens of each row of a sequence."""
    import datasets
    import pyarrow
    from datasets.table import InMemoryTable
    from trl.data_utils import pack_dataset

    silent = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset(InMemoryTable(pyarrow.table(tokens.columns)))
        found = pack_dataset(table, max_length, "bfd", {"keep_in_memory": True})
    finally:
        if not silent:
            datasets.enable_progress_bars()
    names = ("input_ids", "labels", "seq_lengths")
    return tokens.with_columns({name: found.data.column(name) for name in names})


def tokenise_taught(
    rows: Rows,
    tokenizer: Any,
    *,
    columns: Columns,
    loss_on: Literal["answers", "all"] | None,
    apply_chat_template: bool,
    system_prompt: str | None = None,
) -> TaughtRows:
    """Every row of a data set, tokenised.

    Args:
        loss_on: what is trained; None: the answers, of plain text all of it.

    Raises:
        DataError: no such columns, a template that does not say which tokens are answers, or a
            system prompt without a template.
    """
    check_template(tokenizer, system_prompt, apply_chat_template)
    read = _Reader(rows, tokenizer, columns, loss_on, apply_chat_template, system_prompt)
    taught: dict[int, Taught] = {}
    wrong: dict[int, DataError] = {}
    for row in range(len(rows)):
        try:
            ids, trained = read(row)
            labels = _first_masked(np.where(trained, ids, MASKED).astype(np.int32))
            if (labels == MASKED).all():
                raise DataError("no token of it is trained", Reason.EMPTY)
            taught[row] = {"input_ids": ids, "labels": labels}
        except NoMarks:  # no single row's fault
            raise
        except DataError as error:
            wrong[row] = error
        except ValueError as error:
            wrong[row] = DataError(str(error))
    return TaughtRows(rows, taught, wrong, read.repeating)


def _first_masked(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[:1] = MASKED
    return labels


class _Reader:
    """Ids of a row, and which are trained (bool), both [tokens]."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        columns: Columns,
        loss_on: Literal["answers", "all"] | None,
        apply_chat_template: bool,
        system_prompt: str | None,
    ) -> None:
        self._tokenizer, self._system = tokenizer, system_prompt
        self._template = uses_template(tokenizer, apply_chat_template)
        self._rows = rows
        self.form, self._column = form_of(rows, columns)
        if self.form == "text" and system_prompt is not None:
            raise DataError(
                f"{rows.origin}: data.system_prompt has no place in column {self._column!r}, which "
                "is plain text; remove it and write it into the text, or give messages"
            )
        if self.form == "text" and loss_on == "answers":
            raise DataError(
                f"{rows.origin}: algorithm.loss_on is answers, and column {self._column!r} is text "
                "that does not say which they are; give messages, or a prompt and a completion"
            )
        if self.form == "messages" and not self._template:
            raise DataError(
                f"{rows.origin}: column {self._column!r} holds messages, but no chat template is "
                "in use; use a model that has one with data.apply_chat_template: true, or give text"
            )
        self._completions = Completions(rows, columns) if self.form == "completion" else None
        asked = [columns.prompt] if self.form == "completion" else []
        self._said = [*asked, self._column]
        self._all = loss_on == "all"
        self._marked: str | None = None

    @property
    def repeating(self) -> int:
        """Of the rows that were read, as in `Dropped`."""
        return self._completions.repeating if self._completions is not None else 0

    def __call__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Raises DataError, or ValueError where the template refuses the row."""
        values = self._rows[row]
        check_unseen(values, *(values[column] for column in self._said))
        if self.form == "text":
            return self._text(values[self._column])
        tools = check_tools(values.get(TOOLS))
        if self._completions is None:
            value = values[self._column]
            if not isinstance(value, list):
                raise DataError(f"{self._column} is a {type(value).__name__}; give messages")
            return self._conversation(check_messages(value, "the conversation"), 0, tools)
        asked, said = self._completions.parts(row, values)
        if not self._template:
            return self._plain(asked, said, tools)
        if isinstance(asked, str) or isinstance(said, str):
            asked = [{"role": "user", "content": asked}]
            said = [{"role": "assistant", "content": said}]
        return self._conversation([*asked, *said], len(asked), tools)

    def _text(self, text: Any) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(text, str):
            raise DataError(f"{self._column} is a {type(text).__name__}; give a string")
        if not text.strip():
            raise DataError("the text is empty", Reason.EMPTY)
        check_unicode(text, "the text")
        ids = self._ids(self._ended(text), special=True)
        return ids, np.ones(len(ids), dtype=bool)

    def _plain(
        self, prompt: Any, completion: Any, tools: Sequence[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(prompt, str) or not isinstance(completion, str) or tools:
            raise DataError(
                "the row has messages or tools, but no chat template is in use; use a model that "
                "has one with data.apply_chat_template: true, or give strings"
            )
        check_unicode(prompt + completion, "the row")
        ids = self._ids(self._ended(prompt + completion), special=True)
        return ids, self._after(self._ids(prompt, special=True), ids)

    def _conversation(
        self, messages: Messages, asked: int, tools: Sequence[dict[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`asked` messages are the prompt; of a conversation that is all taught, none."""
        if not any(message["role"] == "assistant" for message in messages[asked:]):
            raise DataError("nothing is answered: no message is the assistant's", Reason.EMPTY)
        if self._system is not None:
            if messages[0]["role"] in ("system", "developer"):
                raise DataError(
                    "the row has a system message and data.system_prompt is set too; remove one"
                )
            messages = [{"role": "system", "content": self._system}, *messages]
            asked = asked and asked + 1  # alone it is no prompt, which many templates refuse
        alone = asked and all(message["role"] == "assistant" for message in messages[asked:])
        marked = self._template_with_marks() if not (self._all or alone) else None
        options: dict[str, Any] = {"tools": [*tools] or None, "chat_template": marked}
        write = partial(rendered, self._tokenizer, tools=options["tools"], chat_template=marked)
        text = write(messages)
        if lost := what_is_lost(text, messages if self._all else messages[asked:]):
            cure = "use a model whose template keeps it, or give text"
            if alone and self._kept_where_marked(messages, options):
                cure = "give the same rows as messages, whose training template keeps it"
            raise DataError(
                f"the chat template leaves {lost} out of an answer; {cure}", Reason.NOT_WHOLE
            )
        check_instructions(text, messages, write)
        if tools and text == rendered(self._tokenizer, messages, chat_template=marked):
            raise DataError(
                "the chat template leaves out the row's tools; use a model whose template carries "
                "them, or remove column 'tools'",
                Reason.NOT_WHOLE,
            )
        check_unicode(text, "the row")
        if marked is not None:
            found = self._tokenizer.apply_chat_template(
                fitted(self._tokenizer, messages, marked),
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},  # a row over the limit is told by us
                **options,
            )
            ids = np.asarray(found["input_ids"], dtype=np.int32)
            trained = np.asarray(found["assistant_masks"], dtype=bool)
        else:
            ids = self._ids(text, special=False)
            trained = np.ones(len(ids), dtype=bool)
        if asked and not self._all:
            prompt = write(messages[:asked], add_generation_prompt=True)
            trained = trained & self._after(self._ids(prompt, special=False), ids)
        return ids, trained

    def _kept_where_marked(self, messages: Messages, options: dict[str, Any]) -> bool:
        """Whether the template that marks answers renders all of them whole."""
        try:
            options = {**options, "chat_template": self._template_with_marks()}
            text = rendered(self._tokenizer, messages, **options)
        except ValueError:  # it knows no marks, or refuses the row
            return False
        return what_is_lost(text, messages) is None

    def _template_with_marks(self) -> str:
        """The chat template in the form that marks what the assistant writes."""
        if self._marked is None:
            own = str(self._tokenizer.chat_template)
            self._marked = own if MARKS.search(own) else _known_to_trl(self._tokenizer)
        return self._marked

    def _ids(self, text: str, special: bool) -> np.ndarray:
        return np.asarray(tokens_of(self._tokenizer, [text], special)[0], dtype=np.int32)

    def _ended(self, text: str) -> str:
        end: str = self._tokenizer.eos_token
        return text if text.endswith(end) else text + end

    @staticmethod
    def _after(prompt: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` come after what they share with the prompt; a token that spans its end is
        the completion's."""
        shared = min(len(prompt), len(ids))
        same = np.equal(prompt[:shared], ids[:shared])
        return np.arange(len(ids)) >= (shared if same.all() else int(np.argmin(same)))


def _known_to_trl(tokenizer: Any) -> str:
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = str(get_training_chat_template(tokenizer))
    except ValueError as error:
        raise NoMarks from error
    try:
        check_given(tokenizer, template)
    except ValueError as error:
        raise NoMarks(f"model.chat_template_kwargs: {error}") from error
    return template


class NoMarks(DataError):
    """The chat template does not say which tokens are answers, or not as it was asked to."""

    def __init__(self, why: str | None = None) -> None:
        super().__init__(
            why
            or "the model's chat template does not mark what the assistant writes "
            "({% generation %}), and TRL knows no form of it that does: mark it, give columns "
            "prompt and completion, or set algorithm.loss_on: all"
        )
