"""Some states of a torn disk, the same in every run; `make torn` looks at all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torn.check import bad_disks, bits, disks
from tests.torn.disk import Disk
from tests.torn.run import as_it_is, quick
from tests.torn.states import STORIES, Story, tell

STORAGE_STOPPED = STORIES[-1]
PLAIN = STORIES[0]


@pytest.fixture(autouse=True)
def fast() -> object:
    with quick() as shown:
        yield shown


@pytest.mark.slow
def test_a_run_goes_on_from_what_a_crash_leaves_as_if_nothing_had_been(tmp_path: Path) -> None:
    seen = list(disks(STORAGE_STOPPED, tmp_path, seed=5, many=6, every=37))
    assert len(seen) > 8
    assert [case for case in seen if case[1]] == []


@pytest.mark.slow
def test_a_disk_that_fails_costs_no_record_and_no_step(tmp_path: Path) -> None:
    seen = list(bad_disks(PLAIN, tmp_path, every=67))
    assert len(seen) > 5
    assert [case for case in seen if case[1]] == []


@pytest.mark.slow
def test_a_flipped_bit_is_passed_over_and_said(tmp_path: Path) -> None:
    seen = list(bits(PLAIN, tmp_path, seed=5, each=2, every=3))
    assert len(seen) > 5
    assert [case for case in seen if case[1]] == []


def test_the_disk_of_these_tests_is_what_the_real_one_is_where_all_operations_are_done(
    tmp_path: Path,
) -> None:
    told = tell(Story("plain"), tmp_path / "run")
    disk = Disk()
    for op in told.ops:
        disk.do(op)
    assert disk.after_a_kill() == as_it_is(tmp_path / "run")
