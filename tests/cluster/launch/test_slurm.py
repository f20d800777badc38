"""The rendered Slurm script under a real Slurm: three nodes on this machine."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import Hosts, missing, steps, tiny_run
from tests.cluster.nodes import Node, wait_for, why_no_namespaces

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
CONF = """\
ClusterName=aligntune
SlurmctldHost={host}({outside})
SlurmUser=root
SlurmctldPort={port}
SlurmdPort=6818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
SchedulerParameters=batch_sched_delay=1,sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A controller in the test's own process space, and what a user calls."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.folder = shared / "slurm"
        self.token = shared / "token"

    @property
    def environment(self) -> dict[str, str]:
        """Of the controller, the nodes, and the user's commands."""
        return {
            "PATH": PATH,
            "HOME": str(self.shared),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def __call__(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.shared,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        shown = self("scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))


@contextmanager
def slurm(shared: Path, count: int = 3) -> Iterator[Slurm]:
    """`count` idle nodes of one CPU each."""
    made = Slurm(shared)
    folder = made.folder
    for name in ("state", *(f"spool-node{n}" for n in range(1, count + 1))):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)

    def slurmd(node: Node) -> list[str]:
        conf = folder / "slurm.conf"
        return ["env", f"PATH={PATH}", f"SLURM_CONF={conf}", "slurmd", "-D", "-N", node.name]

    def started(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("ab") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=made.environment,
                stdout=output,
                stderr=output,
            )

        def end() -> None:
            process.terminate()
            process.wait(30)

        stack.callback(end)

    with ExitStack() as stack:
        socket_path = folder / "munge.socket"
        started(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}"),
            *(f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed"),
            f"--log-file={folder}/munge.log",
        )
        wait_for(socket_path.exists, "munge", 30)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        three = Hosts(shared, count, slurmd)
        stack.callback(three.close)
        three.open()
        nodes = "\n".join(
            f"NodeName=node{n} NodeAddr={three.outside.rpartition('.')[0]}.{n} CPUs=1 State=UNKNOWN"
            for n in range(1, count + 1)
        )
        text = CONF.format(
            host=socket.gethostname(),
            outside=three.outside,
            port=port,
            folder=folder,
            nodes=nodes,
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # which is then not used
        started("slurmctld", "-D")
        for _ in range(count):
            three.add_node()
        idle = lambda: made("sinfo", "-h", "-t", "idle", "-o", "%D").split() == [str(count)]  # noqa: E731
        wait_for(idle, "idle Slurm nodes", 60)
        yield made


def lacking() -> str:
    """What this machine lacks for Slurm, or ''."""
    return missing("slurmctld", "slurmd", "munged", "sbatch") or why_no_namespaces()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(lacking()), reason=f"Slurm on three nodes: {lacking()}")
def test_the_script_trains_under_slurm_goes_back_to_the_queue_and_on_to_the_end(
    tmp_path: Path, tiny_model: Path
) -> None:
    total = 80
    # One CPU a node, and roles that ask for three: the run needs all of the nodes.
    tmp_path.chmod(0o755)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(tiny_run(tmp_path, tiny_model, steps=total))
    )
    run = tmp_path / "runs" / "tiny"
    with slurm(tmp_path) as user:
        user.token.write_text(secrets.token_hex(32))
        user.token.chmod(0o600)
        user(
            *(sys.executable, "-m", "aligntune.cli", "launch", "slurm", "config.yaml"),
            *("--nodes", "3", "--cpus-per-node", "1", "--time", "01:00:00"),
            *("--token-file", str(user.token), "--out", "run.sbatch"),
        )
        job = user("sbatch", "--parsable", "run.sbatch").strip()
        output = tmp_path / f"tiny-{job}.out"

        def after(step: int) -> bool:
            state = user.job(job)["JobState"]
            said = output.read_text() if output.exists() else ""
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), said
            return bool(steps(run)) and steps(run)[-1] >= step

        wait_for(lambda: after(3), "three steps", 180)
        user("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
        wait_for(lambda: user.job(job)["Restarts"] == "1", "the job to be requeued", 180)
        stopped = steps(run)[-1]
        assert stopped < total
        assert "out of time" in output.read_text()
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert events[-1]["kind"] == "run_stopped"
        assert (run / "checkpoints" / f"step-{stopped:06d}").is_dir()

        # Slurm itself waits two minutes. A node refuses a start that is not some whole seconds
        # younger than the end of the one before.
        ended_at = time.monotonic()
        wait_for(lambda: time.monotonic() > ended_at + 5, "the nodes to forget", 10)
        user("scontrol", "update", f"JobId={job}", "StartTime=now")
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: user.job(job)["JobState"] in ended, "the end of the job", 400)
        assert user.job(job)["JobState"] == "COMPLETED", output.read_text()
        assert user.job(job)["ExitCode"] == "0:0"
    assert steps(run) == list(range(1, total + 1))
    assert (run / "model" / "config.json").is_file()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "run_finished"
    assert user.token.read_text() not in output.read_text()
    assert not list(tmp_path.glob(".aligntune-*.pid"))
