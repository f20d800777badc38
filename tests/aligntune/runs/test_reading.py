"""A run as it lies on disk: what a kill tore, a damaged line, and where the run stands."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import os
import random
import statistics
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.errors import UserError
from aligntune.report.summary import summary
from aligntune.runs import reading
from aligntune.runs.reading import SAMPLES, chosen, open_run, spread


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory with a config and nothing else."""
    made = tmp_path / "run"
    made.mkdir()
    (made / "config.yaml").write_text("# torch 2.13.0\nalgorithm: {name: grpo}\n")
    return made


def write(path: Path, rows: Sequence[dict[str, Any]], torn: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """As a process that trains holds the directory."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_a_torn_last_line_is_left_out_and_is_no_problem(run: Path) -> None:
    write(run / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}], torn='{"step": 2, "rew')
    found = open_run(run)
    assert [row["step"] for row in found.metrics] == [1]
    assert found.problems == []


def test_a_damaged_line_is_told_and_the_others_are_read(run: Path) -> None:
    rows = [{"step": step, "reward/mean": 0.5} for step in (1, 2, 3)]
    write(run / "metrics.jsonl", rows)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b"\xff\x00{\n" + lines[2])
    found = open_run(run)
    assert [row["step"] for row in found.metrics] == [1, 3]
    assert found.problems == ["metrics.jsonl:2 is damaged and left out"]


def test_a_run_that_has_only_begun_has_nothing_yet(run: Path) -> None:
    found = open_run(run)
    assert (found.metrics, found.evals, found.events, found.books) == ([], [], [], None)
    assert (found.samples(9), found.eval_samples(9), found.defaults) == (([], 0), ([], 0), None)
    assert (found.algorithm, found.versions) == ("grpo", ["torch 2.13.0"])


def test_a_folder_that_is_no_run_is_refused_and_the_run_below_it_named(run: Path) -> None:
    with pytest.raises(UserError, match="name a run directory"):
        open_run(run / "nowhere")
    with pytest.raises(UserError, match=f"there is one in {run}"):
        open_run(run.parent)


@pytest.mark.parametrize(
    ("kinds", "locked", "state"),
    [
        (["run_started"], True, "running"),
        (["run_started"], False, "killed"),
        (["run_started", "run_finished"], True, "finished"),  # while its last files are closed
        (["run_started", "run_stopped"], False, "stopped"),
        (["run_started", "run_stopped", "run_started"], True, "running"),
        ([], False, "killed"),
    ],
)
def test_where_a_run_stands(run: Path, kinds: list[str], locked: bool, state: str) -> None:
    write(run / "events.jsonl", [{"time": 1.0, "kind": kind, "reason": "why"} for kind in kinds])
    if locked:
        with held(run / "run.lock"):
            assert open_run(run).ending.state == state
    else:
        (run / "run.lock").touch()
        assert open_run(run).ending.state == state


def test_on_a_file_system_without_locks_a_run_that_has_no_end_was_killed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    write(run / "events.jsonl", [{"time": 1.0, "kind": "run_started"}])
    (run / "run.lock").touch()
    assert open_run(run).ending.state == "killed"


def test_books_that_do_not_balance_are_a_problem_and_no_error(run: Path) -> None:
    write(run / "ledger.jsonl", [{"seq": 0, "event": "move", "groups": [3], "to": "TRAINED"}])
    found = open_run(run)
    assert found.books is None
    assert "do not balance" in found.problems[0]


def test_evaluations_of_a_preference_job_are_among_its_steps(run: Path) -> None:
    (run / "config.yaml").write_text("algorithm: dpo\n")
    rows: list[dict[str, Any]] = [{"step": 0, "eval/loss": 0.7}, {"step": 1, "loss/total": 0.6}]
    write(run / "metrics.jsonl", rows)
    found = open_run(run)
    assert found.is_preference
    assert found.evals == rows[:1]


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [(), (3, 499)])
def test_of_a_long_run_few_steps_have_all_their_figures_in_memory(
    run: Path, damaged: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 64 replicas a step has some 300 figures, 43 KB."""
    names = ["time/step", "time/update", "throughput/tokens_per_s", "reward/mean"]
    names += [f"rollout/rollout-{place}/queue" for place in range(96)]
    rows = [{"step": step, **dict.fromkeys(names, step + 0.5)} for step in range(1, 501)]
    rows[77]["eval/loss"] = 0.5
    texts = ["broken" if n in damaged else json.dumps(row) for n, row in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts) + '{"step": 501')
    left = [row for n, row in enumerate(rows) if n not in damaged]
    whole = open_run(run)
    assert whole.metrics == whole.drawn == left
    told = summary(whole)
    monkeypatch.setattr(reading, "POINTS", 20)
    found = open_run(run)
    tracemalloc.start()
    try:
        assert [row["step"] for row in found.metrics] == [row["step"] for row in left]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2**20  # of 5 MB
    assert summary(found) == told
    assert found.evals == [rows[77]]
    assert 20 <= len(found.drawn) <= 21
    assert all(row in left for row in found.drawn)
    assert found.drawn[-1] == left[-1]


