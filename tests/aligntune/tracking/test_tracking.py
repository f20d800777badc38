"""The files of a run directory, and trackers."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aligntune.config.records import TrackingSpec
from aligntune.runs.jsonl import cut_torn_line, last_row, lines_from_end, read_lines
from aligntune.tracking.metrics import (
    EventKind,
    EventsFile,
    MetricsFile,
    NotFinite,
    SamplesFile,
    held,
)
from aligntune.tracking.trackers import (
    TensorBoard,
    TrackerMissing,
    check_trackers,
    open_tracker,
    tracking_id,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_lines(path)]


class TestMetricsFile:
    def test_one_object_a_step_readable_at_once(self, path: Path) -> None:
        file = MetricsFile(path)
        file.append(1, {"reward/mean": 0.5})
        assert json.loads(path.read_text()) == {"step": 1, "reward/mean": 0.5}
        file.append(2, {"reward/mean": 1})
        assert read_lines(path)[1] == {"step": 2, "reward/mean": 1.0}

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_figure_that_is_not_finite_is_refused_by_name_and_not_written(
        self, path: Path, value: float
    ) -> None:
        file = MetricsFile(path)
        with pytest.raises(NotFinite, match="metric 'loss/policy' of step 3"):
            file.append(3, {"reward/mean": 0.5, "loss/policy": value})
        assert path.read_text() == ""

    def test_a_figure_that_overflows_is_held_at_the_largest_number(self, path: Path) -> None:
        figures = {"a": float("inf"), "b": -float("inf"), "c": float("nan"), "d": 0.5}
        MetricsFile(path).append(3, held(figures))
        largest = sys.float_info.max
        assert read_lines(path) == [{"step": 3, "a": largest, "b": -largest, "d": 0.5}]

    @settings(max_examples=25)
    @given(st.integers(0, 8), st.integers(0, 8))
    def test_truncation_forgets_exactly_the_later_steps(
        self, tmp_path_factory: pytest.TempPathFactory, written: int, kept: int
    ) -> None:
        path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
        file = MetricsFile(path)
        for step in range(1, written + 1):
            file.append(step, {"x": step / 3})
        file.truncate_after(kept)
        assert steps(path) == list(range(1, min(written, kept) + 1))
        file.append(99, {})
        assert steps(path)[-1] == 99
        assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]

    def test_truncation_needs_no_room(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = MetricsFile(path)
        for step in (1, 2, 3):
            file.append(step, {"x": 0.5})

        def full(self: Path, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            open_file = Path.open
            patch.setattr(
                Path, "open", lambda self, *a: (full if "w" in a[0] else open_file)(self, *a)
            )
            file.truncate_after(1)
        assert steps(path) == [1]
        file.append(2, {"x": 0.25})
        assert read_lines(path)[1:] == [{"step": 2, "x": 0.25}]

    @pytest.mark.slow
    def test_a_file_that_is_larger_than_memory_is_truncated_and_its_end_read(
        self, path: Path
    ) -> None:
        file = SamplesFile(path)
        for step in range(1, 41):
            file.append(step, [{"text": "x" * 2**19}, {"text": "y" * 2**19}])
        tracemalloc.start()
        try:
            file.truncate_after(37)
            assert last_row(path) == {"step": 37, "text": "y" * 2**19}
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < 6 * 2**20  # of 40 MiB: a piece, and a line as bytes and as an object
        assert steps(path) == [step for step in range(1, 38) for _ in range(2)]

    def test_a_line_torn_by_a_kill_is_cut_off_when_the_run_goes_on(self, path: Path) -> None:
        MetricsFile(path).append(1, {"x": 1.0})
        with path.open("a") as file:
            file.write('{"step": 2, "x": 2.')
        assert steps(path) == [1]
        resumed = MetricsFile(path)
        resumed.truncate_after(1)
        resumed.append(2, {"x": 2.0})
        assert steps(path) == [1, 2]

    def test_whoever_reads_a_file_that_is_truncated_lives_on(self, path: Path) -> None:
        """A memory map would end the process by SIGBUS."""
        path.write_text('{"step": 1}\n' * 10**5)
        rows = lines_from_end(path)
        assert next(rows)[1] == {"step": 1}
        os.truncate(path, 0)
        with suppress(ValueError):
            assert len(list(rows)) < 10**5

    def test_a_torn_line_is_cut_off_and_no_more_is_read_than_the_end(self, path: Path) -> None:
        torn = b'{"step": 2'
        path.write_bytes(b"x" * 2**24 + b"\n" + b'{"step": 1}\n' + torn)
        tracemalloc.start()
        read = path.stat().st_size - len(torn)
        try:
            cut_torn_line(path)
            assert last_row(path) == {"step": 1}
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert path.stat().st_size == read
        assert most < 2**17

    def test_a_broken_line_in_the_middle_is_named(self, path: Path) -> None:
        path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
        with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object"):
            read_lines(path)


class TestSamplesAndEvents:
    def test_samples_of_a_step_are_forgotten_together(self, tmp_path: Path) -> None:
        file = SamplesFile(tmp_path / "samples.jsonl")
        for step in (1, 2):
            file.append(
                step, [{"completion": text, "scores": [1.0]} for text in ("a\n", "é\ud800")]
            )
        file.truncate_after(1)
        assert read_lines(file.path) == [
            {"step": 1, "completion": "a\n", "scores": [1.0]},
            {"step": 1, "completion": "é\ud800", "scores": [1.0]},
        ]
        with pytest.raises(ValueError, match="not JSON compliant"):
            file.append(2, [{"scores": [float("nan")]}])
        assert steps(file.path) == [1, 1]

    def test_events_have_a_time_a_kind_and_their_fields(self, tmp_path: Path) -> None:
        file = EventsFile(tmp_path / "events.jsonl")
        file.append(EventKind.GROUP_RETRIED, group=3, reason="timeout")
        file.append("replica_lost", replica="rollout-0.0")
        first, second = read_lines(file.path)
        assert first["time"] <= second["time"]
        del first["time"]
        assert first == {"kind": "group_retried", "group": 3, "reason": "timeout"}
        assert second["kind"] == "replica_lost"

    def test_an_unknown_kind_is_refused(self, tmp_path: Path) -> None:
        file = EventsFile(tmp_path / "events.jsonl")
        with pytest.raises(ValueError, match="replica_lots"):
            file.append("replica_lots")
        assert file.path.read_text() == ""


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


class TestTrackers:
    @pytest.mark.slow
    def test_tensorboard_shows_each_step_once_after_a_resume_and_a_rollback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tensorboard.summary.writer import event_file_writer as of_tensorboard

        # The second file of this process has the number 10, which sorts before the first's 9.
        monkeypatch.setattr(of_tensorboard, "_global_uid", of_tensorboard.AtomicCounter(9))
        first = TensorBoard(tmp_path, after_step=0)
        for step in (1, 2, 3):
            first.log(step, {"reward/mean": float(step)})
        first.close("finished")
        resumed = TensorBoard(tmp_path, after_step=1)
        resumed.log(2, {"reward/mean": 20.0})
        resumed.log(3, {"reward/mean": 30.0})
        resumed.truncate_after(2)
        resumed.log(3, {"reward/mean": 300.0})
        resumed.close("finished")
        assert scalars(tmp_path, "reward/mean") == [(1, 1.0), (2, 20.0), (3, 300.0)]

    @pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
    def test_a_tracker_that_is_not_installed_is_named_with_the_cure(
        self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)  # what `import` finds is "not there"
        with pytest.raises(TrackerMissing, match=f"asks for '{name}'.*pip install {name}"):
            check_trackers([name])
        with pytest.raises(TrackerMissing):
            open_tracker(name, tmp_path, TrackingSpec(), {}, 0)
        assert list(tmp_path.iterdir()) == []

    def test_the_identity_of_a_run_stays_and_differs_between_runs(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        assert tracking_id(tmp_path / "a") == tracking_id(tmp_path / "a")
        assert tracking_id(tmp_path / "a") != tracking_id(tmp_path / "b")

    def test_trackers_that_begin_at_once_have_one_identity(self, tmp_path: Path) -> None:
        for turn in range(20):
            folder = tmp_path / f"{turn}"
            folder.mkdir()
            ready = threading.Barrier(8)

            def ask(folder: Path = folder, ready: threading.Barrier = ready) -> str:
                ready.wait()
                return tracking_id(folder)

            with ThreadPoolExecutor(8) as pool:
                found = {one.result() for one in [pool.submit(ask) for _ in range(8)]}
            assert found == {tracking_id(folder)}

    @pytest.mark.parametrize("left", ["", "\n"])
    def test_an_identity_that_a_crash_left_empty_is_made_anew(
        self, tmp_path: Path, left: str
    ) -> None:
        (tmp_path / "tracking_id").write_text(left)
        assert len(tracking_id(tmp_path)) == 16
        assert tracking_id(tmp_path) == tracking_id(tmp_path)
