"""Prompts in a seeded order that is a pure function of one integer.

Position p counts prompts since the beginning of training. Epoch p // n goes through the data in a
permutation drawn from (seed, epoch) alone, so a run that resumes at p continues with exactly the
prompts it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from actors.messages import Messages, Prompt
from aligntune.data.errors import DataError
from aligntune.data.formats import check_prompt, check_template, render, uses_template
from aligntune.data.sources import Rows, load_rows, require_column
from aligntune.data.spec import DataSpec

BATCH = 1024  # prompts tokenised at once when the data is checked
CACHED = 4096  # tokenised prompts kept, so that epochs over small data tokenise once


PAIR = ("chosen", "rejected")
FOR_PAIRS = "algorithm: dpo and algorithm: reward_model train on pairs, this one on prompts"


class PromptSource:
    """The usable prompts of a data set, tokenised when they are asked for.

    All rows are checked at construction. `rows` counts them, `long` those over
    `max_prompt_length`, `longest` is the length in tokens of the longest; with policy `drop`,
    `len` is `rows - long`. `fingerprint` changes with the prompts, their columns, their order or
    their rendering.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        seed: int,
        prompt_column: str = "prompt",
        system_prompt: str | None = None,
        apply_chat_template: bool = True,
        long_prompts: Literal["error", "drop", "truncate"] = "error",
        shuffle: bool = True,
    ) -> None:
        """Raises: DataError at the first row that has no usable prompt."""
        check_template(tokenizer, system_prompt, apply_chat_template)
        if prompt_column not in rows.columns and {*PAIR} <= {*rows.columns}:
            raise DataError(f"{rows.origin} holds pairs ({' and '.join(PAIR)}); {FOR_PAIRS}")
        require_column(rows, prompt_column, "data.prompt_column")
        self._data = rows
        self._tokenizer = tokenizer
        self._limit = max_prompt_length
        self._seed = seed
        self._column = prompt_column
        self._system = system_prompt
        self._template = apply_chat_template
        self._policy = long_prompts
        self._shuffle = shuffle
        self._special = not uses_template(tokenizer, apply_chat_template)
        self.rows = len(rows)
        self.long = 0
        self.longest = 0
        self.fingerprint = ""
        self._kept = self._check()
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._prompt = lru_cache(maxsize=CACHED)(self._make)

    def __len__(self) -> int:
        """Prompts per epoch."""
        return len(self._kept)

    def prompt_at(self, position: int) -> Prompt:
        """The prompt at `position`, counted from 0 since the beginning of training."""
        if position < 0:
            raise ValueError(f"position {position}: positions count from 0")
        epoch, index = divmod(position, len(self))
        return self._prompt(int(self._kept[self._order(epoch)[index]]))

    def epoch_at(self, position: int) -> int:
        """The epoch, counted from 0, that `position` lies in."""
        return position // len(self)

    def positions_in(self, epochs: float) -> int:
        """How many prompts `epochs` passes over the data are, rounded up."""
        return math.ceil(epochs * len(self))

    def epoch(self, epoch: int = 0) -> Iterator[Prompt]:
        """The prompts of one pass, in its order."""
        first = epoch * len(self)
        return (self.prompt_at(position) for position in range(first, first + len(self)))

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self))
        seeds = np.random.SeedSequence([self._seed, epoch])
        return np.random.Generator(np.random.PCG64(seeds)).permutation(len(self))

    def _check(self) -> np.ndarray:
        """Check, render and tokenise every row once; the indices of the rows to use, ascending."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self._seed} {self._shuffle} {self._limit} {self._policy}".encode())
        kept: list[int] = []
        longest = 0
        for first in range(0, self.rows, BATCH):
            indices = range(first, min(first + BATCH, self.rows))
            rendered = [self._rendered(index) for index in indices]
            texts = [text for _, text, _ in rendered]
            for index, text, ids in zip(indices, texts, self._tokenise(texts), strict=True):
                if not ids:
                    raise DataError(
                        f"{self._data.where(index)}: the prompt has no tokens; "
                        "the tokenizer knows none of its characters"
                    )
                columns = rendered[index - first][2]
                digest.update(f"{text}\0{json.dumps(columns, default=_kind)}\0".encode())
                if len(ids) > self.longest:
                    self.longest, longest = len(ids), index
                if len(ids) > self._limit:
                    self.long += 1
                if len(ids) <= self._limit or self._policy == "truncate":
                    kept.append(index)
        over = (
            f"{self.long} of {self.rows} prompts are longer than rollout.max_prompt_length "
            f"({self._limit} tokens); the longest, {self._data.where(longest)}, has {self.longest}"
        )
        if self.long and self._policy == "error":
            raise DataError(f"{over}: raise it, or set data.long_prompts to drop or truncate")
        if not kept:
            raise DataError(f"{over}: none is left to train on; raise it")
        self.fingerprint = digest.hexdigest()
        return np.asarray(kept, dtype=np.int64)

    def _rendered(self, index: int) -> tuple[str | Messages, str, dict[str, Any]]:
        """The prompt as the data has it, its text, and the other columns."""
        columns = self._data[index]
        source = columns.pop(self._column)
        try:
            text = render(
                check_prompt(source),
                self._tokenizer,
                system_prompt=self._system,
                apply_chat_template=self._template,
            )
        except DataError as error:
            raise DataError(f"{self._data.where(index)}: {error}") from error.__cause__
        return source, text, columns

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=self._special,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
        )["input_ids"]
        return ids

    def _make(self, index: int) -> Prompt:
        source, text, columns = self._rendered(index)
        (ids,) = self._tokenise([text])
        if len(ids) > self._limit:
            ids = self._shortened(ids)
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return Prompt(index, source, text, np.asarray(ids, dtype=np.int32), columns)

    def _shortened(self, ids: list[int]) -> list[int]:
        """The last tokens, behind the beginning-of-sequence token if the prompt had one."""
        if self._limit > 1 and ids[0] == self._tokenizer.bos_token_id:
            return [ids[0], *ids[1 - self._limit :]]
        return ids[-self._limit :]


def _kind(value: object) -> str:
    """What stands for a value that is not JSON's, such as an image, in a fingerprint."""
    return type(value).__name__


