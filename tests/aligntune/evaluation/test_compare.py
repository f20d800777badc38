"""Two evaluations beside each other: who wins, whether by chance, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aligntune.cli import app
from aligntune.errors import UserError
from aligntune.evaluation.compare import Comparison, compared
from aligntune.evaluation.read import both, read_evaluated
from aligntune.evaluation.shown import comparison_lines
from aligntune.evaluation.store import Decoded, Summary, write_evaluation
from aligntune.evaluation.summary import Success
from tests.aligntune.report.written import online_run, preference_run, sft_run


def row(number: int, *rewards: float | None, **more: Any) -> dict[str, Any]:
    completions = [
        {
            "text": f"says {r}",
            "scores": {"math": r},
            "reward": r,
            "passed": None if r is None else r > 0,
        }
        for r in rewards
    ]
    asked = {"row": number, "prompt": f"<{number}>", "source": f"{number}?"}
    return {**asked, "decoding": "greedy", "completions": completions, **more}


def against(a: list[dict[str, Any]], b: list[dict[str, Any]], **more: Any) -> Comparison:
    return compared(("A", "B"), (a, b), **more)


def test_prompts_are_won_lost_and_tied_by_the_mean_of_their_completions() -> None:
    first = [row(0, 0.0, 1.0), row(1, 1.0, 1.0), row(2, 0.0, 0.0), row(3, 0.5, 0.5)]
    second = [row(2, 0.0, 1.0), row(0, 1.0, 1.0), row(3, 1.0, 0.0), row(1, 0.0, 0.0)]
    found = against(first, second)
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert found.difference.value == pytest.approx((0.5 - 1 + 0.5 + 0) / 4)
    assert (found.p, found.test) == (1.0, "sign test")
    assert [pair.row for pair in found.examples] == [1, 0, 2], "the largest difference first"
    assert found.examples[0].b.text == "says 0.0"


def test_an_empty_completion_is_told_apart_from_one_that_was_lost() -> None:
    first, second = [row(0, 0.0)], [row(0, 1.0)]
    first[0]["completions"][0]["text"], second[0]["completions"][0]["text"] = "", None
    assert comparison_lines(against(first, second))[-2:] == ["  A: (empty)", "  B: (lost)"]


def test_a_reward_that_is_called_as_the_sum_or_the_verdict_is_compared_by_its_path() -> None:
    def side(reward: float) -> list[dict[str, Any]]:
        own = row(0, 0.5)
        own["completions"][0]["scores"] = {"reward": reward, "passed": -reward}
        return [own]

    a, b = side(0.0), side(1.0)
    assert against(a, b).difference.value == 0.0
    assert against(a, b, metric="reward/reward").difference.value == 1.0
    assert against(a, b, metric="passed").difference.value == 0.0
    assert against(a, b, metric="reward/passed").difference.value == -1.0
    with pytest.raises(UserError, match="there are reward, reward/reward, passed"):
        against(a, b, metric="correct")


def test_what_is_better_on_nearly_all_prompts_is_unlikely_to_be_chance() -> None:
    first = [row(n, 0.0) for n in range(12)]
    second = [row(n, float(n > 0)) for n in range(12)]
    found = against(first, second, metric="passed")
    assert found.test == "McNemar's exact test"
    assert found.p == pytest.approx(2 / 2**11)
    assert found.significant
    assert found.difference.low is not None
    assert found.difference.low > 0.5
    swapped = against(second, first, metric="passed")
    assert (swapped.p, swapped.losses) == (found.p, found.wins)


def test_a_prompt_without_a_score_on_one_side_is_left_out() -> None:
    failed = {"row": 1, "prompt": "<1>", "source": "1?", "failed": "timeout"}
    found = against([row(0, 1.0), row(1, 1.0), row(2, None)], [row(0, 0.0), failed, row(2, 1.0)])
    assert (found.prompts, found.left_out) == (1, 2)
    with pytest.raises(UserError, match="no prompt of which both have a reward"):
        against([failed], [row(1, 1.0)])


def test_a_question_asked_twice_is_paired_twice() -> None:
    twice = [row(0, 0.0), row(0, 1.0)]
    assert against(twice, twice).ties == 2


def test_other_prompts_are_refused_with_one_of_them() -> None:
    said = r"not asked the same prompts: 1 of A's 2 are not in the other, as row 5"
    with pytest.raises(UserError, match=said):
        against([row(0, 1.0), row(5, 1.0)], [row(0, 1.0)])


def test_a_criterion_that_one_has_not_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match="A has no 'maht': did you mean 'math'"):
        against([row(0, 1.0)], [row(0, 1.0)], metric="maht")


def reward_model_run(folder: Path) -> Path:
    config = preference_run(folder) / "config.yaml"
    config.write_text(config.read_text().replace("name: dpo, beta: 0.1", "name: reward_model"))
    return folder


def test_two_runs_are_compared_by_the_last_evaluation_of_their_training(tmp_path: Path) -> None:
    folders = [online_run(tmp_path / name) for name in ("a", "b")]
    place = folders[1] / "eval_samples.jsonl"
    rows = [json.loads(line) for line in place.read_text().splitlines()]
    for each in rows:
        for completion in each["completions"]:
            completion["reward"] += each["row"] % 2
    place.write_text("".join(json.dumps(each) + "\n" for each in rows))
    done = CliRunner().invoke(app, ["compare", *map(str, folders), "--json"])
    assert done.exit_code == 0, done.output
    found = Comparison.model_validate_json(done.stdout)
    assert found.b == f"{folders[1]}, evaluation of step 60 in training, 4 of its 64 prompts"
    assert (found.wins, found.losses, found.ties) == (2, 0, 2)
    done = CliRunner().invoke(app, ["compare", *map(str, folders)])
    assert "B better on 2, worse on 0, equal on 2" in done.stdout
    assert "sign test, two-sided: p = 0.5, which may be chance at 5 %" in done.stdout


def evaluation(
    parent: Path,
    at_least: float,
    weights: dict[str, float] | None = None,
    criterion: str = "math",
    sampled: float | None = None,
) -> Path:
    """One of two rows that were judged by `criterion` >= `at_least`, greedy, and at a temperature
    where that is given."""
    rows = [row(0, 0.5), row(1, 1.0)]
    decodings = {"greedy": Decoded(completions=1, temperature=0.0, figures={})}
    if sampled is not None:
        rows += [row(each["row"], 0.5, 1.0, decoding="sampled") for each in rows]
        decodings["sampled"] = Decoded(completions=2, temperature=sampled, figures={})
    for each in rows:
        for said in each["completions"]:
            said["scores"] |= {name: 0.25 for name in weights or {} if name != "math"}
    summary = Summary(
        name=f"by-{at_least:g}",
        time="2026-11-27T00:00:00+00:00",
        model="m",
        origin="model",
        step=None,
        run=None,
        data="data/test.jsonl",
        prompts=2,
        failed=0,
        success=Success(criterion=criterion, at_least=at_least),
        weights=weights,
        answers="the whole completion",
        confidence=0.95,
        seed=1,
        seconds=1.0,
        versions=[],
        decodings=decodings,
    )
    return write_evaluation(parent, summary, rows)


def compare(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({"math": 1.0}, {"math": 2.0}, "the reward is math in .* and 2 x math in "),
        ({"math": 1.0}, {"math": 1.0, "length": 0.5}, r"and math \+ 0\.5 x length in "),
        (None, {"math": 1.0, "length": 1.0}, r"the reward is math in .* and math \+ length in "),
    ],
)
def test_rewards_that_are_different_sums_are_compared_by_a_criterion_alone(
    a: dict[str, float] | None, b: dict[str, float], said: str, tmp_path: Path
) -> None:
    first, second = (evaluation(tmp_path, 1.0, weights) for weights in (a, b))
    with pytest.raises(UserError, match=f"{said}.*compare by one criterion, as in --metric math"):
        both(first, second, None, "reward")
    assert compare(first, second).exit_code != 0
    done = compare(first, second, "--metric", "math")
    assert done.exit_code == 0, done.output
    assert compare(first, second, "--metric", "passed").exit_code == 0, "that is of math"


def test_verdicts_by_different_sums_are_not_compared(tmp_path: Path) -> None:
    places = [evaluation(tmp_path, 1.0, {"math": weight}, "reward") for weight in (1.0, 3.0)]
    with pytest.raises(UserError, match="--metric math"):
        both(*places, None, "passed")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"math": 2.0}, {"math": 2.0}),
        ({"math": 1.0}, {"math": 1.0, "length": 0.0}),
        (None, {"math": 2.0}),
    ],
)
def test_rewards_that_are_the_same_sum_as_far_as_is_known_are_compared(
    a: dict[str, float] | None, b: dict[str, float], tmp_path: Path
) -> None:
    done = compare(*(evaluation(tmp_path, 1.0, weights) for weights in (a, b)))
    assert done.exit_code == 0, done.output


def test_the_weights_of_an_evaluation_in_training_are_those_of_its_run(tmp_path: Path) -> None:
    folders = [online_run(tmp_path / name) for name in ("a", "b")]
    for folder, weight in zip(folders, (1.0, 2.0), strict=True):
        rewards = [{"function": "exact_match"}, {"function": "f:format", "weight": weight}]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"rewards": rewards}))
    with pytest.raises(UserError, match=r"exact_match \+ format in .* \+ 2 x format in .*--metric"):
        both(*folders, None, "reward")
    assert both(*folders, None, "format")
    assert both(folders[1], folders[1], None, "reward")


def test_completions_that_were_drawn_at_other_temperatures_are_not_compared(tmp_path: Path) -> None:
    warm, cool, as_warm = (evaluation(tmp_path, 1.0, sampled=heat) for heat in (1.0, 0.6, 1.0))
    said = f"\\(sampled\\) are drawn at temperature 1 in {warm} and at 0.6 in {cool}"
    with pytest.raises(UserError, match=f"{said}.*--decoding greedy.*--temperature"):
        both(warm, cool, "sampled", "reward")
    assert both(warm, cool, None, "reward")[2] == "greedy"
    assert both(warm, as_warm, "sampled", "reward")[2] == "sampled"


def test_the_temperature_of_an_evaluation_in_training_is_that_of_its_run(tmp_path: Path) -> None:
    folders = [online_run(tmp_path / name) for name in ("greedy", "sampled", "silent")]
    for folder, heat in zip(folders, (0.0, 1.0), strict=False):
        with (folder / "config.yaml").open("a") as config:
            config.write(f"eval: {{temperature: {heat}}}\n")
    with pytest.raises(UserError, match=r"temperature 0 in .* and at 1 in .*aligntune evaluate"):
        both(*folders[:2], None, "reward")
    for other in folders:
        assert both(other, folders[2], None, "reward"), "as far as is known"


def test_a_side_that_kept_only_what_the_model_saw_is_paired_by_that() -> None:
    first, second = [row(0, 0.0), row(1, 0.0)], [row(1, 1.0), row(0, 1.0)]
    for each in second:
        del each["source"]
    assert against(first, second).wins == 2


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (preference_run, "make one: aligntune evaluate .* --config CONFIG.yaml"),
        (sft_run, "make one: aligntune evaluate .* --config CONFIG.yaml"),
        (reward_model_run, "has a reward model, which writes no completions to compare"),
    ],
)
def test_a_job_over_a_table_says_how_it_is_evaluated(
    run: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        read_evaluated(run(tmp_path / "a"))


def test_verdicts_by_different_rules_are_not_compared(tmp_path: Path) -> None:
    strict, lax = (evaluation(tmp_path, at_least) for at_least in (1.0, 0.5))
    refused = compare(strict, lax, "--metric", "passed").exception
    assert isinstance(refused, UserError)
    assert f"passed by math >= 1 in {strict} and by math >= 0.5 in {lax}" in str(refused)
    assert compare(strict, lax).exit_code == 0, "their rewards are the same"
    again = evaluation(tmp_path, 1.0)
    assert compare(strict, again, "--metric", "passed").exit_code == 0


def test_a_run_without_evaluations_says_how_to_make_one(tmp_path: Path) -> None:
    folder = online_run(tmp_path / "a")
    (folder / "eval_samples.jsonl").unlink()
    done = CliRunner().invoke(app, ["compare", str(folder), str(folder)])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).endswith(f"make one: aligntune evaluate {folder}")
