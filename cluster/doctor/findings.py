"""Is this machine, or this cluster, healthy: what was observed, judged. Pure; probing is elsewhere.

Each finding says what was seen, and what to do where that is not well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from packaging.requirements import Requirement
from packaging.version import Version

GIB = 2**30
PORTS: Mapping[int, str] = {
    6379: "a head's GCS",
    8265: "dashboard and Ray Jobs",
    10001: "Ray Client",
    8080: "metrics (launch files)",
}
# What Ray gives its object store unless told otherwise: a share of the memory that is free when it
# starts, at most STORE_MOST and what /dev/shm has, of which STORE_SMALL is not looked at.
STORE_SHARE = 0.3
STORE_MOST = 200 * 10**9
STORE_SMALL = 10**10
SHM_SHARE = 0.95
DISK_FULL = 0.95  # where Ray stops to make objects
NVIDIA_SMI_S = 10.0  # a run waits longer: it is slow where the driver is loaded for it


class Verdict(StrEnum):
    """How a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    check: str
    verdict: Verdict
    seen: str
    advice: str = ""  # empty where all is well
    node: str = ""  # empty: this machine, or the cluster as a whole

    def as_dict(self) -> dict[str, str]:
        """For --json."""
        return {**asdict(self), "verdict": self.verdict.value}


@dataclass(frozen=True)
class Observed:
    """What one machine shows of itself; amounts in bytes."""

    python: str
    versions: Mapping[str, str]  # of installed packages
    cpus: int
    memory: int
    memory_free: int
    shm: int  # size of /dev/shm; 0: there is none
    shm_free: int
    disks: Mapping[str, tuple[int, int]]  # path: (size, free)
    nofile: tuple[int, int]  # soft, hard
    gpus: Sequence[str] | None = ()  # as nvidia-smi names them; None: it does not answer
    torch_gpus: int | None = None  # as torch counts them; None: torch cannot be imported
    socket_trouble: str | None = None  # why Ray could make no socket here; None: it can
    ports: Sequence[int] = ()  # in use
    auth_mode: str = ""  # RAY_AUTH_MODE
    token_set: bool = False  # RAY_AUTH_TOKEN has a value
    token_path: str = ""
    token_file_mode: int | None = None  # None: no file there
    env: Mapping[str, str] = field(default_factory=dict)  # RAY_* settings that matter across nodes
    store: int | None = None  # of the Ray that runs there; None: none does


def local(seen: Observed, requirements: Sequence[str], node: str = "") -> list[Finding]:
    """Everything that one machine shows of itself."""
    findings = [
        python(seen.python),
        *versions(requirements, seen.versions),
        devices(seen.gpus, seen.torch_gpus),
        memory(seen.memory_free, seen.memory),
        shm(seen.shm, seen.shm_free, seen.memory_free, seen.store),
        *(disk(path, size, free) for path, (size, free) in seen.disks.items()),
        files(*seen.nofile),
        sockets(seen.socket_trouble),
    ]
    return [Finding(f.check, f.verdict, f.seen, f.advice, node) for f in findings]


def python(version: str) -> Finding:
    """The interpreter."""
    if Version(version) < Version("3.11"):
        return Finding(
            "python", Verdict.FAIL, version, "use Python 3.11 or newer: PYTHON=... make install"
        )
    return Finding("python", Verdict.OK, version)


def versions(requirements: Sequence[str], installed: Mapping[str, str]) -> list[Finding]:
    """Installed packages against the supported table; extras matter where they are installed."""
    wrong, right = [], []
    for text in requirements:
        need = Requirement(text)
        optional = need.marker is not None
        have = installed.get(need.name)
        if have is None:
            if not optional:
                wrong.append(
                    Finding(
                        "versions",
                        Verdict.FAIL,
                        f"{need.name} is not installed",
                        f"pip install '{need.name}{need.specifier}'",
                    )
                )
        elif not need.specifier.contains(Version(have).public, prereleases=True):
            wrong.append(
                Finding(
                    "versions",
                    Verdict.WARN if optional else Verdict.FAIL,
                    f"{need.name} {have} is not of the supported {need.specifier}",
                    f"pip install '{need.name}{need.specifier}'",
                )
            )
        elif any(one.operator == "==" for one in need.specifier):
            right.append(f"{need.name} {have}")
    return wrong or [Finding("versions", Verdict.OK, ", ".join(right) or "nothing is pinned")]


