"""Rows that cannot be used: refused, or dropped within a bound, and counted by reason.

Invariant: no row is left out in silence. Whoever drops rows here can say how many, why, and show
two of each kind; more than the bound is an error that names the keys that mend it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aligntune.data.errors import DataError, Reason
from aligntune.data.sources import Rows

EXAMPLES = 2  # shown of each reason
SHOWN = 120  # characters of an example


@dataclass(frozen=True)
class RowRules:
    """What becomes of rows that cannot be used."""

    bad_rows: Literal["drop", "error"]  # empty, equal or unreadable
    long_rows: Literal["drop", "error", "keep_start", "keep_end"]
    max_dropped_fraction: float  # of the rows of a data set
    length_key: str  # the setting that bounds a row, in tokens


@dataclass(frozen=True)
class Dropped:
    """What became of the rows of a data set that cannot be used as they are."""

    rows: int = 0  # of the data set
    reasons: Mapping[str, int] = field(default_factory=dict)  # dropped, by reason
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # where and what
    cut: int = 0  # rows that are used, but not whole
    folded: int = 0  # rows that repeat the prompt of an earlier one
    repeating: int = 0  # rows whose answers began with the prompt, which is left out there

    @property
    def count(self) -> int:
        """Rows that were dropped."""
        return sum(self.reasons.values())

    def lines(self) -> list[str]:
        """What a person is told; nothing where every row is used whole."""
        told = []
        if self.count:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
            told.append(f"{self.count} of {self.rows} rows dropped: {counts}")
            told += [
                f"  {reason}: {example}"
                for reason, examples in self.examples.items()
                for example in examples
            ]
        if self.cut:
            told.append(f"{self.cut} of {self.rows} rows are cut to the limit")
        if self.folded:
            told.append(
                f"{self.folded} of {self.rows} rows repeat an earlier prompt and are folded into "
                "it; the columns are those of the first"
            )
        if self.repeating:
            told.append(
                f"{self.repeating} of {self.rows} rows begin their answers with the prompt, as "
                "most rows of their source do: what follows it is the answer. Where the prompt "
                "belongs to the answers, give these as messages"
            )
        return told

    def event(self) -> dict[str, Any]:
        """The same for events.jsonl."""
        return {
            "rows": self.rows,
            "dropped": dict(self.reasons),
            "examples": {reason: list(shown) for reason, shown in self.examples.items()},
            "cut": self.cut,
            "folded": self.folded,
            "repeating": self.repeating,
        }


def settle_rows(
    rows: Rows,
    wrong: Mapping[int, DataError],
    rules: RowRules,
    *,
    cut: int = 0,
    folded: int = 0,
    repeating: int = 0,
) -> Dropped:
    """What becomes of the rows in `wrong`, which say why they cannot be used. The other numbers are
    those of `Dropped`.

    Raises:
        DataError: a row of a kind that the rules refuse, or more rows than may be dropped.
    """
    ordered = dict(sorted(wrong.items()))
    long = {row: why for row, why in ordered.items() if why.reason is Reason.TOO_LONG}
    bad = {row: why for row, why in ordered.items() if why.reason is not Reason.TOO_LONG}
    if bad and rules.bad_rows == "error":
        raise DataError(_all_in_one_line(rows, bad, "set data.bad_rows: drop to leave them out"))
    if long and rules.long_rows == "error":
        cure = f"raise {rules.length_key}, or set data.long_rows: drop to leave them out"
        raise DataError(_all_in_one_line(rows, long, cure))
    kinds: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for row, why in ordered.items():
        reason = why.reason.value
        counts[reason] = counts.get(reason, 0) + 1
        shown = kinds.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            text = f"{rows.where(row)}: {why}"
            shown.append(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")
    examples = {name: tuple(shown) for name, shown in kinds.items()}
    dropped = Dropped(len(rows), counts, examples, cut, folded, repeating)
    if dropped.count == len(rows) or dropped.count > rules.max_dropped_fraction * len(rows):
        raise DataError(_too_many(rows, dropped, rules, ordered))
    return dropped


def _too_many(rows: Rows, dropped: Dropped, rules: RowRules, wrong: Mapping[int, DataError]) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.reasons.items())
    first = {why.reason: row for row, why in reversed([*wrong.items()])}
    examples = "; ".join(f"{rows.where(row)}: {wrong[row]}" for row in sorted(first.values()))
    cures = ["repair the data"]
    if Reason.TOO_LONG.value in dropped.reasons:
        cures.append(f"raise {rules.length_key}")
    none_left = dropped.count == len(rows)
    if not none_left:
        cures.append("raise data.max_dropped_fraction")
    what = (
        "none is left"
        if none_left
        else f"more than data.max_dropped_fraction={rules.max_dropped_fraction:g} allows"
    )
    return (
        f"{rows.origin}: {dropped.count} of {len(rows)} rows cannot be used ({counts}), {what}: "
        f"{' or '.join(cures)}. {examples}"
    )


def _all_in_one_line(rows: Rows, wrong: Mapping[int, DataError], cure: str) -> str:
    """The first of the rows in full, the numbers of some more, and the cure."""
    first, *others = wrong
    more = ", ".join(str(row) for row in others[:4])
    dots = ", ..." if len(others) > 4 else ""
    also = f"; rows {more}{dots} too ({len(wrong)} of {len(rows)})" if others else ""
    return f"{rows.where(first)}: {wrong[first]}{also}: repair the data or {cure}"
