"""The systems that are measured beside each other do the same work: prompts, rewards and loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.end_to_end import parts, work
from tests.bench.end_to_end.seen import Group, Step, expected_loss
from tests.bench.end_to_end.work import SIX_MILLION, SMALL
from tests.bench.report import commit
from tests.e2e.rewards import digits

EPSILON = {"trl": 1e-4, "transformers_0": 1e-6}  # beside a group's standard deviation


def group(*rewards: float, tokens: tuple[int, ...]) -> Group:
    return Group(prompt="p", texts=("t",) * len(tokens), tokens=tokens, rewards=rewards)


def test_the_loss_of_a_first_step_is_minus_the_mean_advantage_of_a_token() -> None:
    even = group(0.0, 1.0, tokens=(5, 5))
    assert expected_loss([even], 0.0) == 0
    ragged = group(0.0, 1.0, tokens=(1, 3))  # advantages of 0.5 ** 0.5 either way
    assert expected_loss([ragged], 0.0) == pytest.approx(-(0.5**0.5) * 2 / 4)
    assert expected_loss([even, ragged], 0.0) == pytest.approx(-(0.5**0.5) * 2 / 14)


def test_both_configs_say_the_work_and_nothing_else() -> None:
    from aligntune.config.online import load_online_config

    ours = load_online_config(work.ours(SIX_MILLION, Path("model"), Path("data"), Path("out"), 3))
    theirs = work.trl(SIX_MILLION, Path("out"), 3)
    assert ours.train.steps == theirs["max_steps"]
    batch = theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"]
    group_size = ours.train.completions_per_group
    assert ours.train.groups_per_minibatch == ours.train.groups_per_step == 16
    assert batch == ours.train.groups_per_step * 8
    assert group_size == theirs["num_generations"] == 8
    assert ours.rollout.max_completion_length == theirs["max_completion_length"]
    assert ours.rollout.temperature == theirs["temperature"]
    assert ours.algorithm.beta == theirs["beta"] == 0
    assert ours.algorithm.clip_low == ours.algorithm.clip_high == theirs["epsilon"]
    assert (ours.algorithm.aggregation, theirs["loss_type"]) == ("token_mean", "dapo")
    assert ours.policy.learning_rate == theirs["learning_rate"]
    assert ours.policy.scheduler == theirs["lr_scheduler_type"]
    assert ours.policy.adam_betas == (theirs["adam_beta1"], theirs["adam_beta2"])
    assert ours.policy.weight_decay == theirs["weight_decay"]
    assert ours.policy.max_grad_norm == theirs["max_grad_norm"]


def part(system: str, **changes: object) -> parts.Part:
    step = Step(wall_s=2.0, cpu_s=1.0, loss=0.0, groups=(group(0.0, 1.0, tokens=(4, 6)),))
    asked = 1 if system == "trl" else 2
    made = parts.Part(
        system=system, work=SMALL, commit=commit(), asked=asked, load=0.0, seconds=9.0,
        steps=(step,) * asked,
    )  # fmt: skip
    return made.model_copy(update=changes)


def test_parts_that_are_there_are_joined_and_those_that_are_not_are_counted(
    tmp_path: Path,
) -> None:
    def write(one: parts.Part, round_: int) -> None:
        path = parts.path_of(one.system, round_, SMALL, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one.model_dump_json())

    systems, options = ("trl", "ours_0"), parts.Options(rounds=2, steps=2, parts=0)
    write(part("trl", commit="another"), 1)  # TRL is not ours: it is the same
    write(part("ours_0", commit="another"), 1)
    write(part("trl"), 2)
    write(part("ours_0"), 2)
    with pytest.raises(parts.Unfinished, match="1 parts are left"):
        parts.measured(systems, SMALL, options, tmp_path)
    write(part("ours_0"), 1)
    found = parts.measured(systems, SMALL, options, tmp_path)
    assert {system: len(each) for system, each in found.items()} == {"trl": 2, "ours_0": 2}
    table = parts.figures(found)
    assert table["ours_0/steps"] == 4
    assert table["trl/tokens_a_s"] == 5
    assert table["trl/cpu_ms_a_token"] == 100
    assert table["trl/samples_a_s"] == SMALL.samples / 2
    with pytest.raises(parts.Unfinished, match="4 parts are left"):
        parts.measured(systems, SMALL, options.model_copy(update={"again": True}), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("system", EPSILON)
def test_a_system_has_the_prompts_the_rewards_and_the_loss_of_the_work(
    system: str, tmp_path: Path
) -> None:
    found = parts.measured([system], SMALL, parts.Options(rounds=1, steps=1), tmp_path)
    (step,) = found[system][0].steps
    assert sorted(each.prompt for each in step.groups) == sorted(work.prompts_of(SMALL))
    for each in step.groups:
        assert each.rewards == pytest.approx(digits(list(each.texts)), abs=1e-6)
        assert len(each.tokens) == SMALL.completions
        assert max(each.tokens) <= SMALL.new_tokens
    assert step.loss == pytest.approx(expected_loss(step.groups, EPSILON[system]), abs=2e-6)
    assert step.cpu_s > 0 < step.wall_s
