"""How the engine bench joins starts, and what of an old one counts."""

from __future__ import annotations

import os
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import psutil
import pytest

from tests.bench import engine
from tests.bench.end_to_end.parts import Options, Unfinished
from tests.bench.end_to_end.work import SMALL
from tests.bench.engine import (
    ENGINE,
    KINDS,
    Kind,
    Start,
    began_as,
    environment,
    joined,
    since,
    there,
)
from tests.bench.report import commit


def start(kind: Kind, engine_s: float, **changes: Any) -> Start:
    made = Start(
        start=kind[0],
        mode=kind[1],
        work=SMALL,
        commit=commit(),
        load=0.0,
        ready_s=9.0,
        ready_cpu_s={"VLLM::EngineCore": engine_s, "RolloutActor": 2.0, "main": 1.0},
        tokens=500,
        tokens_s=4.0,
        tokens_cpu_s={"VLLM::EngineCore": 3.0, "RolloutActor": 1.0},
    )
    return made.model_copy(update=changes)


def test_kinds_are_told_by_medians_of_the_engines_processes_and_the_first_start_apart() -> None:
    seconds = dict(zip(KINDS, (4.0, 30.0, 16.0, 40.0, 3.0, 20.0), strict=True))
    found = {
        kind: [start(kind, 60.0), *(start(kind, each + more) for more in (0, 0, 9))]
        for kind, each in seconds.items()
    }
    measured = joined(found)
    assert measured.figures["forked/eager/first_cpu_s"] == 60
    assert measured.figures["forked/eager/ready_cpu_s"] == 4
    assert measured.figures["forked/eager/ready_cpu_s/actor"] == 2
    assert measured.figures["forked/eager/ready_cpu_s/all"] == 7
    assert measured.figures["spawned/compiled/cpu_s_a_thousand"] == pytest.approx(8)
    assert measured.figures["eager/forked_over_spawned"] == pytest.approx(0.25)
    assert measured.figures["bare/eager/ready_cpu_s"] == 6
    assert measured.figures["forked/eager/ms_a_token"] == 8
    assert measured.figures["eager/forked_over_bare/cpu_s_a_thousand"] == 1
    assert measured.figures["eager_over_compiled/ready_cpu_s"] == pytest.approx(4 / 30)
    assert measured.met() == dict.fromkeys(measured.met(), True)


def test_what_takes_more_than_what_it_stands_for_misses_its_target() -> None:
    found = {kind: [start(kind, 5.0)] for kind in KINDS}
    found["forked", "eager"] = [start(("forked", "eager"), 6.0)]
    found["forked", "compiled"] = [start(("forked", "compiled"), 5.0, tokens=400)]
    assert joined(found).met() == {
        "eager/forked_over_spawned": False,
        "eager_over_compiled/ready_cpu_s": False,
        "compiled/forked_over_bare/cpu_s_a_thousand": False,
        "compiled/forked_over_bare/ms_a_token": False,
    }
    assert not joined(found, targets=False).targets


def test_a_start_of_another_commit_or_work_is_measured_again(tmp_path: Path) -> None:
    path, made = tmp_path / "start.json", start(KINDS[0], 1.0)
    assert there(path, SMALL) is None
    path.write_text(made.model_dump_json())
    assert there(path, SMALL) == made
    assert there(path, SMALL.model_copy(update={"prompts": 5})) is None
    path.write_text(made.model_copy(update={"commit": "another"}).model_dump_json())
    assert there(path, SMALL) is None


@pytest.mark.slow
def test_kinds_take_turns_in_parts_that_outlive_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[Kind, bool]] = []

    def begin(kind: Kind, work: Any, path: Path, fresh: bool) -> None:
        begun.append((kind, fresh))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(start(kind, 1.0, work=work).model_dump_json())

    monkeypatch.setattr(engine, "FOLDER", tmp_path)
    monkeypatch.setattr(engine, "begin", begin)
    with pytest.raises(Unfinished, match="7 starts are left"):
        engine.measure(Options(rounds=2, parts=5))
    measured = engine.measure(Options(rounds=2))
    assert begun == [(kind, fresh) for fresh in (True, False) for kind in KINDS]
    assert {f"{start}/{mode}/ready_cpu_s" for start, mode in KINDS} <= measured.figures.keys()


def test_a_spawned_engine_has_no_forks_and_each_kind_has_caches_of_its_own(tmp_path: Path) -> None:
    given = {"PATH": "/bin", "RAY_ADDRESS": "auto", "ALIGNTUNE_FORKS": "/socket"}
    forked = environment(("forked", "eager"), tmp_path / "a", given)
    spawned = environment(("spawned", "eager"), tmp_path / "b", given)
    assert forked.keys() == {"PATH", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"}
    assert spawned["ALIGNTUNE_FORKS"] == "off"
    assert forked["VLLM_CACHE_ROOT"] != spawned["VLLM_CACHE_ROOT"]


def test_an_engine_is_spawned_where_it_is_the_actors_child_and_else_forked() -> None:
    assert began_as([7], actor=7) == "spawned"
    assert began_as([3], actor=7) == "forked"
    with pytest.raises(RuntimeError, match="no process"):
        began_as([], actor=7)
    assert since({"a": 1.0}, {"a": 3.0, "b": 2.0}) == {"a": 2.0, "b": 2.0}


def test_vllms_processes_are_known_by_their_titles() -> None:
    named = [ENGINE + "EngineCore", "another"]
    waiting = [Popen([title], executable="/bin/cat", stdin=PIPE) for title in named]
    try:
        assert list(engine.engines(psutil.Process())) == [os.getpid()]
    finally:
        for process in waiting:
            process.communicate()
    assert not list(engine.engines(psutil.Process()))
