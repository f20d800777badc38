"""Plans of many nodes, how they are drawn, and the command around them."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from aligntune.cli import main
from cluster.gpus import gpu_type
from cluster.machines import Machines
from cluster.plan.draw import draw
from cluster.plan.plan import make_plan
from cluster.resources import Cluster, described
from tests.cluster.plan.works import LARGE, SMALL, work_of, zero


@pytest.mark.slow
def test_planning_takes_work_in_proportion_to_nodes() -> None:
    """Counts calls, not seconds: they are the same on every machine. A plan that compared nodes
    with each other would make eight times as many calls for each node."""

    def calls(nodes: int) -> int:
        work = work_of(LARGE, ranks=nodes, replicas=7 * nodes - 168)
        work = replace(work, policy=replace(work.policy, **zero(3)))
        cluster = described(nodes, 8, "h100-80gb")
        seen = Counter[str]()
        before = sys.getprofile()
        sys.setprofile(lambda _frame, event, _arg: seen.update((event,)))
        try:
            plan = make_plan(work, cluster)
        finally:
            sys.setprofile(before)
        assert len(plan.placement.slots["rollout"]) == 7 * nodes - 168
        return seen["call"] + seen["c_call"]

    few, many = calls(64), calls(512)
    assert many / 512 < 1.5 * few / 64


@pytest.mark.parametrize("gpus", [0, 8])
def test_nodes_of_one_kind_are_drawn_once_though_their_memory_differs_a_little(gpus: int) -> None:
    nodes = described(64, gpus, "h100-80gb" if gpus else None).nodes
    sizes = [512 * 2**30 - 2**20 * (37 * index % 101) for index in range(64)]
    cluster = Cluster(
        tuple(node._replace(memory_bytes=size) for node, size in zip(nodes, sizes, strict=True)),
        "Ray",
    )
    work = work_of(ranks=64, replicas=64, gpus=float(gpus > 0))
    rollout = replace(work.rollout, engine="vllm" if gpus else "transformers")
    spread = tuple(replace(one, placement="SPREAD") for one in work.requests)
    out = io.StringIO()
    draw(
        make_plan(replace(work, rollout=rollout, requests=spread), cluster),
        Console(file=out, force_terminal=False),
    )
    shown = out.getvalue()
    assert len(shown.splitlines()) < 60
    assert " nodes)" in shown
    assert f"{min(sizes) / 2**30:.1f} GiB .. {max(sizes) / 2**30:.1f} GiB" in shown


def test_a_node_with_half_the_memory_is_drawn_apart() -> None:
    nodes = described(3, 0).nodes
    sizes = (256 * 2**30, 256 * 2**30, 128 * 2**30)
    cluster = Cluster(
        tuple(node._replace(memory_bytes=size) for node, size in zip(nodes, sizes, strict=True)),
        "Ray",
    )
    work = work_of(replicas=3, gpus=0.0)
    spread = (replace(work.requests[1], placement="STRICT_SPREAD"),)
    out = io.StringIO()
    plan = make_plan(
        replace(work, frozen=(), requests=(*spread, work.requests[0])),
        cluster,
    )
    draw(plan, Console(file=out, force_terminal=False))
    assert "128.0 GiB" in out.getvalue()
    assert "256.0 GiB" in out.getvalue()
    assert ".. 256.0" not in out.getvalue()


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.04},
        "model": {"name": str(tiny_model)},
        "data": {"path": "not-read.jsonl"},
        "rewards": ["exact_match"],
        "output_dir": str(tmp_path / "run"),
        "rollout": {"engine": "transformers"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`aligntune plan` on the config; its exit code and what it printed. Nothing may start Ray."""
    import ray

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a plan started Ray")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray is not asked

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(config), *arguments])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return command


def test_the_command_draws_a_plan_for_this_machine(run: Run, config: Path) -> None:
    code, out, error = run()
    assert code == 0, error
    assert "this-machine" in out
    assert "policy 0, rollout 0, reward 0, reference 0" in out
    for heading in ("where each rank goes", "GiB of one rank", "bound by", "assumed"):
        assert heading in out
    assert out.isascii()
    assert not (config.parent / "run").exists()


