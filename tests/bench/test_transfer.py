"""Bytes and copies of a version of the weights, whatever the machine."""

from __future__ import annotations

import pytest

from tests.bench.transfer import ADAPTER, copies, sizes


def test_what_is_sent_is_as_much_as_what_has_changed_and_never_more_than_the_whole() -> None:
    found = sizes(1)
    assert found["bytes/full"] == pytest.approx(1, abs=0.01)
    # An index of 4 bytes and a value of 2 for each changed one of 2 bytes.
    assert found["bytes/delta_1"] == pytest.approx(0.03, abs=0.005)
    assert found["bytes/delta_99"] == pytest.approx(1, abs=0.01)
    assert found["bytes/adapter"] == pytest.approx(ADAPTER, abs=0.005)


def test_weights_are_copied_twice_and_once_more_where_other_processes_read_them() -> None:
    assert copies() == {"copies/transformers": 2, "copies/vllm": 3}
