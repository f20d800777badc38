"""The rendered on-premise file with `ray up`, a run and `ray down`, on three hosts with sshd."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import Hosts, missing, steps, tiny_run
from tests.cluster.nodes import Node, wait_for, why_no_namespaces

SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
MaxStartups 100
"""


def lacking() -> str:
    """What this machine lacks for hosts with ssh, or ''."""
    return missing("sshd", "ssh", "ssh-keygen", "rsync") or why_no_namespaces()


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(lacking()), reason=f"ray up over ssh: {lacking()}")
def test_ray_up_brings_up_the_cluster_and_the_run_and_ray_down_ends_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    token = tmp_path / "token"
    tree = tiny_run(tmp_path, tiny_model, steps=3)
    name = f"up-{os.getpid()}"
    # One CPU a host, and roles that ask for three: the run needs all of the hosts.
    tree |= {"output_dir": f"runs/{name}", "cluster": {"placement_timeout_s": 180}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))

    def sshd(node: Node) -> list[str]:
        return ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]

    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_UP_enable_autoscaler_v2": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }

    def user(*command: str, limit_s: float = 240) -> str:
        done = subprocess.run(
            command,
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=limit_s,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    with contextlib.closing(Hosts(tmp_path, 3, sshd)) as hosts:
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        hosts.open()
        for _ in range(3):
            hosts.add_node()
        head, *workers = [node.address for node in hosts.nodes]
        wait_for(lambda: all(answers(n.address, 22) for n in hosts.nodes), "sshd", 30)
        user(
            *(sys.executable, "-m", "aligntune.cli", "launch", "ray-up", "config.yaml"),
            *("--head-ip", head, "--worker-ips", ",".join(workers), "--storage", str(tmp_path)),
            *("--ssh-key", str(folder / "key"), "--token-file", str(token), "--venv", sys.prefix),
            *("--cpus-per-node", "1", "--out", "cluster.yaml"),
        )
        assert token.read_text() not in (tmp_path / "cluster.yaml").read_text()
        try:
            user("ray", "up", "-y", "cluster.yaml")
            start = (
                "ray job submit --address http://127.0.0.1:8265 "
                f"--submission-id {name} -- ~/.aligntune/run"
            )
            said = user("ray", "exec", "cluster.yaml", start)
            assert "done: 3 steps" in said
        finally:
            user("ray", "down", "-y", "cluster.yaml")
        wait_for(lambda: not answers(head, 6379), "the head to be gone", 60)
    run = tmp_path / "runs" / name
    assert steps(run) == [1, 2, 3]
    assert (run / "model" / "config.json").is_file()