def training_prompts(
    spec: DataSpec, tokenizer: Any, *, max_prompt_length: int, seed: int
) -> PromptSource:
    """The training prompts of a config. Raises: DataError."""
    rows = load_rows(
        spec.path,
        name=spec.name,
        revision=spec.revision,
        split=spec.split,
        max_rows=spec.max_samples,
    )
    return _source(spec, rows, tokenizer, max_prompt_length, seed, shuffle=spec.shuffle)


def evaluation_prompts(
    spec: DataSpec, tokenizer: Any, *, max_prompt_length: int
) -> PromptSource | None:
    """The held-out prompts in the order of the data; None where the config names none.

    `data.name` and `data.revision` are those of `data.path`: another `eval_path` has neither.

    Raises: DataError.
    """
    if not spec.evaluates:
        return None
    same = spec.eval_path is None
    rows = load_rows(
        spec.path if spec.eval_path is None else spec.eval_path,
        name=spec.name if same else None,
        revision=spec.revision if same else None,
        split=spec.eval_split,
        max_rows=spec.eval_samples,
    )
    return _source(spec, rows, tokenizer, max_prompt_length, seed=0, shuffle=False)


def _source(
    spec: DataSpec, rows: Rows, tokenizer: Any, max_prompt_length: int, seed: int, *, shuffle: bool
) -> PromptSource:
    return PromptSource(
        rows,
        tokenizer,
        max_prompt_length=max_prompt_length,
        seed=seed,
        prompt_column=spec.prompt_column,
        system_prompt=spec.system_prompt,
        apply_chat_template=spec.apply_chat_template,
        long_prompts=spec.long_prompts,
        shuffle=shuffle,
    )
