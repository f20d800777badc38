"""Prompts in a seeded order that is a pure function of one integer.

Position p counts prompts since the beginning of training. Epoch p // n goes through the data in an
order drawn from (seed, epoch) alone, so a run that resumes at p continues with exactly the prompts
it would have seen. Without weights that is a permutation; with weights see `mixture`.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from actors.messages import Prompt
from aligntune.data.dropped import RowRules, settle_rows
from aligntune.data.errors import DataError, Reason
from aligntune.data.messages import TOOLS, check_tools
from aligntune.data.mixture import epoch_order, usable_sizes
from aligntune.data.prompt_rows import PromptRows
from aligntune.data.sources import Rows
from aligntune.data.spec import DataSpec

CACHED = 4096  # tokenised prompts kept, so that epochs over small data tokenise once


class PromptSource:
    """The usable prompts of a data set within a budget, tokenised when they are asked for.

    `dropped` says what became of the other rows, `longest` is the length in tokens of the longest
    prompt that was read. `fingerprint` changes with the prompts that are used, their columns, their
    order or their rendering.
    """

    def __init__(
        self,
        prompts: PromptRows,
        tokenizer: Any,
        rules: RowRules,
        *,
        max_prompt_length: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Raises: DataError where rows are refused, or more of them than may be dropped."""
        self._rows = prompts
        self._tokenizer = tokenizer
        self._limit = max_prompt_length
        self._seed = seed
        self._shuffle = shuffle
        self.longest = max(prompts.lengths, default=0)
        wrong, kept, cut = dict(prompts.wrong), array("q"), 0
        for row, length in zip(prompts.usable, prompts.lengths, strict=True):
            if length <= max_prompt_length:
                kept.append(row)
            elif rules.long_rows == "keep_end":
                kept.append(row)
                cut += 1
            else:
                wrong[row] = DataError(
                    f"the prompt has {length} tokens, and {rules.length_key} is "
                    f"{max_prompt_length}",
                    Reason.TOO_LONG,
                )
        self.dropped = settle_rows(
            prompts.rows,
            wrong,
            rules,
            cut=cut,
            folded=prompts.folded,
            repeating=prompts.repeating,
        )
        self._kept = np.asarray(kept, dtype=np.int64)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{seed} {shuffle} {max_prompt_length} {prompts.fingerprint}".encode())
        digest.update(self._kept.tobytes())
        self._sizes = usable_sizes(prompts.rows, self._kept)
        self._weights: list[float] = getattr(prompts.rows, "weights", [])
        if self._weights:
            digest.update(f"{self._sizes} {self._weights}".encode())
        self.fingerprint = digest.hexdigest()
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._prompt = lru_cache(maxsize=CACHED)(self._make)

    def __len__(self) -> int:
        """Prompts per epoch."""
        return len(self._kept)

    @property
    def rows(self) -> Rows:
        """The data set that the prompts are of."""
        return self._rows.rows

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of every prompt that was read, of whatever length."""
        return self._rows.lengths

    def prompt_at(self, position: int) -> Prompt:
        """The prompt at `position`, counted from 0 since the beginning of training."""
        if position < 0:
            raise ValueError(f"position {position}: positions count from 0")
        epoch, index = divmod(position, len(self))
        return self._prompt(int(self._kept[self._order(epoch)[index]]))

    @property
    def used(self) -> np.ndarray:
        """The rows that are used, ascending."""
        return self._kept

    def column(self, name: str) -> Iterator[tuple[int, Any]]:
        """(row, value) of a column in every row that is used; None where a row lacks it."""
        return ((int(row), self._rows.rows[int(row)].get(name)) for row in self._kept)

    def first_messages(self) -> int | None:
        """The first row whose prompt is messages in the data; None where all are text."""
        return next((int(row) for row in self._kept if not self._rows.is_text(int(row))), None)

    def first(self, count: int) -> list[Prompt]:
        """The first `count` prompts in the order of the data, or all where they are fewer."""
        return [self._prompt(int(row)) for row in self._kept[:count]]

    def positions_in(self, epochs: float) -> int:
        """How many prompts `epochs` passes over the data are, rounded up."""
        positions = epochs * len(self)
        return math.ceil(positions) if math.isfinite(positions) else sys.maxsize

    def epoch(self, epoch: int = 0) -> Iterator[Prompt]:
        """The prompts of one pass, in its order."""
        first = epoch * len(self)
        return (self.prompt_at(position) for position in range(first, first + len(self)))

    def _permutation(self, epoch: int) -> np.ndarray:
        return epoch_order(epoch, self._seed, self._sizes, self._weights, self._shuffle)

    def _make(self, row: int) -> Prompt:
        source, text, columns = self._rows.prompt(row)
        (ids,) = self._rows.tokens([text])
        if len(ids) > self._limit:
            ids = self._shortened(ids)
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
        tools = tuple(check_tools(columns.get(TOOLS)))
        transcript = self._rows.transcript(row)
        return Prompt(row, source, text, np.asarray(ids, np.int32), columns, tools, transcript)

    def _shortened(self, ids: list[int]) -> list[int]:
        """The last tokens, behind the beginning-of-sequence token if the prompt had one."""
        if self._limit > 1 and ids[0] == self._tokenizer.bos_token_id:
            return [ids[0], *ids[1 - self._limit :]]
        return ids[-self._limit :]


def as_prompts(spec: DataSpec, rows: Rows, tokenizer: Any, environment: bool = False) -> PromptRows:
    """The training or held-out rows of a config as prompts, of whatever length.

    With an `environment` rows may lack the prompt. Raises: DataError.
    """
    return PromptRows(
        rows,
        tokenizer,
        prompt_column=spec.prompt_column,
        chosen_column=spec.chosen_column,
        rejected_column=spec.rejected_column,
        system_prompt=spec.system_prompt,
        apply_chat_template=spec.apply_chat_template,
        fold_duplicates=spec.fold_duplicates,
        environment=environment,
    )


def training_prompts(
    spec: DataSpec, rows: PromptRows, tokenizer: Any, *, max_prompt_length: int, seed: int
) -> PromptSource:
    """The training prompts of a config. Raises: DataError."""
    return PromptSource(
        rows,
        tokenizer,
        spec.rules,
        max_prompt_length=max_prompt_length,
        seed=seed,
        shuffle=spec.shuffle,
    )


def evaluation_prompts(
    spec: DataSpec, rows: PromptRows, tokenizer: Any, *, max_prompt_length: int
) -> PromptSource:
    """The held-out prompts in the order of the data. Raises: DataError."""
    return PromptSource(
        rows, tokenizer, spec.rules, max_prompt_length=max_prompt_length, seed=0, shuffle=False
    )
