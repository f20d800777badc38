"""Options that make no sense together are refused with the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO

ALL: list[type[Algorithm]] = [PPO, GRPO, DrGRPO, DAPO, GSPO]


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"old": "rollout", "correction": "token"}, "takes the ratio against the rollout engine"),
        ({"old": "rollout", "correction": "icepop"}, "set correction: none or old: policy"),
        ({"clip_low": 1.0}, "nothing would be clipped from below"),
        ({"clip_low": 0}, "greater than 0"),
        ({"clip_high": -0.1}, "greater than 0"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"beta": -0.1}, "greater than or equal to 0"),
        ({"beta": math.nan}, "finite"),
        ({"entropy_coefficient": math.inf}, "finite"),
        ({"correction_cap": 0.5}, "greater than or equal to 1"),
        ({"kl_estimator": "k1", "kl_in": "loss", "beta": 0.1}, "set kl_estimator: k3"),
        ({"kl_estimator": "k4"}, "'k1', 'k2' or 'k3'"),
        ({"aggregation": "mean"}, "'token_mean', 'sequence_mean' or 'constant'"),
        ({"cliplow": 0.2}, "Extra inputs"),
    ],
)
def test_refused_by_every_algorithm(
    algorithm: type[Algorithm], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        algorithm(**options)


@pytest.mark.parametrize(
    ("algorithm", "options", "reason"),
    [
        (PPO, {"combine": "decoupled"}, "PPO's baseline is its critic"),
        (PPO, {"kl_target": 0.1, "beta": 0.0}, "set beta above 0"),
        (PPO, {"kl_in": "loss"}, "its expected gradient is 0"),
        (PPO, {"gamma": 1.5}, "less than or equal to 1"),
        (PPO, {"metric": "score"}, "Extra inputs"),
        (GRPO, {"gae_lambda": 0.9}, "Extra inputs"),
        (GRPO, {"importance": "token"}, "Extra inputs"),
        (GRPO, {"kl_in": "reward", "combine": "decoupled"}, "set kl_in: loss or combine: sum"),
        (DrGRPO, {"combine": "decoupled"}, "Dr. GRPO exists to leave out"),
        (DAPO, {"max_sampling_rounds": 0}, "greater than 0"),
        (DAPO, {"overlong_cache": 0}, "greater than 0"),
        (PPO, {"kl_horizon": 500}, "without kl_target beta is fixed"),
        (GRPO, {"correction": "none", "correction_cap": 3.0}, "has no weights to bound"),
        (GRPO, {"old": "rollout", "correction_cap": 3.0}, "has no weights to bound"),
        (PPO, {"kl_in": "loss", "beta": 0}, "kl_in would do nothing: beta is 0"),
        (DAPO, {"kl_in": "reward"}, "kl_in would do nothing: beta is 0"),
        (GSPO, {"kl_estimator": "k2"}, "kl_estimator would do nothing: beta is 0"),
        (GRPO, {"kl_estimator": "k1", "beta": 0}, "kl_estimator would do nothing: beta is 0"),
        (DAPO, {"metric": "x", "dynamic_sampling": False}, "metric would do nothing"),
        (DAPO, {"max_sampling_rounds": 3, "dynamic_sampling": False}, "would do nothing"),
        (DAPO, {"overlong_cache": 3, "overlong_shaping": False}, "overlong_shaping is off"),
    ],
)
def test_refused_by_one_algorithm(
    algorithm: type[Algorithm], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        algorithm(**options)


@pytest.mark.parametrize("algorithm", ALL)
def test_ratios_against_the_rollout_exclude_the_default_correction(
    algorithm: type[Algorithm],
) -> None:
    assert algorithm().correction == "token"  # type: ignore[call-arg]
    against_rollout = algorithm(old="rollout")  # type: ignore[call-arg]
    assert against_rollout.correction == "none"
    assert algorithm.model_validate(against_rollout.model_dump()) == against_rollout


def test_k1_is_refused_in_the_loss_only_where_it_is_charged_there() -> None:
    assert PPO(beta=0).kl_estimator == "k1"
    assert GRPO(beta=0).kl_in == "loss"
    assert GRPO(kl_estimator="k1", kl_in="reward").kl_estimator == "k1"


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        GRPO().beta = 1.0
