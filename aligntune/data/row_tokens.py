"""The tokenised rows of a data set that a job over one table trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aligntune.data.dropped import Dropped


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
