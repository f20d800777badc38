"""Examines a Ray cluster: an actor on every node tells what it sees and measures the links.

Every wait has a deadline; a node that misses one is a finding, not a hang.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster.doctor import findings
from cluster.doctor.findings import Finding, Observed, Verdict
from cluster.resources import free_resources, living_nodes
from cluster.session import ClusterUnreachable, check_head

START_S = 60.0  # for an actor on a node: a process, and torch
CALL_S = 30.0
MEASURED_BYTES = 64 * 2**20
ALL_PAIRS = 6  # nodes up to which every pair is measured; beyond, each with the next


def examine(
    address: str, packages: Sequence[str], requirements: Sequence[str]
) -> Iterator[Finding]:
    """Findings about every node of the cluster at `address`, as they come."""
    import ray

    try:
        with _connected(address):
            yield from _examine(packages, requirements)
    except ClusterUnreachable as error:
        advice = "correct --address, RAY_ADDRESS or the token; see `ray status` on the head"
        yield Finding("cluster", Verdict.FAIL, str(error), advice)
    except ray.exceptions.RayError as error:
        yield Finding("cluster", Verdict.FAIL, _line(error), "see `ray status` on the head")


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A session at `address`. Raises ClusterUnreachable within some 15 seconds."""
    import ray

    check_head(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterUnreachable(f"no Ray cluster at {address!r}: {_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _examine(packages: Sequence[str], requirements: Sequence[str]) -> Iterator[Finding]:
    import ray

    everyone = ray.nodes()
    nodes = living_nodes()
    dead = len(everyone) - len(nodes)
    yield Finding(
        "cluster",
        Verdict.OK,
        f"{len(nodes)} node(s) alive" + (f", {dead} gone" if dead else ""),
    )
    probes = {_name(node, nodes): _probe(node) for node in nodes}
    observed: dict[str, Observed] = {}
    waiting = {probe.observe.remote(list(packages)): name for name, probe in probes.items()}
    for reference, name in waiting.items():
        try:
            observed[name] = ray.get(reference, timeout=START_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
            yield Finding(
                "node",
                Verdict.FAIL,
                f"no answer: {_line(error)}",
                "install aligntune there as on the head; see its raylet's log",
                name,
            )
    stores = {_name(node, nodes): _store(node) for node in nodes}
    for name, seen in observed.items():
        yield from findings.local(replace(seen, store=stores[name]), requirements, name)
        if unset := findings.keepalive(seen, len(nodes), name):
            yield unset
    yield findings.same_versions(observed)
    healthy = {name: probes[name] for name in observed}
    for name, probe in healthy.items():
        yield _clock(name, probe)
    yield from _bandwidths(healthy, "gloo", {})
    by_name = {_name(node, nodes): node for node in nodes}
    with_gpu = {name: by_name[name] for name, seen in observed.items() if seen.torch_gpus}
    if len(with_gpu) > 1:
        yield from _nccl(with_gpu)


def _name(node: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """The node's address, with the start of its id where several share it."""
    address = str(node["NodeManagerAddress"])
    shared = sum(other["NodeManagerAddress"] == address for other in nodes) > 1
    return f"{address}/{node['NodeID'][:6]}" if shared else address


def _store(node: Mapping[str, Any]) -> int | None:
    """Bytes of the node's object store."""
    bytes_ = node.get("Resources", {}).get("object_store_memory")
    return None if bytes_ is None else int(bytes_)


def _probe(node: Mapping[str, Any], gpus: int = 0) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor = ray.remote(Probe)
    return actor.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=here).remote()


def _clock(name: str, probe: Any) -> Finding:
    """The round trip that was shortest bounds the error."""
    import ray

    best: tuple[float, float] | None = None
    try:
        for _ in range(5):
            before = time.time()
            there = ray.get(probe.clock.remote(), timeout=CALL_S)
            after = time.time()
            trip = (after - before) / 2
            if best is None or trip < best[1]:
                best = (there - (before + after) / 2, trip)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        return Finding("clock", Verdict.FAIL, _line(error), "see the node's raylet log", name)
    assert best is not None
    return findings.clock(*best, name)


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of a few nodes; of many, each with the next."""
    if len(names) <= ALL_PAIRS:
        return list(itertools.combinations(names, 2))
    return list(zip(names, [*names[1:], names[0]], strict=True))


def _bandwidths(
    probes: Mapping[str, Any], backend: str, options: Mapping[str, Any]
) -> Iterator[Finding]:
    import ray

    for first, second in pairs(sorted(probes)):
        pair = f"{first} - {second}"
        try:
            place = ray.get(probes[first].meeting_place.remote(), timeout=START_S)
            both = [
                probes[name].measure.remote(backend, place, rank, **options)
                for rank, name in enumerate((first, second))
            ]
            rate = min(ray.get(both, timeout=CALL_S))
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
            variable = f"{backend.upper()}_SOCKET_IFNAME"
            yield Finding(
                f"{backend} bandwidth",
                Verdict.FAIL,
                f"{pair}: {_line(error)}",
                f"open all ports between the nodes, or set {variable} before `ray start` to the "
                "interface that joins them",
            )
            continue
        yield findings.bandwidth(backend, pair, rate)


def _nccl(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Between those that have a GPU which nobody holds: for another a probe would wait."""
    left = free_resources()
    free = [name for name, n in nodes.items() if left.get(n["NodeID"], {}).get("GPU", 0) >= 1]
    if taken := sorted(nodes.keys() - set(free)):
        seen = f"not measured: no free GPU on {', '.join(taken)}"
        yield Finding("nccl bandwidth", Verdict.OK, seen)
    if len(free) > 1:
        probes = {name: _probe(nodes[name], gpus=1) for name in free}
        yield from _bandwidths(probes, "nccl", {"device": "cuda"})


class Probe:
    """Lives on the node that it tells of."""

    def observe(self, packages: list[str]) -> Observed:
        """What the node shows of itself."""
        from cluster.doctor.probe import observe

        return observe(packages)

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def meeting_place(self) -> str:
        """This node's address and a free port."""
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def measure(self, backend: str, place: str, rank: int, device: str = "cpu") -> float:
        """Bytes a second from rank 0 to rank 1, as each sees it."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        # As a run's ranks do: by a host's name, gloo may end up at a loopback address.
        if interface := _interface():
            os.environ.setdefault(f"{backend.upper()}_SOCKET_IFNAME", interface)
        dist.init_process_group(
            backend,
            init_method=f"tcp://{place}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=CALL_S / 2),
        )
        try:
            data = torch.zeros(MEASURED_BYTES // 4, dtype=torch.float32, device=device)
            dist.broadcast(data[:1024], 0)  # connects
            dist.barrier()
            started = time.perf_counter()
            dist.broadcast(data, 0)
            dist.barrier()
            if device == "cuda":
                torch.cuda.synchronize()
            return MEASURED_BYTES / (time.perf_counter() - started)
        finally:
            dist.destroy_process_group()


def _interface() -> str:
    """The network interface with the address that Ray knows this node by, '' if none has it."""
    import psutil
    import ray

    own = ray.util.get_node_ip_address()
    every = psutil.net_if_addrs().items()
    return next((name for name, of in every if any(one.address == own for one in of)), "")


def _line(error: BaseException) -> str:
    """The last line of an error, which says most in Ray's."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return text[-1][:300] if text else type(error).__name__
