"""What the startup bench reads from a run's trace, and how it joins starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench import startup
from tests.bench.report import commit
from tests.bench.startup import KINDS, Start, joined, owner, stages, there


def call(name: str, role: str, start: float, end: float) -> dict[str, Any]:
    return {"name": name, "cat": role, "ph": "X", "ts": start * 1e6, "dur": (end - start) * 1e6}


def start(system: str, caches: str, wall_s: float, **changes: Any) -> Start:
    made = Start(
        system=system,
        caches=caches,
        commit=commit(),
        load=0.0,
        wall_s=wall_s,
        cpu_s={"main": wall_s, "Ray": wall_s},
        stages={"engine": wall_s - 1},
    )
    return made.model_copy(update=changes)


def test_stages_are_when_the_last_of_a_role_is_there_and_the_first_of_each_work_is_over() -> None:
    trace = [
        {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "rollout"}},
        call("start", "rollout", 110, 150),
        call("start", "reward", 109, 115),
        call("start", "reward", 109, 120),
        call("start", "policy", 110, 130),
        call("generate", "rollout", 150, 151),
        call("generate", "rollout", 150, 152),
        call("score", "reward", 151, 151.5),
        call("update", "policy", 153, 155),
    ]
    assert stages(trace, began=100.0) == pytest.approx(
        {
            "ray": 9,
            "policy": 30,
            "reward": 20,
            "rollout": 50,
            "first rollout": 51,
            "first reward": 51.5,
            "update": 55,
        }
    )


def test_ours_is_told_over_bare_of_the_same_caches_by_medians() -> None:
    found = {
        kind: [start(*kind, wall_s=seconds) for seconds in (times, times, 99.0)]
        for kind, times in zip(KINDS, (30.0, 20.0, 60.0, 20.0, 10.0, 25.0), strict=True)
    }
    measured = joined(found)
    assert measured.figures["cold/wall_over_bare"] == 2
    assert measured.figures["warm/wall_over_bare"] == 1.25
    assert measured.figures["warm/wall_over_eager"] == 2.5
    assert measured.figures["warm/ours/until_s/engine"] == 24
    assert measured.figures["warm/ours/cpu_s"] == 50
    assert measured.figures["warm/ours/cpu_s/Ray"] == 25
    assert measured.met() == {"cold/wall_over_bare": False, "warm/wall_over_bare": True}


def test_a_start_of_ours_counts_for_its_commit_and_one_of_bare_vllm_for_all(tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    assert there(path, "ours") is None
    for system, counts in (("bare", True), ("ours", False)):
        path.write_text(start(system, "warm", 1.0, commit="another").model_dump_json())
        assert (there(path, system) is not None) == counts
    path.write_text(start("ours", "warm", 1.0).model_dump_json())
    assert there(path, "ours") is not None


@pytest.mark.parametrize(
    ("title", "above", "whose"),
    [
        ("python -m aligntune.cli train config.yaml", "main", "main"),
        ("python -u /v/site-packages/ray/dashboard/dashboard.py", "main", "Ray"),
        ("/v/site-packages/ray/core/src/ray/raylet/raylet --raylet_socket", "main", "Ray"),
        ("ray::DashboardAgent", "Ray", "Ray"),
        ("ray::RolloutActor.start", "Ray", "RolloutActor"),
        ("VLLM::EngineCore", "RolloutActor", "VLLM::EngineCore"),
        ("python -u -c import json", "RewardActor", "RewardActor"),
    ],
)
def test_a_process_is_its_actors_vllms_rays_or_of_the_one_above(
    title: str, above: str, whose: str
) -> None:
    assert owner(title, above) == whose


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("system", ["bare", "ours"])
def test_a_start_tells_its_stages_in_order(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "FOLDER", tmp_path)
    found = startup.begun(system, "cold")
    assert found.cpu_s["main"] > 0
    assert (system == "ours") == ("PolicyActor" in found.cpu_s)
    times = list(found.stages.values())
    assert max(times) <= found.wall_s
    if system == "bare":
        assert times == sorted(times)
    else:
        assert found.stages["ray"] < found.stages["rollout"] < found.stages["first rollout"]
        assert found.stages["first reward"] < found.stages["update"]
