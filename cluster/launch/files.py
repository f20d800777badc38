"""What every launch file is made of: nodes of one size, the settings of their Ray, the command.

Pure: it renders text and starts nothing. A token is named by its path, never by its value.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from cluster.bundles import BundleSet, RoleRequest, amounts, bundle_sets
from cluster.placement import Shortage, place
from cluster.resources import Cluster, Node

PORT = 6379  # of the head
JOBS_PORT = 8265
METRICS_PORT = 8080
GIB_PER_CPU = 4
GPUS_PER_NODE = 8
CPUS_PER_GPU = 16
JOIN_SECONDS = 600  # for all nodes to join, before a run is given up
STOP_SECONDS = 600  # for a run to write its checkpoint after SIGTERM
# What roles cannot have of a node's memory, although it has it. Ray counts what is free when it
# starts, and of that takes the same share as Ray's own default for its object store.
IN_USE_SHARE = 0.05  # the kernel, page tables and services
IN_USE_GIB = 1.0  # at least
OBJECT_STORE_SHARE = 0.3
OBJECT_STORE_MOST_BYTES = 200 * 10**9

RAY_SETTINGS: Mapping[str, str] = {
    # A node that does not answer is dead after about 20 s; Ray's own settings take over a minute.
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
    # Without these, calls on a connection whose other end is gone hang for minutes.
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    # A job that is stopped gets this long between SIGTERM and SIGKILL.
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
}


class BadLaunch(ValueError):
    """No launch file can be written for what was asked; the message says what to give."""


@dataclass(frozen=True)
class NodeSize:
    """What each node offers to Ray."""

    cpus: int
    gpus: int
    memory_gib: int

    def describe(self) -> str:
        """As in: 16 CPU, 1 GPU."""
        return amounts({"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus})

    @property
    def role_memory_bytes(self) -> int:
        """What Ray offers to roles, at least; the rest is in use, or for Ray's object store."""
        free = self.memory_gib - max(IN_USE_GIB, IN_USE_SHARE * self.memory_gib)
        free_bytes = max(0.0, free) * 2**30
        return int(free_bytes - min(OBJECT_STORE_SHARE * free_bytes, OBJECT_STORE_MOST_BYTES))

    def describe_all(self) -> str:
        """As in: 16 CPU, 1 GPU and 64 GiB (42.5 GiB of it for roles)."""
        roles = math.floor(self.role_memory_bytes / 2**30 * 10) / 10
        return f"{self.describe()} and {self.memory_gib} GiB ({roles:g} GiB of it for roles)"


@dataclass(frozen=True)
class Launch:
    """A run, and the cluster for it."""

    name: str  # a DNS label
    nodes: int
    size: NodeSize
    storage: str  # the folder that every node shares; the run starts in it
    command: tuple[str, ...]  # what trains
    ray_version: str
    roles: tuple[str, ...] = ()  # what each asks for, in words
    notes: tuple[str, ...] = ()  # what a person must see to

    @property
    def start(self) -> str:
        """What a shell on the head runs: the nodes come, and the run starts in the storage."""
        # -P: a folder in the storage that is named cluster too is not meant.
        wait = f"python -P -m cluster.await_nodes {self.nodes} {JOIN_SECONDS} && "
        wait *= self.nodes > 1
        return f"cd {shlex.quote(self.storage)} && {wait}exec {shell(self.command)}"

    def head(self, written_by: str, *lines: str) -> str:
        """The comment that a file begins with."""
        text = [
            f"Written by `aligntune launch {written_by}` for {self.nodes} node(s) of "
            f"{self.size.describe()}.",
            *(f"  {role}" for role in self.roles),
            *self.notes,
            *lines,
        ]
        return "".join(f"# {line}".rstrip() + "\n" for line in text)


def label(name: str) -> str:
    """`name` as a DNS label, which names of clusters and jobs must be."""
    cleaned = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return cleaned if cleaned[:1].isalpha() else f"run-{cleaned}".strip("-")


