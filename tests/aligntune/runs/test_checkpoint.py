"""Checkpoints are whole or absent."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.disk import write_files
from aligntune.errors import UserError
from aligntune.runs import checkpoint
from aligntune.runs.checkpoint import CHUNK, STATE, Checkpoints
from aligntune.runs.rundir import RunDir


def save(checkpoints: Checkpoints, step: int, weights: bytes | None = None) -> None:
    staging = checkpoints.begin(step)
    (staging / "policy" / "weights").write_bytes(weights or bytes([step % 256]) * 100)
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


def test_reading_a_checkpoint_is_seen_while_it_lasts(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, keep_last=1), 1, weights=bytes(2 * CHUNK + 1))
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    size = sum(
        (tmp_path / "step-000001" / name).stat().st_size for name in ("policy/weights", STATE)
    )
    checkpoints.latest()
    assert checkpoints.bytes_read == size


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read for a checksum."""
    names: list[str] = []
    real = checkpoint.checksum

    def checksum(path: Path, *heard: Any) -> int:
        names.append(path.name)
        return real(path, *heard)

    monkeypatch.setattr(checkpoint, "checksum", checksum)
    return names


def test_what_ranks_have_written_is_read_by_a_later_process_alone(
    tmp_path: Path, read: list[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    files = {f"rank-{rank}": memoryview(bytes([rank]) * 1000) for rank in range(20)}
    sums = write_files(checkpoints.begin(1) / "policy", {**files, "deep/state": b"x"})
    assert sums["rank-3"][0] == 1000
    known = {f"policy/{name}": each for name, each in sums.items()}
    checkpoints.commit(1, {"step": 1}, known=known)
    assert checkpoints.exists(1)
    assert read == [STATE]
    read.clear()
    later = Checkpoints(tmp_path, keep_last=2)
    assert later.exists(1)
    assert later.exists(1)
    assert sorted(read) == sorted([*files, "state", STATE])
    assert later.bytes_read == 20_001 + (tmp_path / "step-000001" / STATE).stat().st_size
    weights = tmp_path / "step-000001" / "policy" / "rank-7"
    weights.write_bytes(b"\x07" * 999 + b"\x06")
    assert not checkpoints.exists(1)
    assert not later.exists(1)


def test_one_that_a_read_has_found_damaged_is_not_there(tmp_path: Path) -> None:
    """As where a disk loses content and keeps size and time: what is not there is written again."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    sums = write_files(checkpoints.begin(1) / "policy", {"weights": b"good"})
    known = {f"policy/{name}": each for name, each in sums.items()}
    path = checkpoints.commit(1, {"step": 1}, known=known).path / "policy" / "weights"
    assert checkpoints.exists(1)
    times = path.stat()
    path.write_bytes(b"lost")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert checkpoints.latest() is None
    assert not checkpoints.exists(1)
    save(checkpoints, 1)
    assert checkpoints.exists(1)
    assert checkpoints.latest() is not None


@pytest.mark.parametrize("name", ["weights", "lost"])
def test_what_was_written_and_is_not_there_is_in_no_checkpoint(tmp_path: Path, name: str) -> None:
    """As where a network's file system shows the driver less than a rank has written."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    (checkpoints.begin(1) / "policy" / "weights").write_bytes(b"half")
    known = {f"policy/{name}": (8, 0)}
    with pytest.raises(OSError, match=rf"policy/{name} (was written and is not there|has 4 bytes)"):
        checkpoints.commit(1, {"step": 1}, known=known)
    assert checkpoints.steps() == []


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


WHOLE = json.dumps({"files": {"controller.json": {"size": 11, "crc32": 0}}})
DAMAGE = {
    "truncated": lambda folder: (folder / "policy" / "weights").write_bytes(b"short"),
    "deleted": lambda folder: (folder / "policy" / "weights").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "manifest is a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest lists nothing": lambda folder: (folder / "manifest.json").write_text("{}"),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text('{"a": 1}'),
    "manifest without the weights": lambda folder: (folder / "manifest.json").write_text(WHOLE),
    "manifest not of text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "state not of JSON": lambda folder: (folder / "controller.json").write_bytes(b'{"step": 2]'),
    "state is a number": lambda folder: (folder / "controller.json").write_bytes(b"22222222222"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    DAMAGE[damage](tmp_path / "step-000002")
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    assert checkpoints.damaged() == ["step-000002"]
    with pytest.raises(ValueError, match=r"not a complete checkpoint|damaged"):
        checkpoints.at(tmp_path / "step-000002")


@pytest.mark.slow
@given(st.data())
def test_one_flipped_bit_in_any_file_passes_it_over(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, keep_last=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    name = data.draw(st.sampled_from(["policy/weights", "controller.json"]))
    victim = folder / "step-000002" / name
    content = bytearray(victim.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(content)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    with pytest.raises(ValueError, match=r"damaged|not a complete"):
        checkpoints.at(folder / "step-000002")


@pytest.mark.parametrize(
    "name",
    [
        "step-000001.bak",
        "step-1",
        "step-",
        "step-000001 copy",
        "step-x",
        "step-\u0660\u0660\u0660\u0660\u0660\u0661",
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / name)
    (tmp_path / "step-000009").write_text("a file")
    save(checkpoints, 2)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 2
    assert (tmp_path / name / "policy" / "weights").is_file()
    assert (tmp_path / "step-000009").is_file()
    assert not (tmp_path / "step-000001").exists(), "keep_last counts ours"


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


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of folders that are read, and so stay on NFS, empty but for what nobody can remove."""
    names: set[str] = set()
    real = os.rmdir

    def rmdir(path: str, **options: int | None) -> None:
        if os.path.basename(path) in names:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rmdir", rmdir)
    return names


@pytest.mark.parametrize("keep_last", [1, 2])
def test_an_old_one_that_cannot_be_removed_yet_costs_no_new_one(
    tmp_path: Path, held: set[str], keep_last: int
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last)
    held.add("step-000001")
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    assert checkpoints.steps() == [3, 4][-keep_last:]
    assert (tmp_path / "step-000001").is_dir()
    held.clear()
    save(checkpoints, 5)
    assert checkpoints.folders() == checkpoints.steps() == [4, 5][-keep_last:]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_later_one_that_cannot_be_removed_yet_counts_no_more_and_takes_no_place(
    tmp_path: Path, held: set[str], keep_last: int
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last)
    for step in (5, 10):
        save(checkpoints, step)
    (tmp_path / "step-000010" / "policy" / "weights").write_bytes(b"damaged")
    held.add("step-000010")
    for step in (6, 7):
        save(checkpoints, step)
        assert checkpoints.steps()[-1] == step
    assert checkpoints.folders() == [*[6, 7][-keep_last:], 10]
    again = Checkpoints(tmp_path, keep_last)
    assert again.adopt(again.at(tmp_path / "step-000007")) == again.latest()


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
    save(there, 2, b"x" * 100)
    chosen = here.adopt(there.at(tmp_path / "there" / "step-000002"))
    assert chosen.path == tmp_path / "here" / "step-000002"
    assert (chosen.path / "policy" / "weights").read_bytes() == b"x" * 100
    assert [p.name for p in (tmp_path / "here").glob("step-*")] == ["step-000002"]
    assert there.exists(2), "the one it came from stays"
