"""What a run's figures say is going wrong: each trouble over rows that have it, and over none."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

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


def test_a_preference_job_that_stands_still_names_its_own_key() -> None:
    rows = [{"loss": 0.6931, "reward/margin": 0.0, "reward/accuracy": 0.5}] * STILL
    assert "train.learning_rate" in troubles(rows)["still"]


@pytest.mark.parametrize("name", ["policy/grad_norm", "kl/reference"])
def test_where_no_group_had_two_rewards_the_learning_rate_is_not_blamed(name: str) -> None:
    flat = GOOD | {name: 0.0, "groups/constant_fraction": 1.0}
    said = troubles([flat] * STILL)["still"]
    assert "no group had two different rewards" in said
    assert "learning_rate" not in said
    one = flat | {"groups/constant_fraction": 0.875}
    assert "policy.learning_rate" in troubles([one, *[flat] * (STILL - 1)])["still"]


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


def keys(model: type[BaseModel], before: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        found.add(before + name)
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not model:
                found |= keys(inner, f"{before}{name}.")
    return found


def test_every_key_that_is_advised_exists() -> None:
    known = keys(RunConfig) | keys(PreferenceConfig)
    said = [text for rows in BAD.values() for text in troubles(rows).values()]
    rows: list[Any] = [{"loss": 0.6931, "reward/margin": 0.0}] * STILL
    said += troubles(rows).values()
    named = {key for text in said for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", text)}
    assert len(named) >= 6
    assert named - {"samples.jsonl", "algorithm.beta"} <= known
