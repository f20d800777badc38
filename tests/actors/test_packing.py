"""Sharing rows out: each exactly once, within the budget, and evenly."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import Row
from actors.packing import microbatches, split_rows

rows_of_any_length = st.lists(st.integers(1, 60), max_size=30).map(
    lambda lengths: [Row(i // 4, i % 4, tokens) for i, tokens in enumerate(lengths)]
)


def keys(parts: object) -> list[tuple[int, int]]:
    return sorted((row.work, row.completion) for part in parts for row in part)  # type: ignore[attr-defined]


@given(rows=rows_of_any_length, ranks=st.integers(1, 5))
def test_every_row_goes_to_one_rank_and_loads_differ_by_at_most_the_longest_row(
    rows: list[Row], ranks: int
) -> None:
    shares = split_rows(rows, ranks)
    assert len(shares) == ranks
    assert keys(shares) == keys([rows])
    loads = [sum(row.tokens for row in share) for share in shares]
    assert max(loads) - min(loads) <= max((row.tokens for row in rows), default=0)


@given(rows=rows_of_any_length, ranks=st.integers(1, 5), data=st.data())
def test_a_share_does_not_depend_on_the_order_the_rows_come_in(
    rows: list[Row], ranks: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    assert split_rows(shuffled, ranks) == split_rows(rows, ranks)


@given(rows=rows_of_any_length, budget=st.integers(1, 200), packed=st.booleans())
def test_microbatches_hold_every_row_once_within_the_budget(
    rows: list[Row], budget: int, packed: bool
) -> None:
    batches = microbatches(rows, budget, packed)
    assert keys(batches) == keys([rows])
    for batch in batches:
        widest = max(row.tokens for row in batch)
        cost = sum(row.tokens for row in batch) if packed else len(batch) * widest
        assert cost <= budget or len(batch) == 1


@given(rows=rows_of_any_length, budget=st.integers(1, 200), packed=st.booleans())
def test_microbatches_waste_less_than_half_of_the_budget(
    rows: list[Row], budget: int, packed: bool
) -> None:
    """Two neighbours never fit into one: else the count, and with it the time, could double."""
    batches = microbatches(rows, budget, packed)
    for first, second in pairwise(batches):
        together = [*first, second[0]]
        widest = max(row.tokens for row in together)
        cost = sum(row.tokens for row in together) if packed else len(together) * widest
        assert cost > budget


def test_a_row_longer_than_the_budget_is_alone() -> None:
    rows = [Row(0, 0, 50), Row(0, 1, 4), Row(0, 2, 5)]
    assert microbatches(rows, 10, packed=False) == ((rows[0],), (rows[2], rows[1]))


def test_a_rank_may_get_nothing() -> None:
    assert split_rows([Row(0, 0, 7)], 3) == ((Row(0, 0, 7),), (), ())


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="1 rank or more"):
        split_rows([], 0)
    with pytest.raises(ValueError, match="must be positive"):
        microbatches([], 0, packed=False)
