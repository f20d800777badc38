"""What is told below the last line of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aligntune.tracking.ending import ending


def write(path: Path, *rows: dict[str, float]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    """A saved model that writes text, as far as its config says."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    return folder


def test_before_and_after_of_each_criterion_and_what_comes_next(tmp_path: Path) -> None:
    first = {"step": 0, "version": 0, "eval/reward/mean": 0.5}
    last = {"step": 30, "version": 30, "eval/reward/mean": 1.25}
    write(
        tmp_path / "evals.jsonl",
        first | {"eval/reward/math/mean": 0.25, "eval/reward/concise/mean": 0.5},
        first | {"step": 10},
        last | {"eval/reward/math/mean": 0.75, "eval/reward/concise/mean": 0.5},
    )
    write(tmp_path / "metrics.jsonl", {"step": 1, "eval/reward/mean": 9.0})
    write(tmp_path / "samples.jsonl")
    told = ending(tmp_path, tmp_path / "model")
    assert told[:3] == [
        "held-out reward 0.500 -> 1.250 (step 0 -> 30)",
        "  math 0.250 -> 0.750",
        "  concise 0.500 -> 0.500",
    ]
    assert f"aligntune samples {tmp_path} --worst" in told[3]
    assert f"aligntune chat {tmp_path / 'model'}" in told[4]
    assert len(told) == 5


def test_a_preference_job_has_its_evaluations_among_its_steps(tmp_path: Path) -> None:
    write(
        tmp_path / "metrics.jsonl",
        {"step": 0, "eval/reward/accuracy": 0.5},
        {"step": 1, "loss": 0.7},
        {"step": 2, "loss": 0.6, "eval/reward/accuracy": 0.8},
    )
    assert (
        ending(tmp_path, tmp_path / "model")[0] == "held-out accuracy 0.500 -> 0.800 (step 0 -> 2)"
    )


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        ({"eval/loss": 3.912}, {"eval/loss": 1.044}, "loss 3.912 -> 1.044"),  # SFT
        (
            {"eval/loss": 0.7, "eval/reward/mean": -0.125, "eval/reward/accuracy": 0.5},
            {"eval/loss": 0.4, "eval/reward/mean": 2.5, "eval/reward/accuracy": 0.75},
            "accuracy 0.500 -> 0.750",  # a reward model
        ),
    ],
)
def test_the_held_out_figure_has_its_own_name(
    tmp_path: Path, first: dict[str, float], last: dict[str, float], told: str
) -> None:
    write(tmp_path / "metrics.jsonl", {"step": 0, **first}, {"step": 2, **last})
    assert ending(tmp_path, tmp_path / "model")[0] == f"held-out {told} (step 0 -> 2)"


@pytest.mark.parametrize(
    ("shares", "cause"),
    [
        ([], "a higher learning rate"),
        ([1.0, 0.75, 1.0], "a higher learning rate"),
        ([1.0, 1.0, 1.0], "in no step had a group two different rewards"),
    ],
)
def test_a_run_that_moved_nothing_says_so_and_names_the_cause_that_its_figures_show(
    tmp_path: Path, shares: list[float], cause: str
) -> None:
    rows = [
        {"step": n, "version": n, "eval/reward/mean": 0.595, "eval/time/eval": n, "eval/tokens": n}
        for n in (0, 3)
    ]
    write(tmp_path / "evals.jsonl", *rows)
    steps = [{"step": n, "groups/constant_fraction": x} for n, x in enumerate(shares, start=1)]
    write(tmp_path / "metrics.jsonl", {"step": 0, "eval/reward/mean": 0.595}, *steps)
    said = ending(tmp_path, tmp_path / "model")[1]
    assert said.startswith("warning: each held-out figure is exactly")
    assert cause in said
    assert ("learning rate" in said) == (cause == "a higher learning rate")


@pytest.mark.parametrize(
    "first",
    [
        {"step": 1},  # the weights before training were never evaluated
        {"step": 0, "eval/completions/length_mean": 81.5},  # the model says something else now
        {"step": 0, "eval/reward/std": 0.25},
    ],
)
def test_one_equal_mean_does_not_say_that_nothing_moved(
    tmp_path: Path, first: dict[str, float]
) -> None:
    equal = {"eval/reward/mean": 0.5, "eval/completions/length_mean": 80.0}
    write(tmp_path / "evals.jsonl", {**equal, **first}, {"step": 3, **equal})
    assert not [line for line in ending(tmp_path, tmp_path / "model") if "warning" in line]


def test_a_reward_that_is_called_reward_is_told_apart_from_the_sum(tmp_path: Path) -> None:
    names = ("eval/reward/mean", "eval/reward/reward/mean", "eval/reward/math/mean")
    rows = [{"step": n, **dict.fromkeys(names, n + 0.5)} for n in (0, 2)]
    write(tmp_path / "evals.jsonl", *rows)
    told = ending(tmp_path, tmp_path / "model")
    assert told[1:3] == ["  reward/reward 0.500 -> 2.500", "  math 0.500 -> 2.500"]


def test_without_two_evaluations_only_the_commands_are_told(tmp_path: Path) -> None:
    assert all(": " in line for line in ending(tmp_path, tmp_path / "model"))
    write(tmp_path / "evals.jsonl", {"step": 5, "eval/reward/mean": 0.5})
    assert not [line for line in ending(tmp_path, tmp_path / "model") if "->" in line]


def test_what_reward_functions_printed_is_pointed_to_where_there_is_some(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "reward.log"
    log.parent.mkdir()
    log.write_text("")
    assert not any("reward.log" in line for line in ending(tmp_path, tmp_path / "model"))
    log.write_text("seen\n")
    assert any(str(log) in line for line in ending(tmp_path, tmp_path / "model"))


def test_a_job_without_samples_or_with_a_reward_model_names_no_command_that_refuses_it(
    tmp_path: Path, model: Path
) -> None:
    assert ending(tmp_path, model) == [
        f"curves:     aligntune report {tmp_path}",
        f"talk to it: aligntune chat {model}",
    ]
    (model / "config.json").write_text('{"architectures": ["Qwen2ForSequenceClassification"]}')
    assert ending(tmp_path, model) == [f"curves:     aligntune report {tmp_path}"]


@pytest.mark.parametrize(
    ("architectures", "writes"),
    [
        (["Qwen3ForCausalLM"], True),
        (["GPT2LMHeadModel"], True),
        (["Gemma3ForConditionalGeneration"], True),
        (["OwnArchitecture"], True),
        (["LlamaForSequenceClassification"], False),
        (["InternLM2ForRewardModel"], False),
        (["Qwen2Model"], False),
        (["BertForMaskedLM"], False),
        ([], False),
        (None, False),
    ],
)
def test_a_model_is_talked_to_unless_it_is_known_to_write_nothing(
    tmp_path: Path, model: Path, architectures: list[str] | None, writes: bool
) -> None:
    (model / "config.json").write_text(json.dumps({"architectures": architectures}))
    told = ending(tmp_path, model)
    assert (f"talk to it: aligntune chat {model}" in told) == writes
