"""Which checkpoint is the best one, and which model of a run is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.storage import Store
from aligntune.errors import UserError
from aligntune.runs.best import Best, best_checkpoint
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.choice import chosen_model
from aligntune.runs.mirror import Mirror
from aligntune.runs.rundir import RunDir
from tests.aligntune.runs.test_checkpoint import save
from tests.aligntune.runs.test_ended import stand, went_on

REWARD = "eval/reward/mean"
BEST = Best(REWARD)


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def evaluate(rundir: RunDir, values: dict[int, float], torn: str = "") -> None:
    rows = [{"step": step, REWARD: value} for step, value in values.items()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    rundir.file("evals.jsonl").write_text(text + torn)


def keep(rundir: RunDir, *steps: int) -> None:
    checkpoints = Checkpoints(rundir.file("checkpoints"), keep_last=9)
    for step in steps:
        save(checkpoints, step)


@pytest.mark.slow
@given(
    st.dictionaries(st.integers(0, 30), st.floats(-5, 5), max_size=8),
    st.sets(st.integers(0, 30), max_size=8),
    st.sets(st.integers(0, 30), max_size=8),
    st.sampled_from(["max", "min"]),
)
def test_no_whole_one_that_is_kept_is_better_and_none_as_good_is_earlier(
    values: dict[int, float], kept: set[int], damaged: set[int], mode: str
) -> None:
    best = Best(REWARD, mode)  # type: ignore[arg-type]
    found = best.among(values, sorted(kept), lambda step: step not in damaged)
    able = [step for step in values if step in kept - damaged]
    if found is None:
        assert able == []
    else:
        sign = 1 if mode == "max" else -1
        assert found == min(able, key=lambda step: (-sign * values[step], step))


def test_a_damaged_best_one_gives_way_to_the_next_and_that_is_said(rundir: RunDir) -> None:
    evaluate(rundir, {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.4}, torn='{"step": 5, "eval/rew')
    keep(rundir, 2, 3, 4)
    checkpoint, said = best_checkpoint(rundir, BEST)
    assert (checkpoint.step, said) == (2, f"{REWARD} 0.9")
    (rundir.file("checkpoints") / "step-000002" / "policy" / "weights").write_text("torn")
    checkpoint, said = best_checkpoint(rundir, BEST)
    assert checkpoint.step == 3
    assert said == f"{REWARD} 0.5; step 2 had 0.9, and there is no whole checkpoint of it"


def test_a_run_that_keeps_none_or_has_none_yet_says_so(rundir: RunDir) -> None:
    with pytest.raises(UserError, match=r"set checkpoint\.best\.metric and eval\.every_steps"):
        best_checkpoint(rundir, None)
    evaluate(rundir, {5: 0.5})
    keep(rundir, 4)
    with pytest.raises(UserError, match="are of the steps 5, checkpoints of 4"):
        best_checkpoint(rundir, BEST)


def test_the_newest_model_is_the_export_or_what_has_gone_further(rundir: RunDir) -> None:
    assert chosen_model(rundir, "hub/name").origin == "start"
    stand(rundir, trained=9, finished=7, exported=True)
    keep(rundir, 6, 8)
    newest = chosen_model(rundir, "hub/name")
    assert (newest.origin, newest.step) == ("checkpoint", 8)
    assert newest.is_checkpoint
    stand(rundir, trained=9, finished=9, exported=False)
    assert chosen_model(rundir, "hub/name").origin == "export"


def test_the_newest_model_of_a_run_that_went_back_is_no_older_export(rundir: RunDir) -> None:
    stand(rundir, trained=5, finished=7, exported=True, later=went_on("resumed", 3))
    keep(rundir, 3, 5)
    newest = chosen_model(rundir, "hub/name")
    assert (newest.origin, newest.step) == ("checkpoint", 5)
    with pytest.raises(UserError, match="has not ended, so"):
        chosen_model(rundir, "hub/name", "export")


def test_a_model_that_is_named_is_taken_or_refused(rundir: RunDir) -> None:
    stand(rundir, trained=8, finished=None, exported=False)
    evaluate(rundir, {6: 0.9, 8: 0.1})
    keep(rundir, 6, 8)
    assert chosen_model(rundir, "hub/name", "6").step == 6
    best = chosen_model(rundir, "hub/name", "best", BEST)
    assert (best.step, best.origin, best.why) == (6, "best", f"{REWARD} 0.9")
    assert chosen_model(rundir, "hub/name", "start").model == "hub/name"
    with pytest.raises(UserError, match="has not ended, so it has exported no model"):
        chosen_model(rundir, "hub/name", "export")
    with pytest.raises(UserError, match="there are those of: 6, 8"):
        chosen_model(rundir, "hub/name", "7")
    with pytest.raises(UserError, match="'bset' is no checkpoint; name newest, best or a step"):
        chosen_model(rundir, "hub/name", "bset")


def test_the_storage_keeps_the_best_one_too_and_gives_it_back(
    rundir: RunDir, tmp_path: Path
) -> None:
    rundir.config.write_text("train:\n  seed: 3\n")
    bucket = str(tmp_path / "bucket")
    mirror = Mirror(bucket, rundir.path, 1, 60, BEST)
    checkpoints = Checkpoints(rundir.file("checkpoints"), keep_last=1)
    for step in range(1, 5):
        evaluate(rundir, {before: 1.0 / before for before in range(2, step)})
        (checkpoints.begin(step) / "policy" / "weights").write_text(str(step))
        checkpoints.commit(step, {"step": step}, {"step-000002"})
        mirror.push(rundir.file("checkpoints") / f"step-{step:06d}")
    there = {name for name in Store(bucket).names("checkpoints") if name.startswith("step-")}
    assert there == {"step-000002", "step-000004"}

    new = RunDir(tmp_path / "new")
    own = Checkpoints(new.file("checkpoints"), keep_last=1)
    assert Mirror(bucket, new.path, 1, 60, BEST).fetch(own) == []
    assert own.steps() == [2, 4]
    assert best_checkpoint(new, BEST)[0].step == 2
