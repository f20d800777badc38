"""Pushes of the real client to a hub on loopback: what arrives, what is told where nothing does,
and that the token is in no file."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from pydantic import ValidationError

from actors.models import hub as silence
from aligntune.config.records import HubSpec
from aligntune.errors import UserError
from aligntune.report.card import NAME, card
from aligntune.runs.hub import check_hub, left_over
from aligntune.runs.publish import push
from aligntune.runs.reading import open_run
from aligntune.runs.rundir import RunDir
from tests import drivers
from tests.aligntune.preference.test_trainer import write_pairs
from tests.aligntune.report.written import Heard, online_run
from tests.aligntune.runs.loopback import TOKEN, Gate, Hub, Large, Repository, served
from tests.conftest import plain_environment

MINE = HubSpec(push_to="me/sums")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, of which the client is told as users tell it of theirs."""
    with served(tmp_path / "chunks") as one:
        monkeypatch.setenv("HF_ENDPOINT", one.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield one


@pytest.fixture
def by_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files go by LFS, as where hf_xet is not installed."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def trained(tmp_path: Path, tiny_model: Path) -> RunDir:
    """A run with its model, LoRA's adapter beside it, and its card."""
    rundir = RunDir(online_run(tmp_path / "sums"))
    shutil.copytree(tiny_model, rundir.model)
    (rundir.model / "adapter").mkdir()
    shutil.copy(tiny_model / "model.safetensors", rundir.model / "adapter/adapter.safetensors")
    (rundir.model / NAME).write_text(card(open_run(rundir.path), 60))
    return rundir


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def pushed(rundir: RunDir, spec: HubSpec = MINE) -> Heard:
    heard = Heard()
    push(rundir, spec, heard)
    return heard


def reason(heard: Heard) -> str:
    """Why nothing was pushed: one line, without the token."""
    (event,) = heard.events
    assert (event["kind"], event["name"]) == ("not_pushed", "me/sums")
    assert "\n" not in event["reason"]
    assert TOKEN not in event["reason"]
    return str(event["reason"])


@pytest.mark.slow
def test_nothing_is_pushed_unless_asked_for(hub: Hub, trained: RunDir) -> None:
    heard = pushed(trained, HubSpec())
    assert (hub.asked, heard.events, heard.notes) == ([], [], [])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_what_arrives_is_the_export_and_its_card(
    hub: Hub, trained: RunDir, way: str, request: pytest.FixtureRequest
) -> None:
    if way == "lfs":
        request.getfixturevalue("by_lfs")
    exported = files_of(trained.model)
    heard = pushed(trained)
    (event,) = heard.events
    assert event == {"kind": "pushed", "name": "me/sums", "url": f"{hub.address}/me/sums"}
    there = hub.repositories["me/sums"]
    assert there.private
    assert there.files.keys() == exported.keys()
    for path, content in exported.items():
        assert hub.content("me/sums", path, trained.model / path) == content
    assert isinstance(there.files["model.safetensors"], Large)
    assert there.files[NAME] == card(open_run(trained.path), 60).encode()
    assert files_of(trained.model) == exported
    said = {token for call, token in hub.asked if call != "lfs"}  # whose address is a secret
    assert said == {f"Bearer {TOKEN}"}


@pytest.mark.slow
@pytest.mark.parametrize("private", [True, False])
def test_a_name_that_is_there_keeps_who_may_read_it(
    hub: Hub, trained: RunDir, private: bool
) -> None:
    hub.repositories["me/sums"] = there = Repository(private=private)
    heard = pushed(trained, HubSpec(push_to="me/sums", private=False))
    assert heard.events[0]["kind"] == "pushed"
    assert (there.private, there.commits) == (private, 1)


@pytest.mark.slow
def test_what_was_to_be_private_does_not_go_where_anyone_may_read_it(
    hub: Hub, trained: RunDir
) -> None:
    hub.repositories["me/sums"] = there = Repository(private=False)
    said = reason(pushed(trained))
    assert said.startswith("me/sums is public on the hub, and hub.private is true; make it private")
    assert (there.commits, there.files) == (0, {})


@pytest.mark.slow
def test_weights_of_the_model_before_do_not_stay_beside_the_new_ones(
    hub: Hub, trained: RunDir, by_lfs: None
) -> None:
    pushed(trained)
    there = hub.repositories["me/sums"].files
    there |= {"notes.md": b"mine", "onnx/model.safetensors": b"mine too"}
    shutil.rmtree(trained.model / "adapter")
    weights = trained.model / "model.safetensors"
    weights.rename(trained.model / "model-00001-of-00001.safetensors")
    (trained.model / "model.safetensors.index.json").write_text("{}")
    assert pushed(trained).events[0]["kind"] == "pushed"
    assert there.keys() == {*files_of(trained.model), "notes.md", "onnx/model.safetensors"}


def test_files_of_another_model_are_weights_and_adapters_that_this_one_has_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "a[0].safetensors").touch()
    ours = ["a[0].safetensors", "b.safetensors", "b.safetensors.index.json", "adapter/x.json"]
    assert left_over([*ours, "README.md", "x/c.safetensors"], tmp_path) == ours[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "status", "words", "cause", "cure"),
    [
        ("create", 401, "Invalid", "refuses the token (Invalid)", "set HF_TOKEN to one"),
        ("create", 403, "no rights in me", "forbids it (no rights in me)", "may write to me"),
        ("create", 503, f"ill {TOKEN}", "in trouble (503: ill ***)", "wait until it is well"),
        ("create", 404, "no such thing", "no such thing", "mend that"),
        ("preupload", 401, "Invalid credentials", "refuses the token", "HF_TOKEN"),
        ("batch", 403, "storage limit reached", "no room for it (storage limit", "raise me's plan"),
        ("lfs", 507, "full", "no room for it (full)", "make room there"),
        ("commit", 402, "pay first", "no room for it (pay first)", "make room there"),
    ],
)
def test_a_hub_that_refuses_is_one_line_with_the_cure(
    hub: Hub,
    trained: RunDir,
    by_lfs: None,
    call: str,
    status: int,
    words: str,
    cause: str,
    cure: str,
) -> None:
    exported = files_of(trained.model)
    hub.refused[call] = (status, words)
    said = reason(pushed(trained))
    assert cause in said
    assert cure in said
    assert f"call `hf upload me/sums {trained.model} . --private`" in said
    assert files_of(trained.model) == exported
    assert "me/sums" not in hub.repositories or not hub.repositories["me/sums"].files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "cause", "cure"),
    [(401, "refuses the token", "HF_TOKEN"), (403, "forbids it", "has room there")],
)
def test_a_store_of_chunks_that_refuses_is_not_taken_for_a_network_that_is_down(
    hub: Hub, trained: RunDir, status: int, cause: str, cure: str
) -> None:
    hub.refused["token"] = (status, "storage limit reached")  # words that hf_xet does not pass on
    said = reason(pushed(trained))
    assert cause in said
    assert cure in said
    assert not hub.repositories["me/sums"].files