def devices(gpus: Sequence[str] | None, torch_gpus: int | None) -> Finding:
    """GPUs, and whether torch can use them."""
    if torch_gpus is None:
        return Finding(
            "devices", Verdict.FAIL, "torch cannot be imported", "make install, and read its log"
        )
    if gpus is None:
        return Finding(
            "devices",
            Verdict.WARN,
            f"nvidia-smi does not answer within {NVIDIA_SMI_S:g} s",
            "keep the driver loaded with nvidia-smi -pm 1, and look for its errors (NVRM) in dmesg",
        )
    if not gpus:
        return Finding("devices", Verdict.OK, "no GPU; runs are on CPUs")
    seen = f"{len(gpus)} x {gpus[0]}"
    if torch_gpus < len(gpus):
        return Finding(
            "devices",
            Verdict.FAIL,
            f"{seen}, of which torch can use {torch_gpus}",
            "install the CUDA build of torch (ALIGNTUNE_DEVICE=cuda make install), check the "
            "driver and CUDA_VISIBLE_DEVICES",
        )
    return Finding("devices", Verdict.OK, seen)


def memory(free: int, total: int) -> Finding:
    """Memory that processes can still have."""
    seen = f"{_gib(free)} of {_gib(total)} free"
    if free < 2 * GIB:
        return Finding("memory", Verdict.FAIL, seen, "end other processes: each role needs 1 to 2")
    if free < 0.25 * total or free < 6 * GIB:
        return Finding(
            "memory", Verdict.WARN, seen, "end other processes, or ask for fewer replicas"
        )
    return Finding("memory", Verdict.OK, seen)


def default_store(memory_free: int, shm_free: int) -> int:
    """Bytes that a Ray started here without a word gives its object store."""
    room = max(STORE_SMALL, int(SHM_SHARE * shm_free))
    return min(int(STORE_SHARE * memory_free), STORE_MOST, room)


def shm(size: int, free: int, memory_free: int, running: int | None = None) -> Finding:
    """Shared memory, in which Ray's object store lies: that which runs, else one started now."""
    if running is None:
        store, room = default_store(memory_free, free), free
        verb = "would take"
    else:
        store, room = running, size  # what is not free may be the store's own
        verb = "takes"
    seen = f"{_gib(free)} of {_gib(size)} free; Ray's object store {verb} {_gib(store)}"
    if room < store:
        return Finding(
            "shm",
            Verdict.WARN if room > GIB else Verdict.FAIL,
            seen,
            "enlarge /dev/shm (docker run --shm-size, an emptyDir of medium Memory), or set "
            "cluster.object_store_gib or `ray start --object-store-memory` below it; else the "
            "store lies on disk",
        )
    return Finding("shm", Verdict.OK, seen)


def disk(path: str, size: int, free: int) -> Finding:
    """Room for checkpoints and Ray's session."""
    seen = f"{path}: {_gib(free)} of {_gib(size)} free"
    if free < 2 * GIB or free < (1 - DISK_FULL) * size:
        return Finding(
            "disk",
            Verdict.FAIL,
            seen,
            f"free some: Ray stops making objects at {DISK_FULL:.0%} used, and a checkpoint must "
            "fit",
        )
    if free < 20 * GIB:
        return Finding(
            "disk", Verdict.WARN, seen, "a checkpoint of 1B parameters takes 12 GiB; free some"
        )
    return Finding("disk", Verdict.OK, seen)


def files(soft: int, hard: int) -> Finding:
    """Open files a process may have; Ray has a connection to every worker."""
    seen = f"{soft} open files, {hard} at most"
    if hard < 4096:
        return Finding(
            "files", Verdict.FAIL, seen, "raise it: `* hard nofile 65536` in limits.conf, --ulimit"
        )
    if soft < 4096 or hard < 65536:
        return Finding(
            "files", Verdict.WARN, seen, "`ulimit -n 65536` before `ray start`, for large clusters"
        )
    return Finding("files", Verdict.OK, seen)


def sockets(trouble: str | None) -> Finding:
    """Whether a Ray that is started here can make its sockets; `trouble` says why not."""
    if trouble is None:
        return Finding("sockets", Verdict.OK, "the folder for temporary files has a short name")
    seen, _, cure = trouble.partition(": ")
    return Finding("sockets", Verdict.FAIL, seen, cure)


def ports(used: Iterable[int], connected: bool) -> Finding:
    """Ports that a head wants; used ones are right where a cluster runs here."""
    taken = [f"{port} ({PORTS[port]})" for port in sorted(set(used) & set(PORTS))]
    if not taken:
        return Finding("ports", Verdict.OK, f"{', '.join(map(str, sorted(PORTS)))} are free")
    if connected:
        return Finding("ports", Verdict.OK, f"in use: {', '.join(taken)}")
    return Finding(
        "ports",
        Verdict.WARN,
        f"in use: {', '.join(taken)}",
        "a head started here needs others (`ray start --head --port`, --dashboard-port); if it is "
        "a Ray, examine it with --address",
    )


