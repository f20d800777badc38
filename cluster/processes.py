"""The processes of Ray on this machine that a driver cannot go on without.

When the raylet dies, the driver's actors die with it and new ones never come; when the head's
control service dies, Ray ends the driver after a minute without a word. Whoever looks here knows
before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import psutil
import ray

EVERY_S = 0.5


def ray_processes() -> dict[str, psutil.Process]:
    """By name: this node's raylet, and the control service (GCS) where this process started it.

    Empty where there is no Ray on this machine, as through a Ray client.
    """
    if not ray.is_initialized():
        return {}
    node = ray._private.worker.global_worker.node
    if node is None:
        return {}
    started = {
        str(kind): infos[0].process.pid
        for kind, infos in node.all_processes.items()
        if str(kind) in ("raylet", "gcs_server")
    }
    if "raylet" not in started:
        started |= _raylet_at(node.raylet_socket_name)
    found = {}
    for name, pid in started.items():
        try:
            found[name] = psutil.Process(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def _raylet_at(socket: str) -> dict[str, int]:
    """The raylet that listens at `socket`; empty where it is another user's, which none may see."""
    option = f"--raylet_socket_name={socket}"
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        if process.info["name"] == "raylet" and option in (process.info["cmdline"] or ()):
            return {"raylet": process.info["pid"]}
    return {}


def draining(nodes: Collection[str]) -> str | None:
    """The first of `nodes` (Ray's ids) that the cluster is taking away, if any; asks its head."""
    from ray._private.state import state

    return min(set(state.get_draining_nodes()) & set(nodes), default=None)


def is_dead(process: psutil.Process) -> bool:
    """Whether a process has ended, though its parent may not have heard of it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def first_death(processes: Mapping[str, psutil.Process]) -> str:
    """The name of the first of `processes` that ends; waits for ever where there is none."""
    while True:
        for name, process in processes.items():
            if is_dead(process):
                return name
        await asyncio.sleep(EVERY_S)
