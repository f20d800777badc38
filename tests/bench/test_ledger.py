"""An audit takes as long for a group however many there are."""

from __future__ import annotations

import pytest

from tests.bench.ledger import seconds


@pytest.mark.slow
def test_the_time_of_an_audit_and_a_restore_goes_with_the_groups() -> None:
    few = [min(times) for times in zip(*(seconds(1_000, 16) for _ in range(3)), strict=True)]
    many = [min(times) for times in zip(*(seconds(8_000, 16) for _ in range(2)), strict=True)]
    for little, much in zip(few, many, strict=True):
        assert much <= 8 * 2.5 * little, "a quadratic law makes 64 of it"
