"""Three real nodes on one machine: network namespaces joined by a bridge, a raylet in each.

Every node has an address, processes, /tmp and /dev/shm of its own; what they share is one folder,
as hosts share storage, and the installed programs. The test's own process stands outside, at an
address on the same bridge. A machine without the rights for that gets `ray.cluster_utils.Cluster`:
three raylets at one address, where no link can be cut.

Invariant: namespaces and processes end with the context, and with the test's process however it
ends; what a killed test run left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]  # a clone may lie in /tmp
PREFIX = "aligntune-test"
STORE_BYTES = 100_000_000
GCS_PORT = 6379
JOBS_PORT = 8265
START_SECONDS = 90.0
SEARCH = ("grep", "--recursive", "--files-with-matches", "--fixed-strings", "--devices=skip")
CLIENT_SETTINGS = ("PATH", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")

# A node is dead 8 s after its link is cut, and calls on black-holed connections end by themselves.
RAY_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_prestart_worker_first_driver": "0",  # a worker for every logical CPU, and most never used
    "RAY_USAGE_STATS_ENABLED": "0",
}

OWN_FILES = """\
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/shared /mnt/repository
mount --bind "$SHARED" /mnt/shared
mount --bind "$REPOSITORY" /mnt/repository
mount -t tmpfs tmpfs /tmp
mkdir -p "$SHARED" "$REPOSITORY"
mount --move /mnt/shared "$SHARED"
mount --move /mnt/repository "$REPOSITORY"
umount /mnt
mount -t tmpfs tmpfs /dev/shm
"""
START = f"""{OWN_FILES}\
hostname "$NODE"
"$@" &
wait $!
"""


def wait_for(condition: Callable[[], T], what: str, deadline_s: float) -> T:
    """The first true value of `condition`; fails at the deadline with `what`."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline_s:g} s in vain for {what}"
        time.sleep(0.1)
    return value


@dataclass
class Node:
    """One host."""

    name: str
    address: str
    process: subprocess.Popen[bytes] | None = None


@dataclass
class Nodes:
    """A running cluster: its first node is the head."""

    shared: Path  # a folder at the same path on every node
    token: Path
    nodes: list[Node] = field(default_factory=list)
    _jobs_port: int = JOBS_PORT

    @property
    def head(self) -> Node:
        """The node of the Jobs server."""
        return self.nodes[0]

    @property
    def jobs_url(self) -> str:
        """The Jobs server, as the test's process reaches it."""
        return f"http://{self.head.address}:{self._jobs_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs of environment variables: this process's own, and the token."""
        own = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        }
        binaries = str(Path(sys.executable).parent)
        return {
            **own,
            "PATH": f"{binaries}:{own.get('PATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
        }

    def alive(self) -> set[str]:
        """Ids of the nodes that the head believes to be alive."""
        url = f"{self.jobs_url}/api/v0/nodes"  # asks the GCS; /nodes is minutes behind at times
        headers = {"Authorization": f"Bearer {self.token.read_text().strip()}"}
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                known = json.load(response)["data"]["result"]["result"]
        except (urllib.error.URLError, OSError, ValueError, KeyError):
            return set()
        return {node["node_id"] for node in known if node["state"] == "ALIVE"}

    def wait_alive(self, count: int, deadline_s: float = START_SECONDS) -> None:
        """Wait until the head knows `count` nodes."""
        wait_for(lambda: len(self.alive()) == count, f"{count} nodes alive", deadline_s)

    def add_node(self, cpus: int = 4, *, wait: bool = True) -> Node:
        """One more node, the first being the head; alive, unless told not to wait for it."""
        raise NotImplementedError

    def kill_node(self, node: Node) -> None:
        """Every process of a node at once, as when its power goes."""
        raise NotImplementedError

    def cut(self, node: Node) -> None:
        """Take the link of a node down."""
        raise NotImplementedError

    def heal(self, node: Node) -> None:
        """Bring the link of a node up again."""
        raise NotImplementedError

    def files_with(self, text: str) -> list[str]:
        """What Ray has written on any node that has `text` in it."""
        raise NotImplementedError


