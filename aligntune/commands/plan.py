"""`aligntune plan`: the plan of a config, and the cluster that it is for."""

from __future__ import annotations

import os
from dataclasses import replace

from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.tree import load_tree
from aligntune.errors import UserError
from aligntune.names import is_preference
from aligntune.online.role_requests import role_requests
from aligntune.online.settle_resources import settle_resources
from aligntune.online.work import work_of
from aligntune.shapes import known_shape
from cluster.bundles import BadRequest, totals
from cluster.gpus import gpu_type
from cluster.machines import Machines, machines
from cluster.placement import DoesNotFit
from cluster.plan.plan import Plan, make_plan
from cluster.plan.shapes import BadModelConfig
from cluster.resources import BadDescription, Cluster, described, this_machine
from cluster.session import ClusterUnreachable
from cluster.tables import UnknownName


def plan_run(
    source: str | os.PathLike[str],
    overrides: list[str],
    *,
    nodes: int | None = None,
    gpus_per_node: int = 0,
    gpu: str | None = None,
    cpus_per_node: float | None = None,
) -> Plan:
    """The plan of a config on a described cluster, or (without `nodes`) on the one it names.

    Raises UserError, one line, for wrong input and for a run that does not fit.
    """
    if is_preference(load_tree(source, overrides)):
        raise UserError(
            "a plan is made for online training; a preference job has one role, whose workers "
            "`aligntune train --dry-run` lists"
        )
    config = load_config(source, overrides)
    assert isinstance(config, RunConfig), "the other kind was refused"
    try:
        there = _machines(config, nodes, gpus_per_node, gpu, cpus_per_node)
        settled, decisions = settle_resources(config, there=there, shape_of=known_shape)
        cluster = there.cluster
        if there.here:  # a Ray started for the run has as many CPUs as it asks for
            cluster = _typed(this_machine(totals(role_requests(settled))["CPU"]), gpu)
        plan = make_plan(work_of(settled), cluster)
        return replace(plan, decided=tuple(one.describe() for one in decisions))
    except (
        BadDescription,
        BadModelConfig,
        BadRequest,
        ClusterUnreachable,
        DoesNotFit,
        UnknownName,
    ) as error:
        raise UserError(str(error)) from error


def _machines(
    config: RunConfig,
    nodes: int | None,
    gpus_per_node: int,
    gpu: str | None,
    cpus_per_node: float | None,
) -> Machines:
    """Those that are described, else of the cluster that the config or RAY_ADDRESS names, else
    this one."""
    if nodes is not None:
        cluster = described(nodes, gpus_per_node, gpu, cpus_per_node)
        return Machines(cluster, int(cluster.nodes[0].cpus), here=False)
    if gpus_per_node or cpus_per_node is not None:
        raise BadDescription(
            "--gpus-per-node and --cpus-per-node describe nodes; say how many with --nodes"
        )
    there = machines(config.cluster)
    return replace(there, cluster=_typed(there.cluster, gpu))


def _typed(cluster: Cluster, gpu: str | None) -> Cluster:
    """The cluster with its GPUs called `gpu`, whatever they seem to be."""
    if gpu is None:
        return cluster
    kind = gpu_type(gpu).name
    nodes = tuple(node._replace(gpu=kind) if node.gpus else node for node in cluster.nodes)
    return replace(cluster, nodes=nodes, note="")