def token(seen: Observed) -> Finding:
    """Whether a client and a head started here have the token they need."""
    path, mode = seen.token_path, seen.token_file_mode
    has = seen.token_set or mode is not None
    where = "RAY_AUTH_TOKEN" if seen.token_set else path
    if seen.auth_mode not in ("", "token", "disabled"):
        return Finding(
            "token",
            Verdict.FAIL,
            f"RAY_AUTH_MODE={seen.auth_mode}",
            "set it to token or disabled",
        )
    if mode is not None and mode & 0o077:
        return Finding("token", Verdict.WARN, f"{path} can be read by others", f"chmod 600 {path}")
    if seen.auth_mode == "disabled":
        return Finding(
            "token",
            Verdict.WARN,
            "RAY_AUTH_MODE=disabled: whoever reaches the head can run code on it",
            "RAY_AUTH_MODE=token on every node, unless the network is closed",
        )
    if seen.auth_mode == "token" and not has:
        return Finding(
            "token",
            Verdict.FAIL,
            f"RAY_AUTH_MODE=token, and no token at {path}",
            "`ray get-auth-token --generate`, or RAY_AUTH_TOKEN_PATH",
        )
    if seen.auth_mode == "" and has:
        return Finding(
            "token",
            Verdict.WARN,
            f"a token at {where}, and RAY_AUTH_MODE is not set: a head turns authentication on, "
            "workers do not",
            "export RAY_AUTH_MODE=token on every node",
        )
    if seen.auth_mode == "":
        return Finding("token", Verdict.OK, "none; `ray start --head` leaves authentication off")
    return Finding("token", Verdict.OK, f"authentication is on, the token is in {where}")


def keepalive(seen: Observed, nodes: int, node: str) -> Finding | None:
    """The settings without which calls to a lost node hang; they matter on several nodes."""
    wanted = ("RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms")
    missing = [name for name in wanted if name not in seen.env]
    if nodes < 2 or not missing:
        return None
    return Finding(
        "keepalive",
        Verdict.WARN,
        f"{' and '.join(missing)} not set: calls to a node whose link is cut hang for minutes",
        "export both as 5000 before `ray start` on every node; `aligntune launch` writes them",
        node,
    )


def clock(offset: float, uncertainty: float, node: str) -> Finding:
    """How far a node's clock is from the driver's, in seconds."""
    seen = f"{offset:+.3f} s from this machine's (within {uncertainty:.3f} s)"
    off = max(0.0, abs(offset) - uncertainty)
    if off > 1.0:
        return Finding(
            "clock",
            Verdict.FAIL if off > 60 else Verdict.WARN,
            seen,
            "run an NTP service (chrony) on every node: events and time-outs go by clocks",
            node,
        )
    return Finding("clock", Verdict.OK, seen, "", node)


def same_versions(by_node: Mapping[str, Observed]) -> Finding:
    """Whether all nodes have the same Python and the same of what crosses between them."""
    names = ("ray", "torch", "transformers", "aligntune")
    groups: dict[str, list[str]] = {}
    for node, seen in by_node.items():
        have = [f"python {seen.python}", *(f"{n} {seen.versions.get(n, 'none')}" for n in names)]
        groups.setdefault(", ".join(have), []).append(node)
    if len(groups) <= 1:
        return Finding("same versions", Verdict.OK, next(iter(groups), "no node"))
    seen_text = "; ".join(f"{', '.join(nodes)}: {have}" for have, nodes in groups.items())
    return Finding(
        "same versions", Verdict.FAIL, seen_text, "install the same versions on every node"
    )


def bandwidth(backend: str, pair: str, bytes_per_s: float) -> Finding:
    """A rate between two nodes."""
    seen = f"{pair}: {bytes_per_s / 1e9:.2f} GB/s"
    if bytes_per_s < 0.1e9:
        advice = "below 1 Gbit/s: weights take their size over this at each step; check the link"
        if backend == "nccl":
            advice += ", NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO"
        return Finding(f"{backend} bandwidth", Verdict.WARN, seen, advice)
    return Finding(f"{backend} bandwidth", Verdict.OK, seen)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where anything fails."""
    return int(any(finding.verdict is Verdict.FAIL for finding in findings))


def lines(findings: Iterable[Finding]) -> list[str]:
    """One line a finding: verdict, node, check, what was seen, what to do."""
    made = []
    for f in findings:
        where = f"{f.node} " if f.node else ""
        made.append(
            f"{f.verdict:4}  {where}{f.check}: {f.seen}" + (f" -> {f.advice}" if f.advice else "")
        )
    return made


def _gib(amount: int) -> str:
    return f"{amount / GIB:.1f} GiB"
