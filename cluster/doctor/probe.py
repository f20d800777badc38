"""Looks at the machine it runs on, for the doctor; starts nothing and changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.doctor.findings import NVIDIA_SMI_S, PORTS, Observed
from cluster.local import socket_trouble
from cluster.resources import host_memory

SHM = Path("/dev/shm")


def observe(packages: Sequence[str], folders: Sequence[str] = ()) -> Observed:
    """This machine, with the versions of `packages` and the disks of `folders`."""
    memory, memory_free = host_memory()
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    token_path = Path(token).expanduser()
    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    return Observed(
        python=platform.python_version(),
        versions=_versions(packages),
        cpus=os.cpu_count() or 1,
        memory=memory,
        memory_free=memory_free,
        shm=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        disks=_disks([tempfile.gettempdir(), *folders]),
        nofile=resource.getrlimit(resource.RLIMIT_NOFILE),
        gpus=_gpus(),
        torch_gpus=_torch_gpus(),
        socket_trouble=socket_trouble(),
        ports=[port for port in PORTS if in_use(port)],
        auth_mode=os.environ.get("RAY_AUTH_MODE", ""),
        token_set=bool(os.environ.get("RAY_AUTH_TOKEN")),
        token_path=str(token_path),
        token_file_mode=token_path.stat().st_mode & 0o777 if token_path.is_file() else None,
        env={name: value for name, value in os.environ.items() if name.startswith("RAY_grpc_")},
    )


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _disks(folders: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Each file system once."""
    seen: dict[int, str] = {}
    for folder in folders:
        if os.path.isdir(folder):
            seen.setdefault(os.stat(folder).st_dev, folder)
    usage = {folder: shutil.disk_usage(folder) for folder in seen.values()}
    return {folder: (one.total, one.free) for folder, one in usage.items()}


def _gpus() -> list[str] | None:
    """Names of the GPUs that nvidia-smi lists; none where there is no nvidia-smi or no driver, and
    None where it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _torch_gpus() -> int | None:
    try:
        import torch
    except (ImportError, OSError):  # OSError: a shared library of it is missing
        return None
    return int(torch.cuda.device_count())


def in_use(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as one:
        one.settimeout(0.5)
        return one.connect_ex(("127.0.0.1", port)) == 0
