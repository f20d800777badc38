"""The loop on a virtual clock: as fast as the staleness bound allows, and never beyond it."""

from __future__ import annotations

import pytest

from tests.bench.bound import Work, update_starts
from tests.bench.overlap_sim import SYNC, UPDATE, Case, a_step, draws, starts
from tests.bench.staleness import ages, violations


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_whatever_takes_how_long_no_group_is_too_old_and_each_is_trained_on_once(
    bound: int,
) -> None:
    for seed in range(2):
        found, wrong = ages(bound, 12, seed)
        assert (violations(bound, found), wrong) == (0, 0)
        assert max(found) == bound, "the bound is made use of"


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "staleness", "slots"), [(1.0, 1, 16), (2.0, 2, 8)])
def test_a_run_takes_as_long_as_list_scheduling_under_the_same_bound(
    ratio: float, staleness: int, slots: int
) -> None:
    case = Case(1.0, ratio, staleness, replicas=2, sync=SYNC, slots=slots, steps=20)
    ours, best = starts(case)
    assert ours[-1] == pytest.approx(best[-1], rel=1e-3)


@pytest.mark.slow
def test_weights_are_loaded_beside_the_next_update_where_the_bound_allows_it() -> None:
    export, load = SYNC
    ahead, _ = starts(Case(0.0, 0.5, 1, sync=SYNC, steps=14))
    assert a_step(ahead) == pytest.approx(UPDATE + export)
    in_turn, _ = starts(Case(0.0, 0.5, 0, sync=SYNC, steps=14))
    assert a_step(in_turn) == pytest.approx(UPDATE + export + load + 0.5 * UPDATE)


def test_the_bound_is_the_sum_without_staleness_and_the_longer_of_both_with_it() -> None:
    def begun(staleness: int, sigma: float = 0.0) -> list[float]:
        return update_starts(Work(draws(320, 2.0, sigma), 16, 16, 1.0, staleness))

    assert a_step(begun(0)) == pytest.approx(3.0)
    assert a_step(begun(1)) == pytest.approx(2.0)
    last = [begun(staleness, 1.0)[-1] for staleness in (0, 1, 2, 4)]
    assert last == sorted(last, reverse=True)
