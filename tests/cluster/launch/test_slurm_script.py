"""Scripts for Slurm, run with stand-ins for Slurm and Ray: refusals, stops, requeues."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aligntune import cli
from cluster.launch import slurm
from cluster.launch.files import RAY_SETTINGS
from tests.cluster.nodes import wait_for


def test_the_slurm_script_is_a_script_sized_from_the_config(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "run.sbatch"
    code, text, err = launch(
        *("slurm", "--gpus-per-node", "4", "--cpus-per-node", "9", "--time", "2-00", "--out"),
        *(str(script), "--partition", "long", "train.steps=7", "data.name=it's"),
    )
    assert code == 0, err
    assert text == ""
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    for option in ("nodes=2", "cpus-per-task=9", "gpus-per-node=4", "partition=long", "time=2-00"):
        assert f"#SBATCH --{option}\n" in text
    assert f"#SBATCH --chdir={tmp_path}\n" in text
    for name, value in RAY_SETTINGS.items():
        assert f"export {name}={value}\n" in text
    assert "--num-cpus=9 --num-gpus=4" in text
    assert "export SRUN_CPUS_PER_TASK=9 " in text
    assert "train.steps=7 'data.name=it'\"'\"'s' cluster.address=auto" in text
    assert text.index("#SBATCH --signal=B:USR1@") < text.index("set -u")


@pytest.mark.parametrize("folder", ["my runs", "it's", "a#b", "a'b c"])
def test_a_folder_of_any_name_is_one_option_of_sbatch(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    code, text, err = launch("slurm")
    assert code == 0, err
    (line,) = [one for one in text.splitlines() if one.startswith("#SBATCH") and "--chdir" in one]
    # sbatch ends a line at a # outside quotes, as a shell does.
    assert shlex.split(line[1:], comments=True) == ["SBATCH", f"--chdir={tmp_path / folder}"]


STUBS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ray": 'while [[ $1 != -- ]]; do shift; done; shift; exec "$@"',
    "aligntune": "trap 'exit ${STOPPED:-143}' TERM; env > new; mv new started; "
    "while :; do sleep 0.05; done",
    "scontrol": 'echo "$@" > requeued',
}


@pytest.fixture
def script(launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Slurm script as a process, with stand-ins for Slurm and Ray: a run that never ends."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    for name, body in STUBS.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    token = ["--token-file", str(tmp_path / "token"), "--venv", str(tmp_path / "venv")]
    code, text, err = launch("slurm", *token)
    assert code == 0, err
    (tmp_path / "run.sbatch").write_text(text)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    started = []

    def start(**environment: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1", "ALIGNTUNE_HEAD_IP": "10.0.0.1"}
        slurm["TMPDIR"] = str(tmp_path)
        process = subprocess.Popen(
            ["bash", "run.sbatch"],
            env={"PATH": "/usr/bin:/bin", **slurm, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "stopped", "code", "requeued"),
    [
        (signal.SIGUSR1, 143, 0, "requeue 7\n"),
        (signal.SIGUSR1, 0, 0, ""),
        (signal.SIGUSR1, 1, 1, ""),
        (signal.SIGTERM, 143, 143, ""),
        (signal.SIGUSR1, slurm.KILLED, 0, "requeue 7\n"),
        (signal.SIGTERM, slurm.KILLED, 143, ""),
    ],
    ids=["time, stopped", "time, done", "time, failed", "stopped", "time, killed", "killed"],
)
def test_a_signal_to_the_slurm_script_stops_the_run_and_time_requeues_what_is_not_done(
    script: Any, tmp_path: Path, number: int, stopped: int, code: int, requeued: str
) -> None:
    process = script(STOPPED=str(stopped))
    wait_for((tmp_path / "started").exists, "the run to start", 10)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, out + err
    log = tmp_path / "requeued"
    assert (log.read_text() if log.exists() else "") == requeued
    assert not list(tmp_path.glob(".aligntune-*"))
    assert "secret" not in out + err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGTERM, 143, False), (signal.SIGUSR1, 0, True)],
    ids=["stopped", "time"],
)
def test_a_stop_that_comes_while_ray_starts_is_not_lost(
    script: Any, tmp_path: Path, number: int, code: int, requeued: bool
) -> None:
    ray = tmp_path / "venv/bin/ray"
    starts = "touch starting; while [ ! -e all-there ]; do sleep 0.05; done"
    ray.write_text(f"#!/bin/bash\n{starts}\n{STUBS['ray']}\n")
    (tmp_path / ".aligntune-7.pid.stop").touch()  # of a start whose node was lost
    process = script()
    wait_for((tmp_path / "starting").exists, "Ray to start", 10)
    assert not list(tmp_path.glob(".aligntune-*"))
    os.kill(process.pid, number)
    wait_for((tmp_path / ".aligntune-7.pid.stop").exists, "the stop to be kept", 10)
    (tmp_path / "all-there").touch()
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, out + err
    assert not (tmp_path / "started").exists()
    assert (tmp_path / "requeued").exists() == requeued
    assert not list(tmp_path.glob(".aligntune-*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "token").unlink(), "no token at"),
        (lambda folder: (folder / "token").chmod(0o644), "others can read"),
        (lambda folder: (folder / "token").chmod(0o440), "others can read"),
        (lambda folder: (folder / "venv/bin/ray").unlink(), "no ray in"),
        (lambda folder: {"ALIGNTUNE_HEAD_IP": "127.0.1.1"}, "no address here that others reach"),
    ],
    ids=["no token", "an open token", "a group's token", "no ray", "a loopback address"],
)
def test_the_slurm_script_refuses_in_one_line_before_it_starts(
    script: Any, tmp_path: Path, change: Any, said: str
) -> None:
    process = script(**(change(tmp_path) or {}))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


# One node after the other: what the second finds where the first has its temporary files.
SECOND_NODE = """\
while [[ $1 == --* ]]; do shift; done
[[ $1 == ray ]] && exec "$@"
HERE=node1 "$@" || exit
[[ $OTHER == shared ]] || mv "$FOLDER" "$FOLDER.node1"
[[ $OTHER != missing ]] || touch "$FOLDER" # so that no folder can be made there
HERE=node2 "$@"
code=$?
[[ $OTHER == shared ]] || { rm -rf "$FOLDER"; mv "$FOLDER.node1" "$FOLDER"; }
exit $code
"""


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("other", ["shared", "missing", "own"])
def test_each_node_needs_a_folder_of_its_own_for_rays_temporary_files(
    script: Any, tmp_path: Path, variable: str, other: str
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    for name, body in {"srun": SECOND_NODE, "hostname": "echo ${HERE:-node1}"}.items():
        (tmp_path / "venv/bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "venv/bin" / name).chmod(0o755)
    process = script(**{variable: str(folder)}, FOLDER=str(folder), OTHER=other)
    if other == "own":
        wait_for((tmp_path / "started").exists, "the run to start", 10)
        assert f"RAY_TMPDIR={folder}\n" in (tmp_path / "started").read_text()
    else:
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (2, "")
        assert f"{folder}, for Ray's temporary files, is shared by nodes" in err
        assert "export RAY_TMPDIR=/tmp" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "started").exists()
    assert not list(folder.iterdir())


def test_a_cluster_that_the_shell_names_does_not_get_the_slurm_run(
    script: Any, tmp_path: Path
) -> None:
    script(RAY_ADDRESS="10.9.9.9:6379")
    wait_for((tmp_path / "started").exists, "the run to start", 10)
    assert "RAY_ADDRESS=" not in (tmp_path / "started").read_text()


def test_a_ray_that_does_not_start_fails_the_slurm_job(script: Any, tmp_path: Path) -> None:
    (tmp_path / "venv/bin/ray").write_text("#!/bin/bash\nexit 0\n")  # as symmetric-run then does
    (tmp_path / ".aligntune-7.pid").write_text("1\n")  # of a start whose node was lost
    (tmp_path / "token").chmod(0o400)
    process = script()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "the run did not start" in err


def test_a_run_that_was_stopped_ends_with_the_code_that_the_slurm_script_requeues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aligntune.errors import Interrupted

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(cli, "app", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == slurm.STOPPED


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:02:03", 3723),
        ("2-00", 172800),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert slurm.seconds(time) == seconds


def test_the_slurm_script_names_a_port_that_is_in_use(script: Any, tmp_path: Path) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        text = (tmp_path / "run.sbatch").read_text()
        (tmp_path / "run.sbatch").write_text(text.replace("6379", str(port)))
        out, err = script().communicate(timeout=20)
    assert out == ""
    assert f"port {port} of " in err
    assert "is in use" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "started").exists()
