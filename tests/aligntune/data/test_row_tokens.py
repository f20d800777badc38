"""The digest of tokenised rows: the same for the same rows, however they are held."""

from __future__ import annotations

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.data import row_tokens
from aligntune.data.dropped import Dropped
from aligntune.data.row_tokens import RowTokens

ROWS = st.lists(st.lists(st.integers(-100, 3), max_size=3), min_size=1, max_size=5)


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> object:
    """Batches that a few rows fill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_tokens, "BATCH", 2)
        yield


def digest(**columns: object) -> str:
    return RowTokens(columns, Dropped(), 0, [], [], []).digest()  # type: ignore[arg-type]


@pytest.mark.slow
@given(one=ROWS, other=ROWS)
def test_two_tables_have_one_digest_where_they_are_equal(
    one: list[list[int]], other: list[list[int]]
) -> None:
    assert (digest(labels=one) == digest(labels=other)) == (one == other)
    assert digest(labels=one) != digest(input_ids=one)
    assert digest(a=one, b=other) == digest(b=other, a=one)
    assert (digest(a=one, b=other) == digest(a=other, b=one)) == (one == other)


@pytest.mark.slow
@given(rows=ROWS, at=st.integers(0, 5))
def test_what_holds_the_rows_does_not_count(rows: list[list[int]], at: int) -> None:
    arrays = [np.asarray(row, dtype=np.int32) for row in rows]
    kind = pyarrow.list_(pyarrow.int32())
    chunks = pyarrow.chunked_array([rows[:at], rows[at:]], type=kind)
    assert digest(ids=rows) == digest(ids=arrays) == digest(ids=chunks)