GPUS = [f"{role}.resources.gpus=1" for role in ("policy", "rollout", "reference")]
ON_H100 = ["--nodes", "64", "--gpus-per-node", "8", "--gpu", "h100-80gb", *GPUS]


@pytest.mark.slow
def test_the_command_tells_everything_as_json(run: Run) -> None:
    code, out, error = run(*ON_H100, f"model.name={SMALL}", "rollout.replicas=500", "--json")
    assert code == 0, error
    plan = json.loads(out)
    assert len(plan["placement"]["rollout"]) == 500
    assert plan["staleness"]["0"]["step_seconds"] >= plan["staleness"]["1"]["step_seconds"]
    assert plan["bound"] in plan["seconds"]
    assert plan["assumptions"]


def test_nodes_that_look_alike_are_drawn_once(run: Run) -> None:
    code, out, error = run(
        *ON_H100, f"model.name={SMALL}", "rollout.replicas=502", "policy.ranks=1"
    )
    assert code == 0, error
    assert "node-01 .. node-62 (62 nodes)" in out
    assert "rollout 6 .. 494" in out
    assert len(out.splitlines()) < 80


AS_SET = [
    f"model.name={LARGE}",
    "model.dtype=bfloat16",
    "model.gradient_checkpointing=false",
    "policy.ranks=1",
    "policy.strategy=torch",
    "policy.tokens_per_microbatch=16384",
    "cluster.colocate=[]",
]


@pytest.mark.slow
def test_a_setting_that_the_refusal_names_makes_it_fit(run: Run) -> None:
    code, _, error = run(*ON_H100, *AS_SET)
    assert code == 2
    first = error.partition("what would fit: ")[2].partition(", or ")[0]
    settings_ = [part for text in first.split(" and ") for part in text.split(", ")]
    code, _, error = run(*ON_H100, *AS_SET, *settings_)
    assert code == 0, error


def test_the_type_that_is_given_is_that_of_all_gpus_of_a_connected_cluster(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Machines(described(1, 4, "a100-40gb"), 16, here=False)
    monkeypatch.setattr("aligntune.commands.plan.machines", lambda spec: there)
    for asked, kind in (([], "a100-40gb"), (["--gpu", "a100-80gb"], "a100-80gb")):
        code, out, error = run(f"model.name={SMALL}", "rollout.engine=vllm", *asked, "--json")
        assert code == 0, error
        capacities = {one["capacity"] for one in json.loads(out)["devices"]}
        assert gpu_type(kind).memory_bytes in capacities


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "--nodes is 0; a cluster has 1 or more"),
        (["--nodes", "2", "--gpus-per-node", "8"], "--gpu names no type"),
        (["--nodes", "2", "--gpus-per-node", "8", "--gpu", "h10"], "did you mean 'h100-80gb'"),
        (["--gpus-per-node", "8"], "say how many with --nodes"),
        (["--nodes", "1", *GPUS], "asks for 3 GPU"),
        (["model.name=Qwen/Qwen2.5-8B"], "did you mean 'Qwen/Qwen2.5-7B'"),
        (["model.name=./nowhere"], "model folder './nowhere' does not exist"),
        (["rollout.replicas=100", "--nodes", "1"], "asks for "),
        (["cluster.colocate=[[policy, rolout]]"], "did you mean 'rollout'"),
        (
            ["rollout.engine={name: vllm, tensor_parallel_size: 4}", "rollout.resources.gpus=2"],
            "each shard has one GPU",
        ),
        (["--gpu", "tpu"], "unknown GPU 'tpu'; known are a10-24gb"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    run: Run, arguments: list[str], said: str
) -> None:
    code, out, error = run(*arguments)
    assert code == 2
    assert said in error
    assert "\n" not in error.strip()
    assert not out


def test_a_preference_job_has_no_plan(run: Run) -> None:
    code, _, error = run("algorithm=dpo")
    assert code == 2
    assert "--dry-run" in error
