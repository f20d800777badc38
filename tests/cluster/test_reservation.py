"""Reservations on real Ray: what is given, what is said when it is not, what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster import reservation
from cluster.bundles import RoleRequest, bundle_sets
from cluster.placement import DoesNotFit, place
from cluster.reservation import NODE, Reservation, reserve, selectors_of
from cluster.resources import Cluster, from_ray


def wait_until(condition: Callable[[], Any], deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s in vain"
        time.sleep(0.05)


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def test_ranks_go_up_with_the_address_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name} for name in ("first", "second", "third")]
    where = {0: "third", 1: "first", 2: "second", 3: "first"}
    monkeypatch.setattr(reservation, "living_nodes", lambda: nodes)
    monkeypatch.setattr(
        reservation, "placement_group_table", lambda group: {"bundles_to_node_id": where}
    )
    assert reservation._by_node(object()) == [1, 3, 2, 0]


def entry(name: str, cpus: float, gpus: float = 0.0) -> dict[str, Any]:
    """A node as `ray.nodes()` has it."""
    resources = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    return {"NodeID": name, "NodeManagerAddress": name, "Resources": resources, "Alive": True}


def test_bundles_without_a_gpu_are_asked_for_where_the_plan_has_them() -> None:
    nodes = [entry("a", 16, 2), entry("b", 4), entry("c", 16, 2)]
    requests = [
        RoleRequest("policy", 2, 1, 1),
        RoleRequest("environment", 3, 2),
        RoleRequest("reward", 1, 1),
    ]
    sets = bundle_sets(requests)
    cluster = Cluster(tuple(map(from_ray, nodes)), "Ray")
    spared = selectors_of(sets, place(sets, cluster), nodes)
    apart = {NODE: "!in(a,c)"}
    assert {item.name: asked for item, asked in spared.items()} == {
        "environment": [apart, apart, {}]
    }
    alike = [entry("a", 16, 2), entry("c", 16, 2)]
    cluster = Cluster(tuple(map(from_ray, alike)), "Ray")
    assert selectors_of(sets, place(sets, cluster), alike) == {}, "no node is without GPUs"


def test_a_bundle_whose_node_is_lost_finds_another_though_none_without_gpus_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (item,) = bundle_sets([RoleRequest("environment", 1, 1)])
    alive, asked = [entry("gpu", 8, 2), entry("cpu", 8)], []
    where = {"bundles_to_node_id": {0: "cpu"}, "state": "CREATED"}
    monkeypatch.setattr(reservation, "living_nodes", lambda: alive)
    monkeypatch.setattr(reservation, "placement_group_table", lambda group: where)
    monkeypatch.setattr(reservation, "placement_group", lambda *a, **k: asked.append((a, k)) or "x")
    places = Reservation({item: "own"}, "run", [item])  # type: ignore[dict-item]

    def group() -> Any:
        return places.options("environment", 0)["scheduling_strategy"].placement_group

    assert group() == "own"
    del alive[1]
    assert group() == "x"
    assert asked == [(([item.bundle],), {"name": "run/environment-0"})], "of any node"
    alive.append(entry("cpu", 8))
    assert group() == "own", "there is room for its own place again"


@pytest.mark.slow
def test_a_reservation_is_released_on_every_way_out(ray_session: None) -> None:
    before = free_cpus()
    with reserve([RoleRequest("policy", 2, 3)], 30):
        assert free_cpus() == before - 6
    wait_until(lambda: free_cpus() == before)
    with pytest.raises(KeyError), reserve([RoleRequest("policy", 2, 3)], 30):
        raise KeyError
    wait_until(lambda: free_cpus() == before)
    with pytest.raises(DoesNotFit), reserve([RoleRequest("policy", 2, 30)], 30):
        pass
    assert free_cpus() == before


@pytest.mark.slow
def test_a_reservation_that_cannot_be_had_says_what_is_missing_who_holds_it_and_what_would_fit(
    ray_session: None,
) -> None:
    before = free_cpus()
    wanted = [RoleRequest("policy", 1, 1), RoleRequest("rollout", int(before) - 6, 1)]
    with reserve([RoleRequest("policy", 1, 8)], 30, run="other"):
        started = time.monotonic()
        with pytest.raises(DoesNotFit) as error, reserve(wanted, 1.5, run="mine"):
            pass
        assert time.monotonic() - started < 15
        assert free_cpus() <= before - 8, "the other run keeps what it has"
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"no place for rollout {wanted[1].replicas} x (1 CPU) within 1.5 s: ")
    assert "what would fit: " in said
    assert "aligntune/other-" in said
    assert "/policy (8 CPU)" in said
    wait_until(lambda: free_cpus() == before)


@pytest.mark.slow
def test_runs_of_one_name_do_not_meet(ray_session: None) -> None:
    from ray.util import placement_group_table

    request = [RoleRequest("policy", 1, 1)]
    with reserve(request, 30, run="same"), reserve(request, 30, run="same"):
        names = [
            entry["name"]
            for entry in placement_group_table().values()
            if entry["state"] == "CREATED"
        ]
    assert len(names) == len(set(names)) == 2
    assert all(name.startswith("aligntune/same-") for name in names)


FOUR_NODES = """
import json, ray
from ray.cluster_utils import Cluster
from cluster import machines
from cluster.bundles import RoleRequest
from cluster.reservation import reserve
from cluster.resources import connected, living_nodes

