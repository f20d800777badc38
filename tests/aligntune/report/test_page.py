"""The page without a browser: what is in it, what it may do, and of which runs it can be made."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.commands.look_cli import report
from aligntune.errors import UserError
from aligntune.report.page import EVENTS, STARTS, embedded
from aligntune.report.settings import settings as of_runs
from aligntune.report.write import write_report
from aligntune.runs.reading import open_run
from aligntune.tracking.metrics import EventKind
from tests.aligntune.report.written import (
    HOSTILE,
    figures,
    group,
    lines,
    online_run,
    preference_run,
)


class Reader(HTMLParser):
    """Attributes, texts and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def read(*runs: Path) -> Reader:
    return Reader(write_report(runs, runs[0] / "out.html").read_text(encoding="utf-8"))


def test_a_finished_run_in_words(tmp_path: Path) -> None:
    page = read(online_run(tmp_path / "sums"))
    for told in (
        "The run finished after 60 steps.",
        "Held-out reward went from 0.300 to 0.900.",
        "Groups: 37 trained on, 1 filtered, 1 quarantined.",
        "A step took 42 s (median)",
        "The run warned Step 60: 60 % of the groups are constant: take harder or easier data",
        "40 = 37 + 1 + 1 + 1",
        "grpo of models/qwen",
        "decided: no GPU computes here",
        "ran with engine: vllm 0.32.0",
        "replica lost replica rollout-0.0 reason its process died",
    ):
        assert told in page.said, told


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        ("run_stopped", "The run stopped after step 10 of 300: stopped by signal 2."),
        ("", "The run ended without a word after step 10 of 300: its process was killed, or"),
    ],
)
def test_a_run_that_ended_otherwise_is_told_so_and_a_torn_line_is_no_obstacle(
    tmp_path: Path, ended: str, told: str
) -> None:
    run = online_run(tmp_path / "run", steps=10, ended=ended)
    for name in ("metrics", "evals", "samples", "eval_samples", "events", "ledger"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 11, "rew')
    page = read(run)
    assert told in page.said
    assert page.data["runs"][0]["steps"]["steps"] == list(range(1, 11))


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("algorithm: grpo\n")
    assert "after step 0" in read(run).said
    rows = [{"step": 1, "kl/reference": sys.float_info.max}, {"step": 2, "kl/reference": 1.0}]
    lines(run / "metrics.jsonl", rows)
    assert read(run).data["runs"][0]["steps"]["values"] == {"kl/reference": [None, 1]}


def test_a_run_that_goes_on_tells_why_a_setting_was_decided_when_it_began(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", steps=3)
    kept = "as the run in output_dir has it"
    settled = [
        ("model.dtype", "float32", "no GPU computes here"),
        ("policy.learning_rate", 1e-5, "of that strategy"),
        None,
        ("model.dtype", "float32", kept),
        ("policy.learning_rate", 2e-5, kept),  # which somebody has set in between
        ("train.seed", 1, "by lot"),
        None,
        ("model.dtype", "float32", kept),
        ("policy.learning_rate", 2e-5, kept),
    ]
    keys = ("path", "value", "why")
    events = [
        {"kind": "settled", **dict(zip(keys, one, strict=True))} if one else {"kind": "run_started"}
        for one in settled
    ]
    lines(run / "events.jsonl", [{"time": 1.795e9, **event} for event in events])
    why = {each.path: each.why for each in of_runs([open_run(run)]) if each.why}
    assert why == {"model.dtype": "no GPU computes here", "policy.learning_rate": kept}


@pytest.mark.slow
def test_what_differs_from_the_defaults_is_marked_with_them(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run")
    text = (run / "out.html").write_text("") or write_report([run]).read_text()
    rows = re.findall(r'<tr class="(own|plain)">\s*<th scope="row"><code>([\w.]+)', text)
    marks = {path: mark for mark, path in rows}
    assert marks["algorithm.beta"] == "own"
    assert marks["train.steps"] == "plain"
    assert re.search(r"policy\.learning_rate.*?<td>1e-05</td>\s*<td.*?>1e-06</td>", text, re.DOTALL)
    (run / "defaults.json").unlink()
    assert "no defaults.json" in read(run).said


def test_the_page_names_the_one_script_that_may_run_and_loads_nothing(tmp_path: Path) -> None:
    page = read(online_run(tmp_path / "run", steps=3))
    policy = next(value for _, value in page.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none';")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert len(page.scripts) == 2
    links = [v for name, v in page.attributes if name in ("href", "src", "action", "srcset")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "style" not in {name for name, _ in page.attributes}


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", steps=2)
    row = group(1, 0, texts=HOSTILE)
    lines(run / "samples.jsonl", [row])
    lines(
        run / "events.jsonl",
        [{"time": 1.0, "kind": "run_stopped", "reason": text} for text in HOSTILE],
    )
    page = read(run)
    assert len(page.scripts) == 2
    assert "img" not in {value for _, value in page.attributes}
    assert [said["text"] for said in page.data["runs"][0]["samples"][0]["completions"]] == list(
        HOSTILE
    )


@settings(max_examples=60)
@given(st.lists(st.text()) | st.dictionaries(st.text(), st.text()))
def test_whatever_is_embedded_comes_back_and_holds_no_markup(data: Any) -> None:
    text = embedded([data, "\ud800</script>\u2028"])
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.encode()
    assert json.loads(text)[0] == data


def test_two_runs_have_their_curves_and_their_differences(tmp_path: Path) -> None:
    first = online_run(tmp_path / "first", steps=5)
    second = online_run(tmp_path / "second", steps=8)
    text = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(text.replace("seed: 1", "seed: 2"))
    page = read(first, second)
    assert [run["name"] for run in page.data["runs"]] == ["first", "second"]
    assert [len(run["steps"]["steps"]) for run in page.data["runs"]] == [5, 8]
    text = write_report([first, second]).read_text()
    differing = re.findall(r'<tr class="own">\s*<th scope="row"><code>([\w.]+)', text)
    assert differing == ["train.seed"]


def test_two_runs_in_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = read(online_run(tmp_path / "a" / "run"), online_run(tmp_path / "b" / "run"))
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run"]
    assert list(page.data["lengths"]["counts"]) == ["a/run: last quarter", "b/run: last quarter"]
    for heading in ("a/run and b/run", "Versions of a/run", "Versions of b/run"):
        assert heading in page.said


def test_a_preference_job_has_its_own_curves_and_no_samples(tmp_path: Path) -> None:
    page = read(preference_run(tmp_path / "prefs"))
    assert "Held-out accuracy went from 0.500 to 0.900." in page.said
    titles = {chart["title"] for chart in page.data["charts"]}
    assert {"Accuracy", "Margin", "Chosen and rejected", "Loss"} <= titles
    drawn = {chart["title"]: chart["curves"] for chart in page.data["charts"]}
    assert [curve["label"] for curve in drawn["Loss"]] == ["training", "held-out"]
    assert page.data["runs"][0]["steps"]["values"]["loss"][-1] == 0.093381
    assert "epoch" in titles
    assert "Samples" not in page.said


@pytest.mark.slow
def test_a_long_run_makes_a_page_of_bounded_size_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligntune.report.page.SAMPLE_BYTES", 2**20)
    run = online_run(tmp_path / "run", steps=20)
    lines(run / "metrics.jsonl", [figures(n, 5000, 0.5) for n in range(1, 5001)])
    rows = [group(n, n, texts=["x" * 2000]) for n in range(1, 2001)]  # 5 MB
    lines(run / "samples.jsonl", rows)
    event = {"time": 1.0, "kind": "group_retried", "reason": "why"}
    lines(run / "events.jsonl", [event] * (EVENTS + 7))
    began = time.monotonic()
    page = read(run)
    assert time.monotonic() - began < 15  # 1 s on an idle machine
    assert (run / "out.html").stat().st_size < 3 * 2**20
    assert page.data["runs"][0]["steps"]["steps"][-1] == 5000
    assert len(page.data["runs"][0]["steps"]["steps"]) <= 2000
    assert page.data["runs"][0]["samples"][-1]["step"] == 2000
    (about,) = re.findall(r"of about (\d),(\d{3}) groups are here", page.said)
    assert int("".join(about)) == pytest.approx(2028, rel=0.03)
    assert "7 earlier ones are in events.jsonl" in page.said


def test_a_small_run_makes_a_small_page(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", steps=3)
    (run / "samples.jsonl").unlink()
    (run / "eval_samples.jsonl").unlink()
    assert write_report([run]).stat().st_size < 200_000


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        write_report([tmp_path])


@pytest.mark.slow
def test_a_report_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", steps=3)
    script = (
        "import sys\nfrom aligntune.cli import main\n"
        "try:\n    main(['report', sys.argv[1]])\n"
        "finally:\n"
        "    print([m for m in ('torch', 'ray', 'numpy', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == (f"{run / 'report.html'}\n[]\n", "")


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_event_by_which_something_went_wrong_is_marked(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", steps=1)
    lines(run / "events.jsonl", [{"time": 1.0, "kind": kind} for kind in EventKind])
    text = write_report([run]).read_text()
    items = re.findall(r'<li class="(\w*)">\s*<time.*?</time>\s*<div><b>([a-z ]+)</b>', text)
    marks = {name.replace(" ", "_"): mark for mark, name in items}
    assert marks.keys() == set(EventKind)
    assert {kind for kind, mark in marks.items() if mark == "usual"} == {*STARTS}
    assert {kind for kind, mark in marks.items() if not mark} == {
        "rows_dropped",
        "resumed",
        "run_stopped",
        "run_finished",
        "replica_restarted",
        "replica_joined",
        "policy_rebuilt",
        "checkpoint_saved",
        "pushed",
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out_from_their_ground(scheme: str) -> None:
    """Contrast as WCAG 2.2 asks for: 4.5 of text, 3 of lines that mean something."""
    css = (resources.files("aligntune.report") / "assets" / "page.css").read_text()
    found = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", css.partition("@media")[0]))
    if scheme == "dark":
        dark = css.partition("@media (prefers-color-scheme: dark)")[2].partition("\n}")[0]
        found |= dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", dark))
    for text in ("ink", "quiet", "accent", "good", "bad"):
        for ground in ("page", "panel", "soft"):
            assert _contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for ground in ("mark", "added", "removed"):
        assert _contrast(found["ink"], found[ground]) >= 4.5, ground
    for line in [f"s{n}" for n in range(1, 9)]:
        assert _contrast(found[line], found["panel"]) >= 3, line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_of_a_run_that_is_for_reading_alone_the_report_is_asked_for_elsewhere(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "report.html"))

    monkeypatch.setattr("aligntune.report.write.write_atomically", refused)
    with pytest.raises(UserError, match=r"cannot be written: .*; name a file elsewhere by --out"):
        report(online_run(tmp_path / "run"))
