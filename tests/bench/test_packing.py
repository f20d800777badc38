"""Padding, balance and reads of a step's rows: counted, not timed."""

from __future__ import annotations

import statistics

import pytest

from tests.bench.packing import figures, groups_of, ways


def test_on_one_rank_half_or_less_of_the_padding_is_left() -> None:
    found = {way: figures(parts) for way, parts in ways(groups_of(32, 1.0, 0), 1).items()}
    assert found["whole"]["padding"] <= 0.01
    assert found["whole"]["padding"] <= 0.5 * found["greedy"]["padding"]


@pytest.mark.parametrize(("groups", "ranks"), [(32, 4), (32, 8), (128, 8)])
def test_ranks_in_step_wait_less_for_each_other_than_with_filled_or_dealt_microbatches(
    groups: int, ranks: int
) -> None:
    found = {way: figures(parts) for way, parts in ways(groups_of(groups, 1.0, 0), ranks).items()}
    assert found["whole"]["padding"] <= 0.022
    assert found["whole"]["in_step"] < min(found["greedy"]["in_step"], found["dealt"]["in_step"])
    assert found["whole"]["reads"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "ranks"), [(32, 8), (128, 8), (512, 64)])
def test_four_groups_a_rank_and_more_balance_within_one_percent(groups: int, ranks: int) -> None:
    found = [figures(ways(groups_of(groups, 1.0, seed), ranks)["whole"]) for seed in range(3)]
    assert statistics.mean(each["cost"] for each in found) <= 0.01
    assert {each["reads"] for each in found} == {1.0}