made = Cluster()
small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
for index in range(3):
    made.add_node(num_cpus=4, num_gpus=2, **small)
made.add_node(num_cpus=2, num_gpus=0, **small)
made.wait_for_nodes()
ray.init(address=made.address, log_to_driver=False)

@ray.remote
class Where:
    def where(self):
        return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()

order = [node["NodeID"] for node in living_nodes()]

def type_of_machine():
    node = ray.get_runtime_context().get_node_id()
    if node == order[0]:
        raise RuntimeError("nvidia-smi does not answer")
    return node

machines.type_of_machine = type_of_machine
requests = [
    RoleRequest("policy", 4, 1, 1, "SPREAD"),
    RoleRequest("rollout", 4, 1, 1, "SPREAD"),
    RoleRequest("environment", 3, 1),
]
with reserve(requests, 30, [["policy", "rollout"]], "four") as places:
    actors = {
        one.role: [
            Where.options(**places.options(one.role, index)).remote()
            for index in range(one.replicas)
        ]
        for one in requests
    }
    found = {
        role: [
            [order.index(node), devices]
            for node, devices in ray.get([actor.where.remote() for actor in of_role], timeout=60)
        ]
        for role, of_role in actors.items()
    }
    told = machines._ask(order)  # also where all is reserved
    asked = [[order.index(node), order.index(kind)] for node, kind in sorted(told.items())]
plain = [index for index, node in enumerate(connected().nodes) if not node.gpus]
print(json.dumps({"found": found, "nodes": len(order), "plain": plain, "asked": sorted(asked)}))
ray.shutdown()
made.shutdown()
"""


@pytest.mark.slow
def test_on_four_nodes_ranks_are_in_order_and_environments_on_the_one_without_gpus() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOUR_NODES],
        env=os.environ | {"RAY_prestart_worker_first_driver": "0"},  # most would never be used
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["nodes"] == 4
    (plain,) = answer["plain"]
    policy, rollout = answer["found"]["policy"], answer["found"]["rollout"]
    assert policy == rollout
    assert policy == sorted(policy), "ranks go up with node and device"
    assert {node for node, _ in policy} == {0, 1, 2, 3} - {plain}
    assert all(len(devices) == 1 for _, devices in policy)
    environments = [node for node, _ in answer["found"]["environment"]]
    assert environments.count(plain) == 2, "the third has no room there"
    assert answer["asked"] == [[1, 1], [2, 2], [3, 3]], "each says its own, but for one that fails"


def test_options_of_a_role_that_is_not_reserved_are_an_error() -> None:
    with pytest.raises(KeyError):
        Reservation({}, "run").options("policy", 0)


@pytest.mark.slow
def test_a_place_beyond_those_reserved_is_there_once_there_is_room(ray_session: None) -> None:
    before = free_cpus()
    with reserve([RoleRequest("rollout", 1, 1.0)], 30) as reservation:
        wait_until(lambda: reservation.room("rollout", 1))
        reserved, extra = (
            reservation.options("rollout", index)["scheduling_strategy"] for index in (0, 1)
        )
        assert extra.placement_group != reserved.placement_group
        assert extra.placement_group_bundle_index == 0
    wait_until(lambda: free_cpus() == before)
    requests = [RoleRequest("rollout", 1, 1.0), RoleRequest("policy", 1, before - 1)]
    with reserve(requests, 30) as full:
        assert not full.room("rollout", 1), "every CPU is taken"
    wait_until(lambda: free_cpus() == before)
