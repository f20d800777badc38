"""Where roles go: pure, so it is tried on clusters of 1 to 4,096 nodes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bundles import BadRequest, RoleRequest, Strategy, bundle_sets, totals
from cluster.gpus import gpu_type, type_by_ray
from cluster.placement import Placement, Shortage, place
from cluster.resources import BadDescription, Cluster, Node, described, from_ray
from cluster.tables import UnknownName

ROLES = ("policy", "rollout", "reward", "reference", "critic")
STRATEGIES: tuple[Strategy, ...] = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


def placed(requests: list[RoleRequest], cluster: Cluster, *colocate: list[str]) -> Placement:
    found = place(bundle_sets(requests, colocate), cluster)
    assert isinstance(found, Placement), found
    return found


def refused(requests: list[RoleRequest], cluster: Cluster) -> Shortage:
    found = place(bundle_sets(requests), cluster)
    assert isinstance(found, Shortage)
    assert "\n" not in str(found)
    return found


def nodes_of(placement: Placement, role: str) -> list[int]:
    return [slot.node for slot in placement.slots[role]]


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Up to 4,096 nodes of up to three kinds."""
    nodes: list[Node] = []
    for kind in range(draw(st.integers(1, 3))):
        count = draw(st.one_of(st.integers(1, 6), st.sampled_from([64, 1024, 1365])))
        memory = draw(st.sampled_from([None, 64 * 2**30]))
        node = Node("", draw(st.sampled_from([2.0, 8.0, 128.0])), draw(st.integers(0, 8)), memory)
        nodes += [node._replace(name=f"{kind}-{i}") for i in range(count)]
    return Cluster(tuple(nodes), "drawn")


@st.composite
def requests_for(draw: st.DrawFn, cluster: Cluster) -> list[RoleRequest]:
    """Roles that may or may not fit the cluster: about half of the draws do."""
    roles = draw(st.lists(st.sampled_from(ROLES), unique=True, min_size=1, max_size=4))
    devices = sum(node.gpus for node in cluster.nodes)
    kinds = [0.0, 0.25, 0.3, 0.5, 1.0, 2.0] if devices else [0.0]
    strategies = draw(st.sampled_from([("PACK",), ("SPREAD",), ("PACK", "SPREAD"), STRATEGIES]))
    requests = []
    for role in roles:
        gpus = draw(st.sampled_from(kinds))
        room = devices / gpus if gpus else 2 * len(cluster.nodes)
        most = max(1, int(room / len(roles) * draw(st.sampled_from([0.5, 1.0, 1.2]))))
        requests.append(
            RoleRequest(
                role,
                draw(st.one_of(st.just(most), st.integers(1, most))),
                draw(st.sampled_from([0.1, 0.5, 1.0])),
                gpus,
                draw(st.sampled_from(strategies)),
                draw(st.sampled_from([0, 0, 3 * 2**30])),
            )
        )
    return requests


