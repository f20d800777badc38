"""Sizes of clusters: as many nodes as the roles need, with room for every role."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bundles import RoleRequest, bundle_sets
from cluster.launch.files import BadLaunch, NodeSize, label, sized
from cluster.placement import Placement, place
from cluster.resources import Cluster, Node


def test_nodes_are_as_many_as_the_roles_need() -> None:
    requests = [RoleRequest("policy", 4, 1, 1.0), RoleRequest("rollout", 2, 1, 2.0)]
    assert sized(requests)[0] == 1
    assert sized(requests)[1].gpus == 8
    assert sized(requests, gpus_per_node=4)[0] == 2
    assert sized(requests, nodes=4)[1].gpus == 2
    spread = [RoleRequest("rollout", 5, 1, 0.0, "STRICT_SPREAD")]
    assert sized(spread)[0] == 5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_sized_has_a_place_for_every_role(roles: list[tuple[int, int, float]]) -> None:
    requests = [RoleRequest(f"role{i}", n, cpus, gpus) for i, (n, cpus, gpus) in enumerate(roles)]
    nodes, size = sized(requests)

    def placed(count: int) -> bool:
        one = (float(size.cpus), float(size.gpus), size.memory_gib * 2**30)
        cluster = Cluster(tuple(Node(f"{i}", *one) for i in range(count)), "described")
        return isinstance(place(bundle_sets(requests), cluster, advice=False), Placement)

    assert placed(nodes)
    assert nodes == 1 or not placed(nodes - 1)


def test_a_replica_that_no_node_can_hold_is_refused_with_both_sizes() -> None:
    with pytest.raises(BadLaunch, match=r"one rollout \(1 CPU, 4 GPU\) .*2 GPU.*--gpus-per-node"):
        sized([RoleRequest("rollout", 1, 1, 4.0)], gpus_per_node=2)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_labels_are_dns_labels(name: str) -> None:
    made = label(name)
    assert 1 <= len(made) <= 63
    assert made[0].isalpha()
    assert made[-1] != "-"
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize("gib", [2, 8, 64, 512, 2048])
def test_roles_are_promised_no_more_memory_than_ray_offers(
    gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import utils

    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: 2**50)  # no smaller object store
    free = int((gib - max(1.0, 0.05 * gib)) * 2**30)
    offered = free - utils.resolve_object_store_memory(free)
    promised = NodeSize(1, 0, gib).role_memory_bytes
    assert 0.3 * gib * 2**30 < promised <= offered


def test_a_role_that_needs_what_ray_keeps_of_a_node_is_refused() -> None:
    def fits(memory_gib: int) -> tuple[int, NodeSize]:
        request = RoleRequest("rollout", 1, 1, 0.0, memory_bytes=memory_gib * 2**30)
        return sized([request], memory_gib=64)

    assert fits(42)[0] == 1
    with pytest.raises(BadLaunch, match=r"64 GiB \(42\.5 GiB of it for roles\); raise"):
        fits(50)