def sized(
    requests: Sequence[RoleRequest],
    colocate: Sequence[Sequence[str]] = (),
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    cpus_per_node: int | None = None,
    memory_gib: int | None = None,
) -> tuple[int, NodeSize]:
    """How many nodes of which size the roles need; what is given stays as it is.

    Raises:
        BadLaunch: the roles do not fit; the message says what is missing and what would fit.
        BadRequest: no cluster could meet the roles.
    """
    for option, value, least in (
        ("--nodes", nodes, 1),
        ("--gpus-per-node", gpus_per_node, 0),
        ("--cpus-per-node", cpus_per_node, 1),
        ("--memory-per-node", memory_gib, 2),
    ):
        if value is not None and value < least:
            raise BadLaunch(f"{option} is {value}; give {least} or more")
    sets = bundle_sets(requests, colocate)
    if gpus_per_node is None:
        gpus_per_node = _gpus(sets, nodes)
    cpus = cpus_per_node or CPUS_PER_GPU * max(1, gpus_per_node)
    size = NodeSize(cpus, gpus_per_node, memory_gib or GIB_PER_CPU * cpus)

    for one in sets:
        alone = Cluster((_node(size),), "described")
        if isinstance(place([_single(one)], alone, advice=False), Shortage):
            raise BadLaunch(
                f"one {one.name} ({amounts(one.bundle)}) does not fit on a node of "
                f"{size.describe_all()}; raise --gpus-per-node, --cpus-per-node or "
                "--memory-per-node, or ask for less"
            )

    def fits(count: int) -> Shortage | None:
        cluster = Cluster(tuple(_node(size, i) for i in range(count)), "described")
        found = place(sets, cluster, advice=False)
        return found if isinstance(found, Shortage) else None

    if nodes is not None:
        if short := fits(nodes):
            raise BadLaunch(_does_not_fit(short, nodes, size))
        return nodes, size
    most = sum(one.replicas for one in sets)  # a node for every replica
    if short := fits(most):
        raise BadLaunch(_does_not_fit(short, most, size))
    least = 1
    while least < most:
        middle = (least + most) // 2
        least, most = (middle + 1, most) if fits(middle) else (least, middle)
    return least, size


def _node(size: NodeSize, index: int = 0) -> Node:
    return Node(f"node-{index}", float(size.cpus), float(size.gpus), size.role_memory_bytes)


def _single(item: BundleSet) -> BundleSet:
    return BundleSet(tuple(replace(request, replicas=1) for request in item.members))


def _gpus(sets: Sequence[BundleSet], nodes: int | None) -> int:
    """Of each node, where the user does not say: what `nodes` need at least, else 8 at most."""
    asked = sum(one.bundle.get("GPU", 0.0) * one.replicas for one in sets)
    if nodes is None:
        return min(GPUS_PER_NODE, math.ceil(asked))
    largest = max(one.bundle.get("GPU", 0.0) for one in sets)
    return max(math.ceil(asked / nodes), math.ceil(largest))


def _does_not_fit(short: Shortage, nodes: int, size: NodeSize) -> str:
    return (
        f"the run does not fit on {nodes} node(s) of {size.describe_all()}: "
        f"{short.missing}; change --nodes, --gpus-per-node, --cpus-per-node or --memory-per-node, "
        "or what the roles ask for"
    )


def shell(command: Sequence[str]) -> str:
    """A command as a shell reads it; a leading ~/ stays for the shell to expand."""
    return " ".join(
        "~/" + shlex.quote(word[2:]) if word.startswith("~/") else shlex.quote(word)
        for word in command
    )


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that a person can read them."""

    def ignore_aliases(self, data: Any) -> bool:
        """Ray changes one node type's settings after reading; another's must not be the same."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(tree: Mapping[str, Any]) -> str:
    """A tree in its own order."""
    dumped: str = yaml.dump(
        dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096
    )
    return dumped
