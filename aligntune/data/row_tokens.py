"""The tokenised rows of a data set that a job over one table trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aligntune.data.dropped import Dropped

BATCH = 4096  # rows that are digested at once


@dataclass(frozen=True)
class RowTokens:
    """The usable rows of a data set, tokenised."""

    columns: Mapping[str, Sequence[Any]]
    """As TRL takes them: of pairs chosen_ids, rejected_ids and, for DPO, prompt_ids; of what is
    taught input_ids and labels and, where rows are packed, seq_lengths."""
    dropped: Dropped  # what became of the rows that are not used as they are
    longest: int  # tokens of the longest row that was read
    rows: list[int]  # of the data set, of each here; weights may draw one twice, or never
    lengths: list[int]  # tokens of every row that was read, of whatever length
    kept: list[int]  # rows that can be used, ascending

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def drawn(self, rows: list[int]) -> RowTokens:
        """These rows of them, in this order; one may come more than once."""
        if rows == self.rows:
            return self
        at = {row: place for place, row in enumerate(self.rows)}
        columns = {name: [ids[at[row]] for row in rows] for name, ids in self.columns.items()}
        return replace(self, columns=columns, rows=rows)

    def with_columns(self, columns: Mapping[str, Sequence[Any]]) -> RowTokens:
        """The same rows laid out otherwise."""
        return replace(self, columns=columns)

    def digest(self) -> str:
        """BLAKE2b of the columns in hexadecimal: it changes with any row or token, and with their
        order, and not with the type that holds them."""
        import pyarrow

        found = hashlib.blake2b(digest_size=16)
        for name, column in sorted(self.columns.items()):
            found.update(f"{name} {len(column)} ".encode())
            for first in range(0, len(column), BATCH):
                part: Any = column[first : first + BATCH]
                lists = (
                    part.combine_chunks()
                    if isinstance(part, pyarrow.ChunkedArray)
                    else pyarrow.array(part)
                )
                for numbers in (lists.value_lengths(), lists.flatten()):
                    found.update(numbers.cast(pyarrow.int64()).to_numpy().tobytes())
        return found.hexdigest()