@pytest.mark.slow
def test_a_hub_that_is_not_there_or_too_slow_is_one_line_with_the_cure(
    hub: Hub, trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.held["commit"] = Gate()
    said = reason(pushed(trained, HubSpec(push_to="me/sums", timeout_s=0.3)))
    assert "took too long (it was not done within hub.timeout_s=0.3); raise hub.timeout_s" in said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens not
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        said = reason(pushed(trained))
    assert said.startswith("the hub does not answer (")
    assert "mend the network or HF_ENDPOINT" in said


@pytest.mark.slow
def test_a_hub_that_was_silent_at_the_start_is_asked_again_at_the_end(
    hub: Hub, trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence.why_silent.cache_clear()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", address)
            assert silence.why_silent() is not None
    assert constants.HF_HUB_OFFLINE
    check_hub(MINE)
    assert pushed(trained).events[0]["kind"] == "pushed"


def test_what_cannot_be_pushed_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silence.why_silent.cache_clear()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    check_hub(HubSpec())
    with pytest.raises(UserError, match=r"hub\.push_to=me/sums needs a token; set HF_TOKEN"):
        check_hub(MINE)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE=1 keeps this process from it; unset it"):
        check_hub(MINE)
    with pytest.raises(UserError, match=r"hub\.push_to=me/a--b is no name for the hub: .*--"):
        check_hub(HubSpec(push_to="me/a--b"))
    with pytest.raises(ValidationError, match="should match pattern"):
        HubSpec(push_to="sums")


class Job:
    """`aligntune train` in a process of its own, whose model is there already."""

    def __init__(self, folder: Path, model: Path, hub: Hub) -> None:
        write_pairs(folder / "pairs.jsonl")
        self.rundir = RunDir(folder / "run")
        self._folder = folder
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
        variables |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
        self._variables = json.dumps(variables)
        given = {
            "algorithm": "reward_model",
            "model": {"name": str(model)},
            "data": {"path": str(folder / "pairs.jsonl")},
            "train": {"steps": 2},
            "tracking": {"trackers": []},
            "hub": {"push_to": "me/sums"},
            "output_dir": str(self.rundir.path),
        }
        (folder / "job.yaml").write_text(json.dumps(given))
        program = ["-m", "tests.aligntune.runs.without_ray", str(model)]
        self._line = [*program, "train", str(folder / "job.yaml")]

    def run(self) -> subprocess.CompletedProcess[str]:
        """To its end."""
        environment = plain_environment()
        return drivers.run(self._line, env=environment, timeout=120, given=self._variables)

    def interrupted(self, when: threading.Event, deadline_s: float = 120.0) -> tuple[int, str]:
        """Its exit code and what it printed, with a SIGTERM when `when` is set."""
        with (self._folder / "printed").open("w+b") as output, tempfile.TemporaryFile() as given:
            given.write(self._variables.encode())
            given.seek(0)
            environment = plain_environment()
            process = drivers.start(self._line, env=environment, output=output, given=given)
            try:
                assert when.wait(deadline_s)
                process.send_signal(signal.SIGTERM)
                code = process.wait(deadline_s)
            finally:
                process.kill()
        return code, (self._folder / "printed").read_text()

    def events(self) -> list[dict[str, Any]]:
        """Those of the run directory."""
        lines = (self.rundir.path / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def check_no_token(self) -> None:
        """In no file of the run."""
        for name, content in files_of(self.rundir.path).items():
            assert TOKEN.encode() not in content, name


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, hub: Hub) -> Job:
    return Job(tmp_path, tiny_model, hub)


@pytest.mark.slow
def test_a_run_ends_with_its_model_on_the_hub_and_the_token_in_no_file(job: Job, hub: Hub) -> None:
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert f"the model is on the hub: {hub.address}/me/sums" in done.stdout
    assert [event["kind"] for event in job.events()][-2:] == ["pushed", "run_finished"]
    model = job.rundir.model
    exported = files_of(model)
    assert exported.keys() == hub.repositories["me/sums"].files.keys()
    assert NAME in exported
    for path, content in exported.items():
        assert hub.content("me/sums", path, model / path) == content
    assert TOKEN not in done.stdout + done.stderr
    job.check_no_token()
    assert "done before" in job.run().stdout
    assert hub.repositories["me/sums"].commits == 1


@pytest.mark.slow
def test_a_run_whose_push_fails_has_ended_well_with_its_model(job: Job, hub: Hub) -> None:
    hub.refused["create"] = (401, f"Invalid credentials {TOKEN}")
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert [event["kind"] for event in job.events()][-2:] == ["not_pushed", "run_finished"]
    line = next(line for line in done.stdout.splitlines() if "not_pushed" in line)
    assert "the hub refuses the token (Invalid credentials ***); set HF_TOKEN to one" in line
    assert {"config.json", "model.safetensors", NAME} <= files_of(job.rundir.model).keys()
    assert TOKEN not in done.stdout + done.stderr
    job.check_no_token()


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_pushes_pushes_when_it_is_called_again(
    job: Job, hub: Hub
) -> None:
    hub.held["commit"] = gate = Gate()
    code, printed = job.interrupted(gate.reached)
    assert code == 128 + signal.SIGTERM, printed
    assert "resume with: aligntune train" in printed
    stopped = job.events()[-1]
    assert (stopped["kind"], stopped["reason"]) == ("run_stopped", "stopped by signal 15")
    assert NAME in files_of(job.rundir.model)
    gate.open()
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert [event["kind"] for event in job.events()][-2:] == ["pushed", "run_finished"]
