"""Trackers against the real clients, each in its offline or local mode."""

from __future__ import annotations

import json
import posixpath
import re
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aligntune.config.records import TrackingSpec
from aligntune.errors import UserError
from aligntune.tracking.tables import CHARACTERS, GROUPS, markdown, table
from aligntune.tracking.trackers import (
    SERVICES,
    Ended,
    Tracker,
    check_settings,
    mlflow_name,
    open_tracker,
    tracking_id,
)
from tests.aligntune.report.written import HOSTILE, group

SETTINGS = TrackingSpec(
    trackers=["wandb", "mlflow", "trackio"],
    project="sums",
    name="third try",
    group="sweep",
    tags=["long", "lora"],
    entity="team",
)
BLOCK = 2**15
HELD_OUT = [
    group(7, number, [f"says {number}", HOSTILE[number]], held_out=True) for number in range(5)
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory; no service is asked over a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


ODD = ("len<50", "len>50", "C++", "C:2b::2b:", "正确", "a:b", "..", "a//b", "x" * 260)
ODD += ("mean", "std", "a", "a/mean", "a/mean/std", "::a")  # files and folders of one name
"""Names of rewards that services may not take as they are."""


def figures_at(step: int) -> dict[str, float]:
    odd = {f"reward/{name}/mean": float(place) for place, name in enumerate(ODD)}
    return {"reward/mean": step / 10, "reward/std": 0.0, "loss": 1.0, "loss/router": 2.0, **odd}


def played(name: str, folder: Path, ended: Ended = "finished") -> list[Tracker]:
    """A run of two steps that stopped, and its going on for two more; the second step comes
    again."""
    used = []
    endings: tuple[tuple[int, Ended], ...] = ((0, "stopped"), (2, ended))
    for after, end in endings:
        tracker = open_tracker(name, folder, SETTINGS, {"seed": 1}, after)
        for step in (after + 1, after + 2):
            tracker.log(step, figures_at(step))
        tracker.samples(after, HELD_OUT)
        tracker.truncate_after(after + 1)
        tracker.close(end)
        used.append(tracker)
        second = int(time.time())
        while name == "wandb" and int(time.time()) == second:  # it names folders by the second
            time.sleep(0.01)
    return used


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of W&B's file of an offline run: LevelDB's log format behind seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part of one
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_offline_has_the_run_its_names_figures_tables_and_end(folder: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    played("wandb", folder, "failed")
    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            records.append(record)
    exits = [record.exit.exit_code for record in records if record.HasField("exit")]
    assert exits == [255, 1]
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {tracking_id(folder)}
    (one, *_) = runs
    assert (one.entity, one.project, one.display_name) == ("team", "sums", "third try")
    assert (one.run_group, [*one.tags]) == ("sweep", ["long", "lora"])
    rows = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history}
        for history in (record.history.item for record in records if record.HasField("history"))
    ]
    figures = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert figures == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    tables = folder.glob("wandb/offline-run-*/files/media/table/*.json")
    told = sorted((json.loads(path.read_text()) for path in tables), key=lambda t: t["data"][0])
    assert len(told) == 2
    columns, lines = table(0, HELD_OUT)
    assert told[0]["columns"] == columns
    assert [each["data"][0][0] for each in told] == [0, 2]
    assert told[0]["data"][1][1:] == lines[1][1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ended", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_mlflow_in_a_folder_has_the_run_its_names_figures_tables_and_end(
    folder: Path, ended: Ended, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    def fetch(*_: Any, **options: Any) -> str:
        raise AssertionError("a table is fetched, with all that are before it")

    with monkeypatch.context() as sending:
        sending.setattr(MlflowClient, "download_artifacts", fetch)
        played("mlflow", folder, ended)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("third try", status)
    tags = {key: run.data.tags[key] for key in ("group", "long", "lora", "aligntune_id")}
    own = {"aligntune_id": tracking_id(folder)}
    assert tags == {"group": "sweep", "long": "true", "lora": "true", **own}
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(point.step, point.value) for point in history] == [
        (step, step / 10) for step in (1, 2, 3, 4)
    ]
    last = figures_at(4)
    assert {name: run.data.metrics[mlflow_name(name, last)] for name in last} == last
    assert mlflow_name("reward/C++/mean") == "reward/C:2b::2b:/mean"
    assert mlflow_name("loss/router") == "loss/router"
    assert mlflow_name("loss/router", last) == "::loss/router"
    names = [each.path for each in client.list_artifacts(run.info.run_id, "samples")]
    assert names == ["samples/step-000000.json", "samples/step-000002.json"]
    shown = client.load_table(run.info.experiment_id, names[-1], [run.info.run_id])
    assert len(shown) == GROUPS * 2
    assert set(shown["step"]) == {2}
    assert list(shown["completion"])[:2] == ["says 0", HOSTILE[0]]


