"""Rows that cannot be used: refused, or dropped within a bound and counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.data.dropped import RowRules, settle_rows
from aligntune.data.errors import DataError, Reason
from aligntune.data.lengths import percentile_length
from tests.aligntune.data.test_preference import Table

ROWS = Table(*({"prompt": str(n)} for n in range(20)))


def rules(**changes: Any) -> RowRules:
    given = {"bad_rows": "drop", "long_rows": "drop", "max_dropped_fraction": 0.25}
    return RowRules(**{**given, **changes}, length_key="data.max_length")


def wrong(**rows: Reason) -> dict[int, DataError]:
    return {int(row[1:]): DataError(f"is {why}", why) for row, why in rows.items()}


def test_within_the_bound_they_are_counted_by_reason_with_two_examples_each() -> None:
    found = wrong(r9=Reason.EQUAL, r1=Reason.EQUAL, r5=Reason.EQUAL, r2=Reason.TOO_LONG)
    dropped = settle_rows(ROWS, found, rules(), cut=3, folded=1, repeating=2)
    assert dropped.count == 4
    assert dropped.event() == {
        "rows": 20,
        "dropped": {"equal": 3, "too long": 1},
        "examples": {
            "equal": ["table, row 1: is equal", "table, row 5: is equal"],
            "too long": ["table, row 2: is too long"],
        },
        "cut": 3,
        "folded": 1,
        "repeating": 2,
    }
    assert dropped.lines()[0] == "4 of 20 rows dropped: 3 equal, 1 too long"
    assert dropped.lines()[-3] == "3 of 20 rows are cut to the limit"
    assert "1 of 20 rows repeat an earlier prompt" in dropped.lines()[-2]
    assert "2 of 20 rows begin their answers with the prompt" in dropped.lines()[-1]


def test_where_every_row_is_used_nothing_is_said() -> None:
    assert settle_rows(ROWS, {}, rules()).lines() == []


def test_beyond_the_bound_the_counts_and_the_keys_that_mend_it_are_told() -> None:
    found = wrong(r0=Reason.EMPTY, r1=Reason.EMPTY, r2=Reason.TOO_LONG, r3=Reason.EMPTY)
    assert settle_rows(ROWS, found, rules(max_dropped_fraction=0.2)).count == 4
    with pytest.raises(DataError) as refused:
        settle_rows(ROWS, found, rules(max_dropped_fraction=0.19))
    message = str(refused.value)
    assert "4 of 20 rows cannot be used (3 empty, 1 too long)" in message
    assert "more than data.max_dropped_fraction=0.19 allows" in message
    assert "raise data.max_length or raise data.max_dropped_fraction" in message
    assert "table, row 0: is empty; table, row 2: is too long" in message
    assert "\n" not in message


def test_none_left_is_an_error_whatever_the_bound() -> None:
    every = {row: DataError("is empty", Reason.EMPTY) for row in range(20)}
    with pytest.raises(DataError, match="none is left"):
        settle_rows(ROWS, every, rules(max_dropped_fraction=1.0))


def test_the_kind_that_is_to_be_an_error_is_one_and_the_other_is_not() -> None:
    found = wrong(r1=Reason.UNREADABLE, r2=Reason.TOO_LONG)
    with pytest.raises(DataError, match=r"table, row 1: .* set data.bad_rows: drop"):
        settle_rows(ROWS, found, rules(bad_rows="error"))
    with pytest.raises(DataError, match=r"table, row 2: .* raise data.max_length, or set"):
        settle_rows(ROWS, found, rules(long_rows="error"))


@pytest.mark.slow
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_at_most_a_twentieth_is_longer_than_the_percentile(lengths: list[int]) -> None:
    found = percentile_length(lengths)
    assert found in lengths
    assert 20 * sum(length > found for length in lengths) <= len(lengths)
