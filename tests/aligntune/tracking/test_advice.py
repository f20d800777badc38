"""What a run's figures say is going wrong: each trouble over rows that have it, and over none."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from actors.messages import FinishReason
from aligntune.config.online import RunConfig
from aligntune.config.preference import PreferenceConfig
from aligntune.tracking.advice import AGAIN, CHECKS, RECENT, STILL, Adviser, troubles

GOOD = {
    "groups/constant_fraction": 0.3,
    "completions/truncated_fraction": 0.01,
    "policy/entropy": 0.8,
    "policy/grad_norm": 0.4,
    "kl/reference": 0.02,
    "kl/rollout_vs_policy": 0.0004,
    "staleness/max": 0.0,
}


def after(steps: int, **changes: float) -> list[dict[str, float]]:
    """A good run, and then `steps` with other figures."""
    named = {name.replace("__", "/"): value for name, value in changes.items()}
    return [dict(GOOD)] * 30 + [GOOD | named] * steps


BAD: dict[str, list[dict[str, float]]] = {
    "constant": after(RECENT, groups__constant_fraction=1.0),
    "truncated": after(RECENT, completions__truncated_fraction=0.25),
    "entropy": after(RECENT, policy__entropy=0.01),
    "kl": after(RECENT, kl__reference=1.5),
    "disagree": after(RECENT, kl__rollout_vs_policy=0.2),
    "still": after(STILL, kl__reference=0.0),
}


def test_every_trouble_has_rows_that_show_it() -> None:
    assert set(BAD) == set(CHECKS)


@pytest.mark.parametrize("name", BAD)
def test_a_trouble_is_told_alone_with_what_to_try(name: str) -> None:
    found = troubles(BAD[name])
    assert set(found) == {name}
    assert "ry " in found[name]
    assert "\n" not in found[name]


@pytest.mark.parametrize("name", BAD)
def test_one_step_less_is_no_trouble_yet(name: str) -> None:
    assert troubles(BAD[name][:-1]) == {}


def test_a_good_run_and_one_without_these_figures_are_left_alone() -> None:
    assert troubles([GOOD] * 100) == {}
    assert troubles([{"reward/mean": 0.5}] * 100) == {}
    assert troubles([]) == {}


def test_older_weights_may_differ_from_the_trainers() -> None:
    assert troubles(after(RECENT, kl__rollout_vs_policy=0.2, staleness__max=2.0)) == {}


def test_a_run_is_told_the_limits_that_cut_what_it_plays() -> None:
    cut = {"completions__truncated_fraction": 0.25}
    assert "rollout.max_completion_length" in troubles(after(RECENT, **cut))["truncated"]
    said = troubles(after(RECENT, **cut, turns__mean=3.0))["truncated"]
    for limit in ("max_turns", "max_tool_calls", "max_tokens", "episode_timeout_s"):
        assert f"episodes.{limit}" in said
    for reason in FinishReason:
        assert (f"`{reason.value}`" in said) == reason.truncated


PAIRS = {"loss": 0.6931, "reward/margin": 0.1, "policy/entropy": 0.8, "policy/grad_norm": 0.4}
TAUGHT = {"loss": 2.0, "policy/entropy": 0.8, "policy/grad_norm": 0.4}
STILL_TABLES = [PAIRS | {"reward/margin": 0.0}, TAUGHT | {"policy/grad_norm": 0.0}]


@pytest.mark.parametrize("row", STILL_TABLES)
def test_a_job_over_a_table_that_stands_still_names_its_own_key(row: dict[str, float]) -> None:
    said = troubles([row] * STILL)["still"]
    assert "train.learning_rate" in said
    assert "group" not in said, "it has none"


@pytest.mark.parametrize("row", [PAIRS, TAUGHT])
def test_a_job_over_a_table_may_become_sure_of_its_answers(row: dict[str, float]) -> None:
    assert troubles([row] * 30 + [row | {"policy/entropy": 0.001}] * 30) == {}


@pytest.mark.parametrize("name", ["policy/grad_norm", "kl/reference"])
def test_where_no_group_had_two_rewards_the_learning_rate_is_not_blamed(name: str) -> None:
    flat = GOOD | {name: 0.0, "groups/constant_fraction": 1.0}
    said = troubles([flat] * STILL)["still"]
    assert "no group had two different rewards" in said
    assert "learning_rate" not in said
    one = flat | {"groups/constant_fraction": 0.875}
    said = troubles([one, *[flat] * (STILL - 1)])["still"]
    assert "policy.learning_rate" in said
    assert "rewards of a group differ" in said
    del flat["groups/constant_fraction"]  # as of PPO, which compares none
    said = troubles([flat] * STILL)["still"]
    assert "policy.learning_rate" in said
    assert "group" not in said


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.sampled_from(sorted(GOOD)), st.floats(allow_nan=False))))
def test_whatever_the_figures_advice_never_fails(rows: list[dict[str, float]]) -> None:
    troubles(rows)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_figures_that_are_held_at_the_largest_number_end_no_run(name: str) -> None:
    troubles([GOOD | {name: sys.float_info.max}] * 2 * RECENT)


def test_an_adviser_tells_once_and_again_where_it_lasts() -> None:
    adviser, bad = Adviser(), GOOD | {"groups/constant_fraction": 1.0}
    told = [step for step in range(1, 2 * AGAIN) if adviser.hear(step, bad)]
    assert told == [RECENT, RECENT + AGAIN]


@pytest.mark.slow
@given(st.lists(st.sampled_from([GOOD, *(rows[-1] for rows in BAD.values())]), min_size=1))
def test_an_adviser_that_knows_both_ends_of_a_run_says_what_one_that_heard_it_all_says(
    rows: list[dict[str, float]],
) -> None:
    heard = Adviser()
    steps = [*enumerate(rows, start=1)]
    for step, figures in steps[:-1]:
        heard.hear(step, figures)
    heard._told.clear()
    before = dict([*steps[:-1][:RECENT], *steps[:-1][-STILL:]])
    resumed = Adviser(sorted(before.items()))
    assert resumed.hear(*steps[-1]) == heard.hear(*steps[-1])
    resumed.back_to(0)
    assert resumed.hear(*steps[0]) == {}


def test_a_step_that_comes_again_counts_once_and_a_trouble_of_it_is_told_again() -> None:
    adviser, still = Adviser(), GOOD | {"kl/reference": 0.0}
    told: list[int] = []
    for after, last in ((0, 15), (5, 25), (18, 25)):
        adviser.back_to(after)
        told += [step for step in range(after + 1, last + 1) if adviser.hear(step, still)]
    assert told == [STILL, STILL]


def test_no_trouble_is_seen_across_a_rollback_that_leaves_a_gap() -> None:
    adviser, cut = Adviser(), GOOD | {"completions/truncated_fraction": 0.5}
    for step in range(1, 101):
        adviser.hear(step, cut if step < 5 else GOOD)
    adviser.back_to(50)
    told = [step for step in range(51, 60) if adviser.hear(step, cut)]
    assert told == [50 + RECENT]


def keys(model: type[BaseModel], before: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        found.add(before + name)
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not model:
                found |= keys(inner, f"{before}{name}.")
    return found


def advised(rows: Sequence[list[dict[str, float]]]) -> set[str]:
    """The keys that the advice on these rows names, each group of rows a run of its own."""
    said = [text for run in rows for text in troubles(run).values()]
    return {key for text in said for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", text)}


def test_every_key_that_is_advised_is_one_of_the_run_s_own_tree() -> None:
    episodes = after(RECENT, completions__truncated_fraction=0.25, turns__mean=3.0)
    online = advised([*BAD.values(), episodes]) - {"samples.jsonl", "algorithm.beta"}
    assert len(online) >= 5
    assert online <= keys(RunConfig)
    table = advised([[row] * STILL for row in STILL_TABLES])
    assert table
    assert table <= keys(PreferenceConfig)
