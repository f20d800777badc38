"""Checkpoints are whole or absent."""

from pathlib import Path

import pytest

from aligntune.errors import UserError
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.rundir import RunDir


def save(checkpoints: Checkpoints, step: int) -> None:
    staging = checkpoints.begin(step)
    (staging / "policy" / "weights").write_bytes(bytes([step % 256]) * 100)
    checkpoints.commit(step, {"step": step})


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    assert checkpoints.latest() is None
    for step in (9, 10, 100):
        save(checkpoints, step)
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.state) == (100, {"step": 100})
    assert (tmp_path / "latest").read_text().strip() == "step-000100"


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 6):
        save(checkpoints, step)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000004", "step-000005"]


def test_one_that_was_being_written_does_not_count_and_is_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    (checkpoints.begin(2) / "policy" / "weights").write_bytes(b"half")
    again = Checkpoints(tmp_path, keep_last=2)
    latest = again.latest()
    assert latest is not None
    assert latest.step == 1
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    weights = tmp_path / "step-000002" / "policy" / "weights"
    if damage == "truncate":
        weights.write_bytes(b"short")
    elif damage == "delete":
        weights.unlink()
    else:
        (tmp_path / "step-000002" / "manifest.json").unlink()
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoints.at(tmp_path / "step-000002")


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_a_damaged_newer_one_costs_no_whole_one(tmp_path: Path, keep_last: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last)
    for step in (5, 10):
        save(checkpoints, step)
    (tmp_path / "step-000010" / "policy" / "weights").unlink()
    assert checkpoints.damaged() == ["step-000010"]
    save(checkpoints, 6)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 6
    assert checkpoints.damaged() == []
    assert (tmp_path / "latest").read_text() == "step-000006\n"
    assert checkpoints.exists(5) == (keep_last == 2 or keep_last == 3)


def test_folders_are_in_order_of_steps_not_of_names(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (999_998, 999_999, 1_000_000):
        save(checkpoints, step)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1_000_000
    assert not checkpoints.exists(999_998)


def test_where_none_is_whole_the_run_does_not_begin_again_in_silence(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    save(checkpoints, 4)
    (tmp_path / "checkpoints" / "step-000004" / "policy" / "weights").unlink()
    with pytest.raises(UserError, match=r"is damaged \(step-000004\); restore one"):
        RunDir(tmp_path).start_from(checkpoints, "auto")


def test_looking_for_checkpoints_leaves_nothing_behind(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", keep_last=2).latest() is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_one_can_be_written_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    (tmp_path / "step-000001" / "policy" / "weights").unlink()
    assert not checkpoints.exists(1)
    save(checkpoints, 1)
    assert checkpoints.exists(1)


def test_going_on_from_an_older_one_forgets_the_steps_that_come_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (1, 2, 3):
        save(checkpoints, step)
    chosen = checkpoints.adopt(checkpoints.at(tmp_path / "step-000002"))
    assert chosen.step == 2
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001", "step-000002"]
    assert checkpoints.latest() == chosen
    assert not checkpoints.exists(3)


def test_one_from_elsewhere_takes_the_place_of_all(tmp_path: Path) -> None:
    here, there = (Checkpoints(tmp_path / name, keep_last=5) for name in ("here", "there"))
    save(here, 2)
    save(here, 7)
    save(there, 2)
    (tmp_path / "there" / "step-000002" / "policy" / "weights").write_bytes(b"x" * 100)
    chosen = here.adopt(there.at(tmp_path / "there" / "step-000002"))
    assert chosen.path == tmp_path / "here" / "step-000002"
    assert (chosen.path / "policy" / "weights").read_bytes() == b"x" * 100
    assert [p.name for p in (tmp_path / "here").glob("step-*")] == ["step-000002"]
    assert there.exists(2), "the one it came from stays"