def test_of_many_samples_some_are_read_and_the_last_is_among_them(run: Path) -> None:
    rows = [{"step": step, "prompt": "x" * 100} for step in range(100)]
    write(run / "samples.jsonl", rows)
    some, in_all = open_run(run).samples(most_bytes=2500)
    assert in_all == 100
    assert 10 <= len(some) <= 25
    assert some[-1]["step"] == 99
    assert open_run(run).samples(10**9) == (rows, 100)


@pytest.mark.slow
def test_of_samples_larger_than_memory_few_are_kept_to_find_the_best_and_the_last(
    run: Path,
) -> None:
    said = {"text": "x" * 2**17}
    rows = [
        {"step": n // 4, "group": n, "completions": [{**said, "reward": n * 7 % 100}]}
        for n in range(100)
    ]
    write(run / SAMPLES, rows, torn='{"step": 25, "gro')
    found = open_run(run)
    tracemalloc.start()
    try:
        for order, best in (("best", [57, 14]), ("worst", [0, 43])):
            assert [g["group"] for g in chosen(found.groups(SAMPLES), None, order, 2)] == best
        assert [g["group"] for g in chosen(found.groups(SAMPLES), 7, "", 2)] == [28, 29]
        assert [g["group"] for g in found.last_groups(SAMPLES)] == [96, 97, 98, 99]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 3 * 2**20  # of 12.5 MiB
    lines = (run / SAMPLES).read_bytes().splitlines(keepends=True)
    lines[97] = b"\xff\x00{\n"
    (run / SAMPLES).write_bytes(b"".join(lines))
    assert [g["group"] for g in open_run(run).last_groups(SAMPLES)] == [96, 98, 99]


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 2000), st.booleans())
def test_lines_are_taken_over_the_whole_file_up_to_the_last(
    sizes: list[int], most: int, torn: bool
) -> None:
    lines = [b"x" * (size - 1) + b"\n" for size in sizes]
    starts = [0, *itertools.accumulate(sizes)]
    chosen, in_all = spread(io.BytesIO(b"".join(lines) + b"torn" * torn), most)
    assert list(chosen) == sorted(chosen)
    assert chosen.items() <= dict(zip(starts, lines, strict=False)).items()
    if sizes:
        assert max(chosen) == starts[-2]
    if sum(sizes) <= most:
        assert (len(chosen), in_all) == (len(sizes), len(sizes))


@given(st.integers(1, 40), st.integers(50, 2000), st.integers(2, 60))
def test_lines_of_one_size_are_taken_evenly_and_counted(size: int, number: int, part: int) -> None:
    content = (b"x" * (size - 1) + b"\n") * number
    chosen, in_all = spread(io.BytesIO(content), len(content) // part)
    assert in_all == pytest.approx(number, rel=0.01)
    assert sum(map(len, chosen.values())) <= 3 * (size + len(content) // part)
    quarters = [sum(4 * at // len(content) == n for at in chosen) for n in range(4)]
    assert len(chosen) < 128 or min(quarters) >= len(chosen) / 16


@pytest.mark.parametrize("most", [2**22, 2**24])
def test_long_lines_are_taken_as_often_as_short_ones(most: int) -> None:
    sizes = [100_000] * 400 + [1000] * 3600
    random.Random(0).shuffle(sizes)
    chosen, in_all = spread(io.BytesIO(b"".join(b"x" * (s - 1) + b"\n" for s in sizes)), most)
    shown = [len(line) for line in chosen.values()]
    assert statistics.fmean(shown) == pytest.approx(statistics.fmean(sizes), rel=0.5)
    assert in_all == pytest.approx(len(sizes), rel=0.3)
    assert sum(shown) == pytest.approx(most, rel=0.5)


class Shortened(io.BytesIO):
    """A file that another process shortens before the line that is read as number `after`."""

    def __init__(self, content: bytes, after: int, size: int) -> None:
        super().__init__(content)
        self._after, self._left = after, size

    def readline(self, size: int | None = -1) -> bytes:
        self._after -= 1
        if self._after == 0:
            self.truncate(self._left)
        return super().readline(size)


@given(st.integers(1, 2000), st.integers(1, 10), st.integers(0, 1000))
def test_a_file_that_is_shortened_meanwhile_has_what_is_left(
    most: int, after: int, left: int
) -> None:
    content = b"".join(b"%08d\n" % number for number in range(111))
    chosen, in_all = spread(Shortened(content, after, left), most)
    assert all(line == content[at : at + 9] and at % 9 == 0 for at, line in chosen.items())
    assert in_all >= len(chosen)
    assert spread(Shortened(content, 1, 0), most) == ({}, 0)


@pytest.mark.slow
def test_of_samples_larger_than_memory_little_more_is_read_than_is_shown(run: Path) -> None:
    write(run / SAMPLES, [{"step": n, "prompt": "x" * (n % 3000)} for n in range(20_000)])
    read = 0

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal read
            size = super().readinto(buffer)
            read += size
            return size

    with io.BufferedReader(Counted(run / SAMPLES)) as file:
        lines, in_all = spread(file, 200_000)
    assert 100_000 < sum(map(len, lines.values())) < 300_000
    assert in_all == pytest.approx(20_000, rel=0.5)
    assert read < 5_000_000  # of 30 MB; a block of 8 KiB, twice for each line of 1.5 KiB
