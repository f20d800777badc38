"""An evaluation says which model it scores, and takes no other for the run's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aligntune.config.auto import tree_of
from aligntune.errors import UserError
from aligntune.runs.ended import (
    TRAINED_BY,
    Scored,
    check_ends,
    finished_at,
    is_over,
    model_to_score,
)
from aligntune.runs.rundir import IDENTITY, RunDir, differences, flatten
from tests.aligntune.config import test_preference
from tests.aligntune.online.test_settle_resources import config


def went_on(kind: str, step: int) -> list[dict[str, Any]]:
    """Events of a process that starts after a finish, up to one of `kind`."""
    return [{"kind": "run_started"}, {"kind": kind, "step": step}]


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stand(
    rundir: RunDir,
    trained: int,
    finished: int | None,
    exported: bool,
    later: Sequence[dict[str, Any]] = ({"kind": "run_stopped"},),
) -> None:
    """`later` are events after the finish."""
    write(rundir.file("metrics.jsonl"), [{"step": step} for step in range(trained + 1)])
    ended = [] if finished is None else [{"kind": "run_finished", "step": finished}]
    write(rundir.file("events.jsonl"), [{"kind": "run_started"}, *ended, *later])
    if exported:
        rundir.model.mkdir(exist_ok=True)


def test_before_training_it_is_the_start(rundir: RunDir) -> None:
    assert model_to_score(rundir, "hub/name") == Scored("hub/name", 0, "start")
    stand(rundir, trained=0, finished=None, exported=False)
    assert model_to_score(rundir, "hub/name") == Scored("hub/name", 0, "start")


def test_after_training_it_is_the_export_with_its_step(rundir: RunDir) -> None:
    stand(rundir, trained=7, finished=7, exported=True)
    assert finished_at(rundir) == 7
    assert model_to_score(rundir, "hub/name") == Scored(str(rundir.model), 7, "export")


@pytest.mark.parametrize(
    ("finished", "exported", "said"),
    [(None, False, "it has no model/ yet"), (5, True, "its model/ is of step 5")],
)
def test_a_run_between_the_two_is_refused(
    rundir: RunDir, finished: int | None, exported: bool, said: str
) -> None:
    stand(rundir, trained=9, finished=finished, exported=exported)
    with pytest.raises(UserError, match=f"stands at step 9 and {said}; call `aligntune train`"):
        model_to_score(rundir, "hub/name")


def test_a_run_is_over_at_its_last_step_with_its_model_and_nothing_changed(
    rundir: RunDir,
) -> None:
    stand(rundir, trained=7, finished=7, exported=True)
    assert is_over(rundir, 7)
    assert not is_over(rundir, 8), "it is to go on"
    rundir.changed = {"model.dtype": ("float32", "bfloat16")}
    assert not is_over(rundir, 7), "the model is to be written anew"


@pytest.mark.parametrize(("finished", "exported"), [(None, True), (7, False), (6, True)])
def test_a_run_that_was_stopped_is_not_over(
    rundir: RunDir, finished: int | None, exported: bool
) -> None:
    stand(rundir, trained=7, finished=finished, exported=exported)
    assert not is_over(rundir, 7)


@pytest.mark.parametrize("later", [went_on("resumed", 3), went_on("checkpoint_saved", 7)])
def test_a_run_that_went_back_has_yet_to_finish(
    rundir: RunDir, later: list[dict[str, Any]]
) -> None:
    stand(rundir, trained=7, finished=7, exported=True, later=later)
    assert finished_at(rundir) is None
    assert not is_over(rundir, 7), "model/ is of the weights before it went back"
    with pytest.raises(UserError, match="stands at step 7 and its model/ may be an older one"):
        model_to_score(rundir, "hub/name")
    stand(rundir, 7, 7, True, later=[*later, {"kind": "run_finished", "step": 7}])
    assert is_over(rundir, 7)


def test_a_run_that_is_extended_keeps_what_it_exported(rundir: RunDir) -> None:
    stand(rundir, trained=7, finished=7, exported=True, later=went_on("resumed", 7))
    assert finished_at(rundir) == 7
    later = [*went_on("resumed", 7), {"kind": "checkpoint_saved", "step": 8}]
    stand(rundir, trained=8, finished=7, exported=True, later=later)
    assert finished_at(rundir) == 7


@pytest.mark.parametrize(
    "changed",
    [
        "policy.learning_rate=1e-3",
        "algorithm.beta=0.5",
        "rollout.temperature=0.5",
        "rewards=[{function: math, weight: 2}]",
        "rewards=[{function: contains, options: {ignore_case: true}}]",
        "backend=unsloth",
    ],
)
def test_after_the_last_step_nothing_may_change_that_the_weights_were_trained_by(
    changed: str,
) -> None:
    key = changed.partition("=")[0].replace("rewards", r"rewards\.0\.\w+")
    found = differences(tree_of(config()), config(changed, "model.dtype=bfloat16"))
    said = rf"^all 7 steps are trained, and {key} was .* there and is .* here, which would train "
    with pytest.raises(UserError, match=said) as refused:
        check_ends(7, 7, 7, found)
    assert "model.dtype" not in str(refused.value)
    assert "raise train.steps to go on with it" in str(refused.value)
    with pytest.raises(UserError, match=r"raise train\.epochs"):
        check_ends(None, 7, 7, found)
    check_ends(8, 8, 7, found)  # it goes on


def test_after_the_last_step_export_evaluation_and_limits_may_change() -> None:
    now = config(
        "model.dtype=bfloat16",
        "data.eval_path=held.jsonl",
        "eval.temperature=0.5",
        "checkpoint.keep_last=1",
        "cluster.address=auto",
        "rollout.engine=transformers",
        "rewards=[{function: math, name: right, timeout_s: 5, workers: 1}]",
    )
    check_ends(7, 7, 7, differences(tree_of(config()), now))


JUDGE = "{{function: judge, options: {{url: 'http://{}:8000/v1', model: m, rubric: r}}}}"


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (f"rewards=[{JUDGE.format('node7')}]", f"rewards=[{JUDGE.format('node9')}]"),
        ("rewards=[{url: 'http://node7'}]", "rewards=[{url: 'http://node9'}]"),
        ("rewards=[{model: rms/a}]", "rewards=[{model: ./rms/a}]"),
        *(
            (f"rewards=[{{{given}}}]", f"rewards=[{{{given.replace(': m', ': ./m')}}}]")
            for given in ("function: m/r.py:f", "function: embedding, options: {model: m}")
        ),
        ("tools=[tools.py:add]", "tools=[./tools.py:add]"),
        ("environment={a: play.py:Game}", "environment={a: ./play.py:Game}"),
    ],
)
def test_after_the_last_step_services_may_move_and_paths_be_spelled_otherwise(
    was: str, now: str
) -> None:
    """A job whose last evaluation was cut off resumes with its judge on another node."""
    check_ends(7, 7, 7, differences(tree_of(config(was)), config(now)))


def test_what_changed_after_the_last_step_is_told_by_its_own_key() -> None:
    was = config("rewards=[{url: 'http://node7'}, {function: math}]")
    now = config("rewards=[{url: 'http://node9', weight: 2}, {function: math}]")
    with pytest.raises(UserError, match=r"and rewards\.0\.weight was 1.0 there and is 2.0 here, w"):
        check_ends(7, 7, 7, differences(tree_of(was), now))
    options = [f"rewards=[{{function: contains, options: {{text: {t}}}}}]" for t in ("a", "a/")]
    found = differences(tree_of(config(options[0])), config(options[1]))
    with pytest.raises(
        UserError, match=r"rewards\.0\.options\.text was 'a' there and is 'a/' here"
    ):
        check_ends(7, 7, 7, found)


USED_AFTERWARDS = (
    *("model", "data", "output_dir", "reward", "eval", "checkpoint", "tracking", "hub", "cluster"),
    *("train.steps", "train.epochs", "train.max_quarantined_fraction", "train.time_limit_s"),
    *(f"train.{of}_timeout_s" for of in ("silence", "step", "stall", "start")),
    *("train.resources", "train.deepspeed", "train.max_failures", "reference"),
    *("episodes", "rollout"),
    *(
        f"{role}.{key}"
        for role in ("policy", "critic")
        for key in ("resources", "tokens_per_microbatch", "packing", "update_timeout_s")
    ),
    *(f"{role}.start_timeout_s" for role in ("policy", "critic")),
    *("policy.tokens_per_chunk", "policy.shared_prompts", "policy.max_restarts"),
)
"""What an ended run reads, or what says how, when and where it trains, and not what."""


@pytest.mark.parametrize("made", [config(), test_preference.config()])
def test_every_key_says_whether_it_may_change_after_the_last_step(made: Any) -> None:
    known = (*IDENTITY, *TRAINED_BY, *USED_AFTERWARDS)
    open_ = [
        path
        for path in flatten(tree_of(made))
        if not any(path == key or path.startswith(f"{key}.") for key in known)
    ]
    assert open_ == []