def used(requests: list[RoleRequest], placement: Placement) -> tuple[Counter, Counter, Counter]:
    """CPUs by node, memory by node, and ten-thousandths of GPUs by (node, device)."""
    cpus: Counter[int] = Counter()
    memory: Counter[int] = Counter()
    gpus: Counter[tuple[int, int]] = Counter()
    for request in requests:
        for slot in placement.slots[request.role]:
            cpus[slot.node] += round(1e4 * request.cpus)
            memory[slot.node] += request.memory_bytes
            for device in slot.devices:
                gpus[slot.node, device] += round(1e4 * min(1.0, request.gpus))
    return cpus, memory, gpus


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(data=st.data(), cluster=clusters())
def test_every_role_has_a_place_and_no_device_is_given_out_twice_or_there_is_a_reason(
    data: st.DataObject, cluster: Cluster
) -> None:
    requests = data.draw(requests_for(cluster))
    sets = bundle_sets(requests)
    found = place(sets, cluster, advice=False)
    assert place(sets, cluster, advice=False) == found  # the same question, the same answer
    if isinstance(found, Shortage):
        assert found.role in {request.role for request in requests}
        assert found.missing
        return
    cpus, memory, gpus = used(requests, found)
    for node, amount in cpus.items():
        assert amount <= round(1e4 * cluster.nodes[node].cpus)
    for node, amount in memory.items():
        assert amount <= (cluster.nodes[node].memory_bytes or amount)
    for (node, device), amount in gpus.items():
        assert amount <= 10_000
        assert device < cluster.nodes[node].gpus
    for request in requests:
        slots = found.slots[request.role]
        assert len(slots) == request.replicas
        assert slots == tuple(sorted(slots)), "ranks go up with node and device"
        wanted = int(request.gpus) if request.gpus >= 1 else int(request.gpus > 0)
        assert all(len(set(slot.devices)) == wanted for slot in slots)
        if request.placement == "STRICT_PACK":
            assert len(set(nodes_of(found, request.role))) == 1
        if request.placement == "STRICT_SPREAD":
            assert len(set(nodes_of(found, request.role))) == request.replicas


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(data=st.data(), cluster=clusters())
def test_one_role_alone_is_refused_only_where_the_nodes_cannot_hold_it(
    data: st.DataObject, cluster: Cluster
) -> None:
    (request, *_) = data.draw(requests_for(cluster))
    found = place(bundle_sets([request]), cluster, advice=False)
    room = []
    for node in cluster.nodes:
        counts = [round(1e4 * node.cpus) // round(1e4 * request.cpus)]  # 2.0 // 0.1 is 19
        if request.gpus >= 1:
            counts.append(node.gpus // request.gpus)
        elif request.gpus:
            counts.append(node.gpus * (10_000 // round(1e4 * request.gpus)))
        if request.memory_bytes and node.memory_bytes is not None:
            counts.append(node.memory_bytes // request.memory_bytes)
        room.append(int(min(counts)))
    possible = {
        "PACK": sum(room) >= request.replicas,
        "SPREAD": sum(room) >= request.replicas,
        "STRICT_PACK": max(room) >= request.replicas,
        "STRICT_SPREAD": sum(1 for count in room if count) >= request.replicas,
    }[request.placement]
    assert isinstance(found, Placement) == possible


def test_shares_of_a_device_add_up_to_it_and_the_next_device_follows() -> None:
    cluster = described(1, 2, "h100-80gb", cpus_per_node=3)
    both = [RoleRequest("reference", 2, 1, 0.6), RoleRequest("reward", 1, 1, 0.4)]
    found = placed(both, cluster)
    assert found.slots["reference"] == ((0, (0,)), (0, (1,)))
    assert found.slots["reward"] == ((0, (0,)),)
    split = [both[0], RoleRequest("reward", 1, 0.5, 0.3), RoleRequest("policy", 1, 0.5, 0.45)]
    short = refused(split, cluster)
    assert "place for 0 of policy 1 x (0.5 CPU, 0.45 GPU)" in str(short)
    assert not short.certain


def test_what_one_role_takes_the_next_does_not_get() -> None:
    cluster = described(2, 4, "h100-80gb", cpus_per_node=4)
    found = placed([RoleRequest("policy", 3, 1, 1), RoleRequest("reward", 5, 1)], cluster)
    assert nodes_of(found, "policy") == [0, 0, 0]
    assert nodes_of(found, "reward") == [0, 1, 1, 1, 1]


ONE_WITH_GPUS = Cluster((Node("gpu", 32, 8, None, "h100-80gb"), Node("cpu", 8)), "drawn")


@pytest.mark.parametrize("placement", STRATEGIES)
@pytest.mark.parametrize("replicas", [1, 2])
def test_who_asks_for_no_gpu_goes_to_nodes_that_have_none(
    placement: Strategy, replicas: int
) -> None:
    requests = [
        RoleRequest("policy", 8, 1, 1),
        RoleRequest("environment", replicas, 2, placement=placement),
    ]
    found = placed(requests, ONE_WITH_GPUS)
    spared = [1] * replicas if placement != "STRICT_SPREAD" else [1, 0][:replicas]
    assert nodes_of(found, "environment") == sorted(spared)
    assert set(nodes_of(found, "policy")) == {0}


def test_who_finds_no_room_there_goes_to_the_others() -> None:
    found = placed([RoleRequest("environment", 6, 2)], ONE_WITH_GPUS)
    assert nodes_of(found, "environment") == [0, 0, 1, 1, 1, 1]
    whole = placed([RoleRequest("environment", 6, 2, placement="STRICT_PACK")], ONE_WITH_GPUS)
    assert nodes_of(whole, "environment") == [0] * 6


def test_nodes_with_gpus_are_not_spared_where_a_role_would_have_no_place() -> None:
    large = RoleRequest("reward", 1, 3, memory_bytes=20 * 2**30)
    small = RoleRequest("environment", 4, 4)
    cluster = Cluster(
        (Node("gpu", 16, 8, 10 * 2**30, "h100-80gb"), Node("cpu", 16, 0, 40 * 2**30)), "drawn"
    )
    found = placed([small, large], cluster)
    assert nodes_of(found, "reward") == [1]
    assert Counter(nodes_of(found, "environment")) == {0: 1, 1: 3}
    strict = RoleRequest("environment", 4, 4, placement="STRICT_PACK")
    assert nodes_of(placed([strict, large], cluster), "environment") == [0] * 4


def test_pack_fills_a_node_before_the_next_and_spread_takes_turns() -> None:
    cluster = described(4, 8, "h100-80gb")
    packed = placed([RoleRequest("policy", 12, 1, 1)], cluster)
    assert nodes_of(packed, "policy") == [0] * 8 + [1] * 4
    spread = placed([RoleRequest("rollout", 6, 1, 1, "SPREAD")], cluster)
    assert nodes_of(spread, "rollout") == [0, 0, 1, 1, 2, 3]


def test_a_tensor_parallel_replica_has_all_its_devices_on_one_node() -> None:
    cluster = described(3, 6, "h100-80gb")
    found = placed([RoleRequest("rollout", 3, 1, 4)], cluster)
    assert found.slots["rollout"] == tuple((node, (0, 1, 2, 3)) for node in range(3))
    short = refused([RoleRequest("rollout", 4, 1, 4)], cluster)
    assert "place for 3 of rollout 4 x (1 CPU, 4 GPU)" in str(short)
    assert "3 of rollout would, or 1 more node(s) like node-0" in str(short)
    assert not short.certain


def test_colocated_roles_share_places_one_by_one() -> None:
    requests = [RoleRequest("policy", 2, 1, 1), RoleRequest("rollout", 2, 1, 1)]
    cluster = described(1, 2, "h100-80gb")
    found = placed(requests, cluster, ["policy", "rollout"])
    assert found.slots["policy"] == found.slots["rollout"] == ((0, (0,)), (0, (1,)))
    (both,) = bundle_sets(requests, [["policy", "rollout"]])
    assert both.bundle == {"CPU": 2, "GPU": 1}
    assert both.share("policy") == both.share("rollout") == 0.5
    assert isinstance(place(bundle_sets(requests), cluster), Shortage)


@pytest.mark.parametrize(
    ("colocate", "said"),
    [
        ([["policy", "rolout"]], "did you mean 'rollout'?"),
        ([["policy", "reward"]], "policy has 2, reward has 3"),
        ([["policy", "rollout"], ["rollout", "reference"]], "names rollout twice"),
        ([["policy", "critic"]], "give it one, or a place of its own"),
        ([["policy", "reference"]], "not resources.placement"),
    ],
)
def test_colocation_that_cannot_be_is_refused(colocate: list[list[str]], said: str) -> None:
    requests = [
        RoleRequest("policy", 2, 1, 1),
        RoleRequest("rollout", 2, 1, 1),
        RoleRequest("reward", 3, 1),
        RoleRequest("reference", 2, 1, 1, "SPREAD"),
        RoleRequest("critic", 2, 1, 2),
    ]
    with pytest.raises(BadRequest, match=r"cluster\.colocate") as error:
        bundle_sets(requests, colocate)
    assert said in str(error.value)


def test_one_and_a_half_gpus_cannot_be_given() -> None:
    with pytest.raises(BadRequest, match=r"policy asks for 1\.5 GPUs"):
        bundle_sets([RoleRequest("policy", 1, 1, 1.5)])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (RoleRequest("policy", 17, 1, 1), "asks for 17 GPU (policy 17 x 1)"),
        (RoleRequest("policy", 1, 200), "no node is large enough for one policy (200 CPU)"),
        (RoleRequest("policy", 9, 1, 1, "STRICT_PACK"), "is STRICT_PACK, and node-0"),
        (RoleRequest("policy", 3, 1, 1, "STRICT_SPREAD"), "2 of the cluster's 2 node(s)"),
    ],
)
def test_what_can_never_fit_is_said_for_certain(request_: RoleRequest, said: str) -> None:
    short = refused([request_], described(2, 8, "h100-80gb"))
    assert said in str(short)
    assert short.certain


def test_what_would_fit_does() -> None:
    cluster = described(2, 8, "h100-80gb")
    requests = [RoleRequest("policy", 8, 1, 1), RoleRequest("rollout", 5, 1, 2, "SPREAD")]
    assert "4 of rollout would, or 1 more node(s) like node-0" in str(refused(requests, cluster))
    placed([requests[0], RoleRequest("rollout", 4, 1, 2, "SPREAD")], cluster)
    placed(requests, described(3, 8, "h100-80gb"))


def test_totals_are_of_replicas() -> None:
    assert totals([RoleRequest("a", 2, 1.5, 1), RoleRequest("b", 3, 1)]) == {"CPU": 6, "GPU": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0,), "--nodes is 0"),
        ((2, -1), "--gpus-per-node is -1"),
        ((2, 8), "--gpu names no type"),
        ((2, 0, "h100-80gb"), "--gpus-per-node is 0"),
        ((2, 0, None, 0), "--cpus-per-node is 0"),
    ],
)
def test_a_description_of_no_cluster_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(BadDescription, match=said):
        described(*arguments)


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'h100-80gb'"):
        gpu_type("h100-80")


def test_a_node_of_ray_says_its_gpu_by_resource_or_label() -> None:
    node = {"NodeManagerAddress": "10.0.0.9", "Resources": {"CPU": 4.0, "GPU": 2.0}}
    assert from_ray(node).gpu is None
    label = {**node, "Labels": {"ray.io/accelerator-type": "H100"}}
    assert from_ray(label).gpu == "h100-80gb"
    unlisted = {**node, "Labels": {"ray.io/accelerator-type": "GeForce-RTX-4080"}}
    assert from_ray(unlisted).gpu is None
    both = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:A100": 1.0, "accelerator_type:A100-80G": 1.0}
    assert from_ray({**node, "Resources": both}).gpu == "a100-80gb"


@pytest.mark.parametrize(
    ("product", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("NVIDIA A10", "a10-24gb"),
        ("Tesla T4", "t4-16gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090-24gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
        ("NVIDIA RTX A6000", "rtx-a6000-48gb"),
        ("NVIDIA A100-SXM4-80GB", None),  # Ray's name is the same for 40 GB
        ("NVIDIA A100-SXM4-40GB", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_ray_makes_of_its_product(
    product: str, kind: str | None
) -> None:
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    name = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(product)
    assert type_by_ray([name]) == kind