class Namespaces(Nodes):
    """Nodes in network namespaces of their own."""

    def __init__(self, shared: Path) -> None:
        token = shared / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        super().__init__(shared, token)
        self._tag = f"{PREFIX}-{os.getpid()}"
        self._switch = f"{self._tag}-switch"
        self._net = f"198.18.{_free_subnet()}"
        self._link = f"at{os.getpid()}"  # an interface's name has 15 characters at most
        self._made = 0

    def open(self) -> None:
        """The bridge, and this process's own address on it."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        self._plug(f"{self._link}h", "host")
        _ip("addr", "add", f"{self._net}.254/24", "dev", f"{self._link}h")
        _ip("link", "set", f"{self._link}h", "up")

    def _plug(self, name: str, port: str) -> None:
        """A cable from interface `name`, here, to `port` of the bridge."""
        _ip("link", "add", name, "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")

    def add_node(self, cpus: int = 4, *, wait: bool = True) -> Node:
        self._made += 1
        node = Node(f"node{self._made}", f"{self._net}.{self._made}")
        space = f"{self._tag}-{node.name}"
        _ip("netns", "add", space)
        self._plug(f"{self._link}n{self._made}", node.name)
        _ip("link", "set", f"{self._link}n{self._made}", "netns", space, "name", "eth0")
        _ip("-n", space, "addr", "add", f"{node.address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", "eth0", "up")
        before = len(self.alive()) if self.nodes else 0
        self.nodes.append(node)
        self._start(node, space, cpus)
        if wait:
            self.wait_alive(before + 1)
        return node

    def _start(self, node: Node, space: str, cpus: int) -> None:
        if node is self.head:
            place = ["--head", f"--port={GCS_PORT}", "--dashboard-host=0.0.0.0"]
        else:
            place = [f"--address={self.head.address}:{GCS_PORT}"]
        start = [
            *("sh", "ray", "start", "--block", "--disable-usage-stats", *place),
            f"--node-ip-address={node.address}",
            f"--num-cpus={cpus}",
            f"--object-store-memory={STORE_BYTES}",
        ]
        dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
        apart = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        apart.append("--mount-proc")
        with (self.shared / f"{node.name}.log").open("ab") as output:
            node.process = subprocess.Popen(
                # Death of this process is death of `unshare`, and of everything in its space.
                [*dies_with_us, "ip", "netns", "exec", space, *apart, "sh", "-ec", START, *start],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={
                    **self.environment,
                    **RAY_SETTINGS,
                    "SHARED": str(self.shared),
                    "REPOSITORY": str(REPOSITORY),
                    "NODE": node.name,
                },
            )

    def run_on(self, node: Node, command: list[str], **options: Any) -> subprocess.Popen[Any]:
        """A process on a node, with its network, processes and files."""
        assert node.process is not None
        children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text()
        enter = ["nsenter", "--target", children.split()[0], "--net", "--mount", "--pid", "--uts"]
        return subprocess.Popen([*enter, "--ipc", *command], env=self.environment, **options)

    def kill_node(self, node: Node) -> None:
        assert node.process is not None
        node.process.kill()
        node.process.wait(30)

    def cut(self, node: Node) -> None:
        _ip("-n", self._switch, "link", "set", node.name, "down")

    def heal(self, node: Node) -> None:
        _ip("-n", self._switch, "link", "set", node.name, "up")

    def files_with(self, text: str) -> list[str]:
        found = []
        for node in self.nodes:
            search = self.run_on(node, [*SEARCH, text, "/tmp/ray"], stdout=subprocess.PIPE)
            found += [f"{node.name}: {name}" for name in search.communicate()[0].decode().split()]
        return found

    def close(self) -> None:
        """End every process and remove every namespace of this object."""
        for node in reversed(self.nodes):
            if node.process is not None and node.process.poll() is None:
                self.kill_node(node)
        _remove(f"{self._tag}-")


class SameAddress(Nodes):
    """Raylets at one address, for a machine without namespaces."""

    def __init__(self, shared: Path) -> None:
        token = shared / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        super().__init__(shared, token)
        self._restore = {name: os.environ.get(name) for name in self._settings}
        self._cluster: Any = None
        self._raylets: dict[str, Any] = {}
        self._folders: list[str] = []

    @property
    def _settings(self) -> dict[str, str]:
        return {
            **RAY_SETTINGS,
            **{name: self.environment[name] for name in CLIENT_SETTINGS},
        }

    def open(self) -> None:
        """Raylets take their settings from this process's environment."""
        os.environ.update(self._settings)

    def add_node(self, cpus: int = 4, *, wait: bool = True) -> Node:
        from ray._private.utils import write_ray_address
        from ray.cluster_utils import Cluster

        # A folder each, for they unpack working directories; short, for sockets lie in it.
        self._folders.append(tempfile.mkdtemp(prefix="at-", dir="/tmp"))
        options = {
            "num_cpus": cpus,
            "object_store_memory": STORE_BYTES,
            "temp_dir": self._folders[-1],
        }
        node = Node(f"node{len(self.nodes) + 1}", "127.0.0.1")
        self.nodes.append(node)
        if self._cluster is None:
            self._jobs_port, agent = _free_port(), _free_port()
            head = {"include_dashboard": True, "dashboard_port": self._jobs_port}
            head |= {"dashboard_agent_listen_port": agent}
            self._cluster = Cluster(initialize_head=True, head_node_args={**options, **head})
            self._raylets[node.name] = self._cluster.head_node
            # As `ray start` does, or jobs go to whichever Ray of this machine is the newest.
            write_ray_address(self._cluster.address, self._folders[-1])
        else:
            self._raylets[node.name] = self._cluster.add_node(**options)
        return node

    def kill_node(self, node: Node) -> None:
        self._cluster.remove_node(self._raylets[node.name], allow_graceful=False)

    def cut(self, node: Node) -> None:
        pytest.skip("nodes at one address have no link to cut: this needs network namespaces")

    def files_with(self, text: str) -> list[str]:
        return subprocess.run(
            [*SEARCH, text, *self._folders], capture_output=True, text=True
        ).stdout.split()

    def close(self) -> None:
        """End every process of this object."""
        if self._cluster is not None:
            self._cluster.shutdown()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        for name, value in self._restore.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def why_no_namespaces() -> str:
    """What this machine lacks for namespaces, or ''."""
    if os.environ.get("ALIGNTUNE_TEST_NAMESPACES") == "0":
        return "ALIGNTUNE_TEST_NAMESPACES=0"
    programs = ("ip", "unshare", "setpriv", "nsenter", "mount")
    if missing := [program for program in programs if shutil.which(program) is None]:
        return f"no {', '.join(missing)} here"
    if os.geteuid() != 0:
        return "not root"
    name = f"{PREFIX}-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return tried.stderr.strip()
    try:
        inside = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "x", "/mnt"]
        tried = subprocess.run(
            ["ip", "netns", "exec", name, *inside], capture_output=True, text=True
        )
        return tried.stderr.strip() if tried.returncode else ""
    finally:
        _ip("netns", "del", name)


@contextmanager
def cluster(shared: Path, count: int = 3, *, namespaces: bool = True) -> Iterator[Nodes]:
    """`count` nodes that share the folder `shared`, all alive."""
    made: Namespaces | SameAddress = (Namespaces if namespaces else SameAddress)(shared)
    with _terminated(), contextlib.closing(made):
        made.open()
        made.add_node()
        for _ in range(count - 1):
            made.add_node(wait=False)
        made.wait_alive(count)
        yield made


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the test run in order, so that what it started is removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


def _remove(start: str) -> None:
    """Remove the namespaces whose names start so; their ends of cables go with them."""
    for line in _ip("netns", "list").splitlines():
        if (name := line.split()[0]).startswith(start):
            _ip("netns", "del", name)


def remove_leftovers() -> None:
    """Remove the namespaces of test runs that are no more."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(f"{PREFIX}-").split("-")[0]
        if name != owner and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _ip("netns", "del", name)


def _free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return int(probe.getsockname()[1])


def _free_subnet() -> int:
    """The third part of an address in 198.18.0.0/16, the range for tests, that no link has."""
    taken = _ip("-4", "addr")
    return next(n for n in range(os.getpid() % 200, 256) if f"198.18.{n}." not in taken)
