"""Jobs: what is packed, what is refused before anything is sent, and logs that are followed."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.cli import main
from aligntune.commands import submit
from aligntune.commands.places import not_here
from cluster.jobs.client import (
    ConnectionLost,
    Jobs,
    JobsError,
    JobStatus,
    Once,
    exit_code,
    nearest_ids,
)
from cluster.jobs.packaging import Package, PackagingError, chosen_files, limit_bytes, packed
from cluster.jobs.secrets import ERASED

# Packing


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("repository", [True, False])
def test_what_gitignore_names_stays_here(tmp_path: Path, repository: bool) -> None:
    write(tmp_path, "train.py", "data/train.jsonl", "runs/a/model.bin", "src/x.tmp", "src/x.py")
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "src" / ".gitignore").write_text("*.tmp\n")
    if repository:
        git(tmp_path, "init", "-q")
    assert chosen_files(tmp_path) == (
        ".gitignore",
        "data/train.jsonl",
        "src/.gitignore",
        "src/x.py",
        "train.py",
    )


def test_a_package_says_that_checkpoints_of_runs_are_in_it(tmp_path: Path) -> None:
    write(tmp_path, "train.py", "runs/a/checkpoints/step-000050/policy.pt", "runs/a/config.yaml")
    with packed(tmp_path) as package:
        assert "; with checkpoints of runs/a: .gitignore can leave them out" in package.describe()
    (tmp_path / ".gitignore").write_text("runs/\n")
    with packed(tmp_path) as package:
        assert "checkpoints" not in package.describe()


def test_tracked_files_travel_though_ignored_and_removed_ones_do_not(tmp_path: Path) -> None:
    write(tmp_path, "kept.bin", "removed.py", "new.py")
    (tmp_path / ".gitignore").write_text("*.bin\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-f", "kept.bin", "removed.py")
    (tmp_path / "removed.py").unlink()
    assert chosen_files(tmp_path) == (".gitignore", "kept.bin", "new.py")


def test_two_links_to_one_folder_both_travel(tmp_path: Path) -> None:
    write(tmp_path, "real/data.txt")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / "real")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    assert chosen_files(tmp_path) == ("a/data.txt", "b/data.txt", "real/data.txt")


def test_nested_repositories_travel_and_a_link_that_leads_back_ends(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "inner/b.py", "inner/skipped.log")
    git(tmp_path, "init", "-q")
    git(tmp_path / "inner", "init", "-q")
    (tmp_path / "inner" / ".gitignore").write_text("*.log\n")
    (tmp_path / "inner" / "loop").symlink_to(tmp_path)
    assert chosen_files(tmp_path) == ("a.py", "inner/.gitignore", "inner/b.py")


def test_without_git_a_gitignore_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    write(tmp_path, "a.py", "b/c.py")
    assert chosen_files(tmp_path) == ("a.py", "b/c.py")
    (tmp_path / "b" / ".gitignore").write_text("c.py\n")
    with pytest.raises(PackagingError, match="no git here to read it"):
        chosen_files(tmp_path)


@pytest.mark.parametrize("target", ["/proc/self/environ", "..", "../beside.txt"])
def test_a_link_that_leads_out_is_refused_with_where_it_leads(tmp_path: Path, target: str) -> None:
    write(tmp_path, "beside.txt", "work/train.py")
    (tmp_path / "work" / "link").symlink_to(target)
    with pytest.raises(PackagingError, match="links that lead out of it: link"):
        packed(tmp_path / "work").__enter__()
    (tmp_path / "work" / ".gitignore").write_text("link\n")
    with packed(tmp_path / "work") as package:
        assert package.files == (".gitignore", "train.py")


def test_the_working_directory_may_itself_be_a_link(tmp_path: Path) -> None:
    write(tmp_path, "real/a.py")
    (tmp_path / "there").symlink_to(tmp_path / "real")
    with packed(tmp_path / "there") as package:
        assert package.files == ("a.py",)


SECRETS = {
    ".env": "",
    "deep/.env.production": "",
    ".ssh/known_hosts": "",
    "id_ed25519": "",
    "server.pem": "",
    "notes.txt": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "src/settings.py": "KEY = 'AKIA" + "ABCDEFGHIJKLMNOP'",
    "upload.sh": "export HF_TOKEN=hf_" + "a" * 34,
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_travels_only_where_it_is_allowed_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, "train.py", name)
    (tmp_path / name).write_text(SECRETS[name])
    with pytest.raises(PackagingError, match=re.escape(f"look like secrets: {name} (")) as error:
        packed(tmp_path).__enter__()
    assert "AKIAAB" not in str(error.value)
    with packed(tmp_path, allowed=[f"./{name}"]) as package:
        assert name in package
    with pytest.raises(PackagingError, match="--allow other: no such file travels"):
        packed(tmp_path, allowed=[name, "other"]).__enter__()


def test_what_only_sounds_like_a_secret_travels(tmp_path: Path) -> None:
    names = (".env.example", "environment.yml", "keys.py", "tokenizer.json", "secretary.txt")
    write(tmp_path, *names)
    with packed(tmp_path) as package:
        assert package.files == tuple(sorted(names))


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "b/c.py")
    with packed(tmp_path) as package:
        before = package.archive.read_bytes()
    os.utime(tmp_path / "a.py", (1, 1))
    with packed(tmp_path) as package:
        assert package.archive.read_bytes() == before
        assert "b" in package
        assert "b/c.py" in package
        assert "b/c" not in package
        assert package.nbytes == len(before)
    assert not package.archive.exists()


@pytest.mark.parametrize("times", [2, 5])
def test_a_working_directory_over_the_limit_is_refused_with_its_largest_files(
    tmp_path: Path, times: int
) -> None:
    write(tmp_path, "small.py")
    (tmp_path / "large.bin").write_bytes(os.urandom(times * 10_000))
    with pytest.raises(PackagingError, match=r"large\.bin \(0\.0 MiB\), small\.py"):
        packed(tmp_path, limit=10_000).__enter__()


def test_the_limit_is_that_of_a_request_to_the_jobs_server() -> None:
    assert limit_bytes() == 100 * 2**20


# Following


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    text=st.text(max_size=60),
    cuts=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), max_size=6),
)
def test_a_text_sent_again_and_again_comes_out_once(text: str, cuts: list[tuple[int, int]]) -> None:
    log, out = Once(), ""
    for size, end in [*cuts, (7, len(text))]:
        log.restart()
        sent = text[:end]
        for start in range(0, len(sent), size):
            out += log.feed(sent[start : start + size])
    assert out == text


@dataclass
class Server:
    """A Jobs server of one job, whose log comes in `connections`, each broken off at its end."""

    port: int
    log: str = ""
    connections: list[int] = field(default_factory=list)  # characters sent in each
    refusals: dict[str, int] = field(default_factory=dict)  # HTTP status by path
    job: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)  # method and path
    submitted: dict[str, Any] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)  # by name

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/")
        self.seen.append((request.method, path))
        if status := self.refusals.get(path):
            return web.Response(status=status, text="no")
        match path:
            case "/api/version":
                return web.json_response({"ray_version": "2.60.0"})
            case "/api/jobs" if request.method == "POST":
                self.submitted = await request.json()
                return web.json_response({"job_id": None, "submission_id": "one"})
            case "/api/jobs":
                return web.json_response([self.job])
            case "/api/jobs/one":
                return web.json_response(
                    self.job | {"status": "RUNNING" if self.connections else "SUCCEEDED"}
                )
            case "/api/jobs/one/logs":
                return web.json_response({"logs": self.log})
            case "/api/jobs/one/logs/tail":
                ws = web.WebSocketResponse()
                await ws.prepare(request)
                for start in range(0, self.connections.pop(0), 5):
                    await ws.send_str(self.log[start : start + 5])
                request.transport.abort() if self.connections else await ws.close()
                return ws
        if request.method == "PUT" and path.startswith("/api/packages/gcs/"):
            self.uploaded[path.rpartition("/")[2]] = await request.read()
            return web.Response()
        return web.Response(status=404, text=f"Job {path.split('/')[3]} does not exist")


@pytest.fixture
def server() -> Iterator[Server]:
    """See `Server`."""
    loop = asyncio.new_event_loop()
    made = Server(0, job={"type": "SUBMISSION", "submission_id": "one", "entrypoint": "x"})
    made.job["status"] = "SUCCEEDED"
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        made.port = site._server.sockets[0].getsockname()[1]

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield made
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.mark.slow
def test_a_log_whose_connection_breaks_is_printed_once(server: Server) -> None:
    server.log = "".join(f"step {i}\n" for i in range(20))
    server.connections = [23, 7, 90, 61]
    out: list[str] = []
    notes: list[str] = []
    job = Jobs(server.url).follow("one", out.append, note=notes.append)
    assert "".join(out) == server.log
    assert exit_code(job) == 0
    assert notes


@pytest.mark.slow
def test_a_connection_that_does_not_come_back_is_given_up(server: Server) -> None:
    server.log = "step 1\n"
    server.connections = [7, 7]
    server.refusals = {"/api/jobs/one/logs/tail": 503}
    with pytest.raises(ConnectionLost, match="job one may still run"):
        Jobs(server.url).follow("one", lambda text: None, reconnect_s=0.2)


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 143)],
)
def test_the_exit_code_is_that_of_the_entrypoint(
    status: str, code: int | None, wanted: int
) -> None:
    job = SimpleNamespace(status=JobStatus(status), driver_exit_code=code)
    assert exit_code(job) == wanted


class Interrupted:
    """A job that runs until the second time it is followed."""

    address = "http://head:8265"

    def __init__(self, interruptions: int) -> None:
        self.left = interruptions
        self.stopped = False
        self.logs_of: list[Once] = []

    def follow(self, job_id: str, write: Any, note: Any, log: Once) -> Any:
        self.logs_of.append(log)
        if self.left:
            self.left -= 1
            raise KeyboardInterrupt
        return SimpleNamespace(status=JobStatus.SUCCEEDED, driver_exit_code=0)

    def get(self, job_id: str) -> Any:
        status = JobStatus.STOPPED if self.stopped else JobStatus.RUNNING
        return SimpleNamespace(
            status=status, metadata={"run_dir": "/shared/run"}, driver_exit_code=None
        )

    def stop(self, job_id: str) -> Any:
        self.stopped = True
        return self.get(job_id)

    def logs(self, job_id: str) -> str:
        return "aligntune: stopped by signal 15\n"


@pytest.mark.parametrize(
    ("answers", "code", "stopped"),
    [(["c"], 0, False), (["what?", "d"], 130, False), (["s"], 143, True)],
)
def test_ctrl_c_asks_what_becomes_of_the_job(
    answers: list[str], code: int, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, said = Interrupted(1), list[str]()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: answers.pop(0))
    assert submit.follow(jobs, "one", said.append, said.append) == code  # type: ignore[arg-type]
    assert (jobs.stopped, answers) == (stopped, [])
    assert len({id(log) for log in jobs.logs_of}) == 1, "what was printed comes again"
    if stopped:
        assert "/shared/run/checkpoints" in "\n".join(said)


def test_without_a_terminal_ctrl_c_says_how_to_stop_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs, said = Interrupted(1), list[str]()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    assert submit.follow(jobs, "one", said.append, said.append) == 130  # type: ignore[arg-type]
    assert "aligntune jobs stop one --address http://head:8265" in "\n".join(said)
    assert not jobs.stopped


def test_ids_that_are_near_are_named_else_the_last() -> None:
    known = ["run-1", "grpo-17ab", "grpo-99cd"]
    assert nearest_ids("grpo-17aa", known) == "did you mean grpo-17ab?"
    assert nearest_ids("zzzzzz", known) == "the last are run-1, grpo-17ab, grpo-99cd"
    assert "no job" in nearest_ids("a", [])


# Wrong input


Fail = Callable[..., str]


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a config and what it names."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(10, 18)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "algorithm": "grpo",
        "model": {"name": str(tiny_model)},
        "data": {"path": "data.jsonl"},
        "rewards": ["exact_match"],
        "output_dir": str(tmp_path / "run"),
        "train": {"steps": 1, "groups_per_step": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture
def fail(project: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> Fail:
    """Runs a command that must end with exit code 2; returns its one line."""

    def run(*arguments: str, address: str = "") -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--address", address or server.url])
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2, error
        assert "\n" not in error
        assert {method for method, _ in server.seen} <= {"GET"}, "something was sent"
        return error

    return run


@pytest.mark.slow
def test_a_head_that_refuses_connections(fail: Fail) -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert f"no Ray Jobs server answers at {address}" in fail("jobs", "list", address=address)


def test_a_head_that_accepts_and_says_nothing(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.jobs.client.ANSWER_SECONDS", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        assert "(timed out)" in fail("submit", "config.yaml", address=address)


def test_an_address_that_is_none(fail: Fail) -> None:
    assert "as in http://HEAD:8265" in fail("jobs", "list", address="ray://head:10001")


def test_something_else_that_answers(fail: Fail, server: Server) -> None:
    server.refusals = {"/api/version": 404}
    assert server.url in fail("jobs", "list")


@pytest.mark.parametrize(
    ("status", "said"), [(401, "wants a token; set RAY_AUTH_MODE=token"), (403, "refuses this")]
)
def test_a_token_that_is_missing_or_wrong(
    fail: Fail, server: Server, status: int, said: str
) -> None:
    server.refusals = {"/api/version": status}
    assert said in fail("submit", "config.yaml")


@pytest.mark.slow
def test_a_job_that_is_not_there(fail: Fail) -> None:
    assert "no job 'two'" in fail("jobs", "status", "two")
    assert "the last are one" in fail("jobs", "stop", "two")
    assert "the last are one" in fail("jobs", "logs", "two", "--follow")


def test_variables_redirect_no_command(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:2")
    with pytest.raises(SystemExit) as ended:
        main(["jobs", "list", "--address", server.url])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("one  SUCCEEDED")
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:1"


@pytest.mark.slow
def test_what_is_submitted_and_how_it_is_followed_up(
    project: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECRET_WORD", "Rumpel-417")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.url.removeprefix("http://"))
    (project / ".gitignore").write_text("*.log\n")
    (project / "old.log").write_text("x")
    with pytest.raises(SystemExit) as ended:
        main(["submit", "config.yaml", "train.steps=2", "--env", "SECRET_WORD", "--detach"])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    assert server.submitted["entrypoint"] == "aligntune train config.yaml train.steps=2"
    job_id = server.submitted["submission_id"]
    assert re.fullmatch(r"run-[0-9a-f]{8}", job_id)
    assert server.submitted["metadata"]["run_dir"] == str(project.parent / "run")
    assert "torch" in json.loads(server.submitted["metadata"]["submitted_with"])
    env = server.submitted["runtime_env"]
    key = env["env_vars"].pop("ALIGNTUNE_SECRETS")
    assert env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert json.loads(server.uploaded[key]) == {"SECRET_WORD": "Rumpel-417"}
    assert server.submitted["metadata"]["variables"] == "SECRET_WORD"
    assert "Rumpel-417" not in json.dumps(server.submitted), "Ray logs it"
    (package,) = [data for name, data in server.uploaded.items() if name != key]
    with zipfile.ZipFile(io.BytesIO(package)) as packed_files:
        assert packed_files.namelist() == [".gitignore", "config.yaml", "data.jsonl"]
    assert "packed 3 files" in shown.err
    assert f"aligntune jobs stop {job_id} --address" in shown.err
    assert "Rumpel-417" not in shown.err + shown.out


def test_the_secrets_of_a_job_that_is_not_taken_are_erased(tmp_path: Path, server: Server) -> None:
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("config.yaml", "x: 1")
    package = Package(tmp_path, ("config.yaml",), archive, archive.stat().st_size)
    server.refusals = {"/api/jobs": 500}
    with pytest.raises(JobsError, match="500"):
        Jobs(server.url).submit("x", package, "one", {"SECRET_WORD": "Rumpel-417"}, {})
    (left,) = [data for name, data in server.uploaded.items() if name.startswith("aligntune-")]
    assert left == ERASED


@pytest.mark.slow
def test_what_lies_on_the_clusters_storage_is_left_to_the_job(
    project: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "model.name=/shared/models/large"
    with pytest.raises(SystemExit) as ended:
        main(["submit", "config.yaml", model, "--detach", "--address", server.url])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    assert "model.name /shared/models/large is not here: it must be on every node" in shown.err


def test_a_dry_run_lists_what_travels_and_asks_no_server(
    project: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECRET_WORD", "Rumpel-417")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (project / "helper.py").write_text("x")
    with pytest.raises(SystemExit) as ended:
        main(["submit", "config.yaml", "--env", "SECRET_WORD", "--dry-run"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    listed = [line.split()[-1] for line in shown.splitlines()]
    assert {"config.yaml", "helper.py"} <= set(listed)
    assert "variables passed on: SECRET_WORD" in shown
    assert "Rumpel" not in shown
    assert not server.uploaded
    with pytest.raises(SystemExit) as ended:
        main(["submit", "config.yaml"])
    assert ended.value.code == 2
    assert "missing option --address" in capsys.readouterr().err


def test_a_secret_in_the_working_directory_goes_nowhere(
    fail: Fail, project: Path, server: Server
) -> None:
    (project / ".env").write_text("PASSWORD=Rumpel-417")
    error = fail("submit", "config.yaml")
    assert ".env (by its name)" in error
    assert "--allow FILE" in error
    assert not server.uploaded


def test_a_working_directory_over_the_limit(fail: Fail, project: Path) -> None:
    with (project / "weights.bin").open("wb") as file:
        file.truncate(500 * 2**20)
    error = fail("submit", "config.yaml")
    assert "500.0 MiB, and Ray takes less than 100.0 MiB" in error
    assert "weights.bin (500.0 MiB)" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("output_dir=runs/a",), "output_dir runs/a is relative"),
        (("output_dir=s3://bucket/a",), "give the URI as checkpoint.storage"),
        (("checkpoint.storage=backup",), "checkpoint.storage backup is relative"),
        (("checkpoint.storage=nosuch://bucket/a",), "checkpoint.storage nosuch://bucket/a cannot"),
        (("train.stepz=3",), "did you mean 'train.steps'?"),
        (("data.path=../elsewhere.jsonl",), "is outside of the working directory"),
        (("data.path=hidden.jsonl",), "data.path hidden.jsonl is not packed, for .gitignore names"),
        (("data.path=parts",), "data.path parts: parts/hidden.jsonl is not packed, for .gitignore"),
        (("data.path=parts/*.jsonl",), "parts/*.jsonl: parts/hidden.jsonl is not packed, for"),
        (("data.path=../*.jsonl",), "data.path ../*.jsonl is outside of the working directory"),
        (("model.name=m",), "model.name m: m/hidden.safetensors is not packed, for .gitignore"),
        (
            ("rewards=[{function: embedding, options: {model: m}}]",),
            "rewards.0.options.model m: m/hidden.safetensors is not packed, for .gitignore names",
        ),
        (("cluster.object_store_gib=2",), "cluster.object_store_gib would do nothing"),
        (("rewards=[../own.py:f]",), "rewards.0.function ../own.py is outside of the working"),
        (("rewards=['hidden:f']",), "rewards.0.function hidden.py is not packed, for .gitignore"),
        (
            ("agent={command: [python, ./hidden.py, --fast]}", "rollout.engine=vllm"),
            "agent.command.1 ./hidden.py is not packed, for .gitignore",
        ),
        (("agent={command: [../own.py]}",), "agent.command.0 ../own.py is outside of the working"),
        (("tools=[hidden.py:f]",), "tools.0 hidden.py is not packed, for .gitignore names it"),
        (("--env", "NOT_SET_ANYWHERE"), "the variable is not set here"),
        (("--env", "TOKEN=abc"), "write --env TOKEN and set"),
        (("--working-dir", "nowhere"), "is not a folder"),
        (("model.name=data.jsonl",), "model.name"),
    ],
)
def test_what_the_job_could_not_do_is_refused_here(
    fail: Fail, project: Path, change: tuple[str, ...], said: str
) -> None:
    (project.parent / "elsewhere.jsonl").write_text("{}\n")
    (project.parent / "own.py").write_text("")
    write(project, "hidden.jsonl", "hidden.py", "parts/a.jsonl", "parts/hidden.jsonl")
    write(project, "m/config.json", "m/hidden.safetensors")
    (project / ".gitignore").write_text("hidden.*\n")
    error = fail("submit", "config.yaml", *change)
    assert said in error
    assert "abc" not in error


def test_what_is_whole_in_the_package_travels_whatever_is_hidden_in_it_or_holds_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "m/config.json", "m/.cache/x", "parts/a.jsonl", "parts/b/c.jsonl", "parts/log")
    package = Package(tmp_path, ("m/config.json", "parts/a.jsonl", "parts/b/c.jsonl"), tmp_path, 0)
    for data in ("parts", "./parts/", "parts/*.jsonl", "parts/**/*.jsonl", "parts/b/../a.jsonl"):
        named = {"path": data, "eval_path": "on/hub"}
        tree: dict[str, Any] = {"model": {"name": "m"}, "data": named}
        assert not_here(tree, package) == []
    judged = {"function": "judge", "options": {"model": "parts/log"}}  # a service has it
    tree = {
        "model": {"name": f"{tmp_path}/m"},
        "data": {"train": [{"path": "/nowhere/*.jsonl"}, {"path": "~/no/data.jsonl"}]},
        "rewards": [judged, {"model": "/nowhere/scorer"}],
    }
    assert not_here(tree, package) == [
        ("data.train.0.path", "/nowhere/*.jsonl"),
        ("data.train.1.path", "~/no/data.jsonl"),
        ("rewards.1.model", "/nowhere/scorer"),
    ]


@pytest.mark.slow
def test_a_config_that_does_not_travel(fail: Fail, project: Path) -> None:
    outside = project.parent / "config.yaml"
    outside.write_text((project / "config.yaml").read_text())
    assert "is outside of it" not in fail("submit", "nowhere.yaml")
    assert "it is outside of it" in fail("submit", str(outside))
    (project / ".gitignore").write_text("config.yaml\n")
    assert "it is ignored by .gitignore" in fail("submit", "config.yaml")
