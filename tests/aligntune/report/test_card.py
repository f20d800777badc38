"""The model card, from run directories as runs leave them, and the push to a hub that stands in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from pydantic import ValidationError

from aligntune.config.records import HubSpec
from aligntune.errors import UserError
from aligntune.evaluation.statistics import bootstrap, wilson
from aligntune.evaluation.store import Decoded, Summary, write_evaluation
from aligntune.evaluation.summary import Success
from aligntune.report.card import NAME, card, write_card
from aligntune.runs import publish
from aligntune.runs.publish import check_hub, push, write_card_of
from aligntune.runs.reading import open_run
from aligntune.runs.rundir import RunDir
from tests.aligntune.report.written import online_run, preference_run

TOKEN = "hf_secretsecretsecretsecret"


class Heard:
    """What a run would write and show."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def wait(self) -> None: ...

    def event(self, kind: str, **fields: str) -> None:
        self.events.append({"kind": str(kind), **fields})

    def note(self, text: str) -> None:
        self.notes.append(text)


def head(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def summary_of(step: int) -> Summary:
    figures = {"reward": bootstrap([0.5, 1.0, 0.0]), "pass@1": wilson(2, 3)}
    return Summary(
        name=f"export-{step:06d}",
        time="2026-11-27T00:00:00+00:00",
        model="m",
        origin="export",
        step=step,
        run=None,
        data="data/test.jsonl",
        prompts=3,
        failed=0,
        success=Success(criterion="exact_match", at_least=1.0),
        answers="the whole completion",
        confidence=0.95,
        seed=1,
        seconds=1.0,
        versions=[],
        decodings={"greedy": Decoded(completions=1, temperature=0.0, figures=figures)},
    )


def test_a_card_says_what_of_what_by_what_with_which_results(tmp_path: Path) -> None:
    folder = online_run(tmp_path / "sums")
    text = card(open_run(folder), 60)
    assert head(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "models/qwen",
        "datasets": ["data/train.jsonl"],
        "tags": ["aligntune", "grpo"],
    }
    assert "[models/qwen](https://huggingface.co/models/qwen), trained by GRPO for 60 steps" in text
    assert "| `algorithm.beta` | `0.1` | `0.04` |" in text
    assert "| `policy.learning_rate` |" in text
    assert "- torch 2.13.0" in text
    assert "| On held-out prompts, during training | step 0 | step 60 |" in text
    assert "| reward/mean | 0.3 [0.251, 0.349] | 0.9 [0.851, 0.949] |" in text
    assert "AutoModelForCausalLM.from_pretrained" in text


def test_evaluations_of_its_step_are_in_it_with_their_intervals(tmp_path: Path) -> None:
    folder = online_run(tmp_path / "sums")
    for step in (50, 60):
        write_evaluation(folder / "evaluations", summary_of(step), [])
    text = card(open_run(folder), 60)
    assert text.count("| data/test.jsonl, 3 prompts | greedy |") == 1
    assert "| pass@1 | 0.6667 [0.2077, 0.9385] |" in text
    assert "A completion passes with exact_match >= 1." in text


def test_local_models_and_data_are_named_and_not_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = online_run(tmp_path / "sums")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    text = card(open_run(folder), 60)
    assert "base_model" not in head(text)
    assert "\n`models/qwen`, trained by GRPO" in text


def test_a_preference_job_has_a_card_too_and_a_reward_model_no_chat(tmp_path: Path) -> None:
    folder = preference_run(tmp_path / "dpo")
    text = card(open_run(folder), 40)
    assert "trained by DPO for 40 steps" in text
    assert "| reward/accuracy | 0.5 | 0.9 |" in text
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: dpo, beta: 0.1", "name: reward_model"))
    text = card(open_run(folder), 40)
    assert head(text)["pipeline_tag"] == "text-classification"
    assert "aligntune chat" not in text


def test_a_card_that_cannot_be_written_is_an_event(tmp_path: Path) -> None:
    rundir, heard = RunDir(online_run(tmp_path / "sums")), Heard()
    write_card_of(rundir, 60, heard)
    (event,) = heard.events
    assert event["kind"] == "card_failed"
    assert event["reason"].startswith("FileNotFoundError: ")
    rundir.model.mkdir()
    write_card_of(rundir, 60, heard)
    assert (rundir.model / NAME).read_text() == card(open_run(rundir.path), 60)
    assert len(heard.events) == 1


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a push of small files calls."""

    asked: list[tuple[str, str, str, dict[str, Any] | list[dict[str, Any]]]]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        token, path = self.headers.get("authorization", ""), self.path
        lines = [json.loads(line) for line in body.splitlines()]
        self.asked.append((path, token, self.command, lines))
        if self.refuses:
            self.answer(403, {"error": f"no room for {token}"})
        elif path == "/api/repos/create":
            self.answer(200, {"url": f"{self.home}/me/{lines[0]['name']}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in lines[0]["files"]
            ]
            self.answer(200, {"files": files})
        elif path.endswith("/commit/main"):
            self.answer(200, {"commitUrl": f"{self.home}/me/sums/commit/a", "commitOid": "a"})
        else:
            self.answer(404, {})

    @property
    def home(self) -> str:
        """Its address, as the client knows it."""
        return f"http://{self.headers['Host']}"

    def do_GET(self) -> None:
        self.answer(404, {})

    def answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, which the client is told of as users tell it of theirs."""

    class Own(Hub):
        asked = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Own
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def trained(tmp_path: Path) -> RunDir:
    rundir = RunDir(online_run(tmp_path / "sums"))
    rundir.model.mkdir()
    (rundir.model / "config.json").write_text("{}")
    write_card(open_run(rundir.path), rundir.model, 60)
    return rundir


def test_nothing_is_pushed_unless_asked_for(hub: type[Hub], trained: RunDir) -> None:
    heard = Heard()
    push(trained, HubSpec(), heard)
    assert (hub.asked, heard.events) == ([], [])


def test_a_model_is_pushed_with_its_card_and_the_token_is_written_nowhere(
    hub: type[Hub], trained: RunDir
) -> None:
    heard = Heard()
    push(trained, HubSpec(push_to="me/sums"), heard)
    (event,) = heard.events
    assert event["kind"] == "pushed", event
    assert event["url"].endswith("/me/sums")
    assert {token for _, token, *_ in hub.asked} == {f"Bearer {TOKEN}"}
    (created,) = [lines for path, *_, lines in hub.asked if path == "/api/repos/create"]
    assert isinstance(created, list)
    assert created[0]["visibility"] == "private"
    (commit,) = [lines for path, *_, lines in hub.asked if path.endswith("/commit/main")]
    assert isinstance(commit, list)
    files = {line["value"]["path"] for line in commit if line["key"] == "file"}
    assert files == {"config.json", NAME}
    for path in trained.path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_a_hub_that_refuses_or_is_not_there_is_one_line_and_no_end(
    hub: type[Hub], trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    monkeypatch.setattr(hub, "refuses", True)
    push(trained, HubSpec(push_to="me/sums"), heard)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    push(trained, HubSpec(push_to="me/sums"), heard)
    monkeypatch.setattr(publish, "pushed_to", lambda *_: threading.Event().wait(5))
    push(trained, HubSpec(push_to="me/sums", timeout_s=0.01), heard)
    refused, gone, late = heard.events
    assert {event["kind"] for event in heard.events} == {"not_pushed"}
    assert "403" in refused["reason"]
    assert "\n" not in refused["reason"]
    assert TOKEN not in refused["reason"]
    assert "Connect" in gone["reason"]
    assert late["reason"] == "no end within 0.01 s"


def test_without_a_token_it_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    check_hub(HubSpec())
    with pytest.raises(UserError, match=r"hub\.push_to=me/sums needs a token; set HF_TOKEN"):
        check_hub(HubSpec(push_to="me/sums"))
    with pytest.raises(ValidationError, match="should match pattern"):
        HubSpec(push_to="sums")