@pytest.mark.slow
def test_a_config_that_mlflow_did_not_take_holds_up_no_figures_and_goes_with_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    def refuse(*_: Any) -> None:
        raise PermissionError("403")

    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "log_dict", refuse)
        with pytest.raises(PermissionError):
            open_tracker("mlflow", folder, SETTINGS, {"seed": 1}, 0)
        tracker = open_tracker("mlflow", folder, SETTINGS, {"seed": 1}, 0)
        tracker.log(1, {"reward/mean": 0.5})
        with pytest.raises(PermissionError):
            tracker.samples(1, HELD_OUT)
    tracker.samples(1, HELD_OUT)
    (written,) = (folder.parent / "mlflow").rglob("config.json")
    assert json.loads(written.read_text()) == {"seed": 1}


@pytest.mark.slow
@given(
    st.sets(
        st.one_of(
            st.text("a_.:/<2b正\n\ud800", min_size=1),
            st.lists(st.sampled_from(["a", "<", "::a", ""]), min_size=1).map("/".join),
        ).map(lambda name: f"reward/{name}")
    )
)
def test_mlflow_takes_every_name_each_is_another_and_none_a_folder_of_another(
    names: set[str],
) -> None:
    found = {mlflow_name(name, names) for name in names}
    assert len(found) == len(names)
    folders = {name[:at] for name in found for at in range(len(name)) if name[at] == "/"}
    assert not found & folders
    for name in found:
        assert re.fullmatch(r"[/\w.\- :]+", name)
        assert posixpath.normpath(name) == name
    plain = {name for name in names if not set(name) & set(":<\n\ud800")}
    plain = {name for name in plain if not any(name.startswith(f"{one}/") for one in names)}
    assert found >= {name for name in plain if posixpath.normpath(name) == name}


@pytest.mark.slow
def test_trackio_in_a_folder_has_the_run_its_figures_and_tables(folder: Path) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    first, second = played("trackio", folder)
    name = f"third try-{tracking_id(folder)}"
    assert first._run.name == second._run.name == name  # type: ignore[attr-defined]
    logs = SQLiteStorage.get_logs("sums", name)
    figures = [(row["step"], row["reward/mean"]) for row in logs if "reward/mean" in row]
    assert sorted(figures) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    tables = [row["samples"] for row in logs if "samples" in row]
    assert len(tables) == 2
    assert {each["_type"] for each in tables} == {"trackio.table"}


def test_tensorboard_shows_the_samples_as_text(folder: Path) -> None:
    tracker = open_tracker("tensorboard", folder, TrackingSpec(), {}, 0)
    tracker.samples(7, HELD_OUT)
    tracker.close("finished")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (shown,) = events.Tensors("samples/text_summary")
    (text,) = shown.tensor_proto.string_val
    assert shown.step == 7
    assert text.decode().startswith("| step | row | prompt | completion | reward | exact_match |")


def test_a_table_has_a_line_a_completion_of_the_first_groups() -> None:
    columns, lines = table(7, HELD_OUT)
    named = ["prompt", "completion", "reward", "exact_match", "format", "tokens"]
    assert columns == ["step", "row", *named]
    assert [line[1] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    lost = {**HELD_OUT[0], "completions": [{**HELD_OUT[0]["completions"][0], "text": None}]}
    (line,) = table(7, [lost])[1]
    assert line[3] is None
    long = {**HELD_OUT[0], "prompt": "x" * 2 * CHARACTERS + "\ud800"}
    assert table(7, [long])[1][0][2] == "x" * CHARACTERS + "…"


def test_a_criterion_that_is_called_as_another_column_has_one_of_its_own() -> None:
    said = {**HELD_OUT[0]["completions"][0], "scores": {"reward": 0.25, "tokens": -3.0}}
    columns, (line,) = table(7, [{**HELD_OUT[0], "completions": [{**said, "reward": 0.5}]}])
    told = dict(zip(columns, line, strict=True))
    assert (told["reward"], told["reward/reward"], told["reward/tokens"]) == (0.5, 0.25, -3.0)
    assert told["tokens"] == said["tokens"]


def test_a_table_as_markdown_holds_one_line_a_row_whatever_is_said() -> None:
    lines = markdown(["a", "b"], [["x|y\nz", 0.25], ["<script>", None]]).splitlines()
    assert lines == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y<br>z | 0.25 |",
        "| &lt;script> |  |",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trackers": ["tensorboard"], "group": "g"}, "tracking.group is for wandb, mlflow, track"),
        ({"trackers": ["mlflow"], "entity": "e"}, "tracking.entity is for wandb, and"),
        ({"trackers": ["prometheus"], "project": "p"}, "tracking.project is for wandb, mlflow, t"),
        ({"trackers": [], "tags": ["t"]}, "it would be ignored; add one, or remove it"),
    ],
)
def test_a_setting_that_no_chosen_tracker_takes_is_refused(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_settings(TrackingSpec(**settings))
    check_settings(SETTINGS)


def test_the_run_directory_names_a_run_that_has_no_name_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def init(**settings: Any) -> Any:
        given.update(settings)
        return types.SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    make: Callable[..., Tracker] = SERVICES["wandb"]
    make(folder, TrackingSpec(trackers=["wandb"]), {})
    assert (given["name"], given["group"], given["tags"], given["entity"]) == (
        "run",
        None,
        None,
        None,
    )
