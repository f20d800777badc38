"""How ranks meet: one process group, over gloo on CPU and NCCL on GPUs."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from actors.specs import RankSpec


def own_device() -> torch.device:
    """Ray shows an actor its own GPU alone, as number 0."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def join(
    spec: RankSpec, rank: int, device: torch.device, master_address: str, master_port: int
) -> str:
    """Meet the other ranks within `start_timeout_s`; later waits last `update_timeout_s`.

    Returns the name of the backend.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(spec.ranks),
        LOCAL_RANK="0",
        MASTER_ADDR=master_address,
        MASTER_PORT=str(master_port),
    )
    if device.type != "cpu":
        torch.cuda.set_device(device)
    bind_to_route(master_address)
    store = dist.TCPStore(
        master_address,
        master_port,
        spec.ranks,
        is_master=rank == 0,
        timeout=timedelta(seconds=spec.start_timeout_s),
    )
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=spec.ranks,
        timeout=timedelta(seconds=spec.update_timeout_s),
    )
    return backend


def of_every_rank(value: Any) -> list[Any]:
    """The `value` of every rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leave() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def bind_to_route(address: str) -> None:
    """Tell gloo and NCCL the interface that reaches rank 0; they guess by the host's name else.

    Args:
        address: of rank 0's node, IPv4 or IPv6.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # a datagram socket sends nothing here
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return
