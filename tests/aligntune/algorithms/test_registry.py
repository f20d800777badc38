"""Names, aliases, paths and entry points of algorithms; and what each algorithm needs."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from aligntune.algorithms import registry
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO


class Mine(GRPO):
    """An algorithm of a user's own package."""


NOT_AN_ALGORITHM = dict


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in points]

    def entry_points(group: str) -> list[EntryPoint]:
        return [point for point in found if point.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("ppo", PPO), ("PPO", PPO), ("grpo", GRPO), ("GRPO", GRPO), ("dapo", DAPO),
        ("gspo", GSPO), ("drgrpo", DrGRPO), ("dr_grpo", DrGRPO), ("dr-grpo", DrGRPO),
        ("Dr. GRPO", DrGRPO), ("DrGRPO", DrGRPO), (" grpo ", GRPO),
    ],
)  # fmt: skip
def test_names_and_aliases(name: str, algorithm: type[Algorithm]) -> None:
    assert registry.get(name) is algorithm


def test_all_five_are_listed() -> None:
    assert set(registry.names()) >= {"ppo", "grpo", "dapo", "gspo", "drgrpo"}


@pytest.mark.parametrize(
    ("wrong", "near"), [("grop", "grpo"), ("gsppo", "gspo"), ("PP0", "ppo"), ("dr.grp", "drgrpo")]
)
def test_an_unknown_name_offers_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        registry.get(wrong)


@pytest.mark.parametrize("wrong", ["", "zzzzzz", "???"])
def test_a_name_like_nothing_lists_what_there_is(wrong: str) -> None:
    with pytest.raises(ValueError, match="known are ppo, grpo, dapo, gspo, drgrpo") as error:
        registry.get(wrong)
    assert "did you mean" not in str(error.value)


def test_a_path_leads_to_a_users_own_class() -> None:
    assert registry.get(f"{__name__}:Mine") is Mine


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no.such.module:Thing", "No module named"),
        (f"{__name__}:Missing", "Missing"),
        (f"{__name__}:NOT_AN_ALGORITHM", "not a subclass"),
        (f"{__name__}:install", "not a subclass"),
        (":Mine", "cannot be loaded"),
    ],
)
def test_a_path_that_leads_nowhere_says_why(path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        registry.get(path)


def test_an_installed_package_brings_its_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("my-way", f"{__name__}:Mine"))
    assert registry.get("My Way") is Mine
    assert registry.names()[-1] == "my-way"
    with pytest.raises(ValueError, match="did you mean 'myway'"):
        registry.get("mywy")


def test_an_entry_point_that_takes_our_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("GRPO", f"{__name__}:Mine"))
    with pytest.raises(ValueError, match="in use"):
        registry.names()


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("mine", f"{__name__}:Mine"), ("mine", "other.package:Mine"))
    with pytest.raises(ValueError, match="in use"):
        registry.get("mine")


def test_a_broken_entry_point_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("mine", "no.such.module:Mine"))
    with pytest.raises(ValueError, match=r"'mine' of entry point group.*No module named"):
        registry.get("mine")


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo", "gspo", "drgrpo"])
def test_every_algorithm_has_working_defaults_that_survive_a_round_trip(name: str) -> None:
    algorithm = registry.get(name)()  # type: ignore[call-arg]
    assert type(algorithm).model_validate(algorithm.model_dump()) == algorithm
    assert algorithm.title
    assert algorithm.defaults.learning_rate == 1e-6


def test_defaults_are_those_of_the_table() -> None:
    assert (PPO().beta, PPO().kl_estimator, PPO().kl_in) == (0.05, "k1", "reward")
    assert (PPO().aggregation, PPO.defaults.epochs) == ("token_mean", 4)
    assert (PPO.defaults.critic_learning_rate, PPO.defaults.completions_per_group) == (1e-5, 1)
    assert (PPO().gamma, PPO().gae_lambda, PPO().value_clip) == (1.0, 0.95, 0.2)
    assert (GRPO().beta, GRPO().kl_estimator, GRPO().kl_in) == (0.04, "k3", "loss")
    assert (GRPO().aggregation, GRPO.defaults.completions_per_group) == ("sequence_mean", 8)
    assert (DrGRPO().beta, DrGRPO().aggregation) == (0.0, "constant")
    assert DrGRPO.defaults.adam_betas == (0.9, 0.95)
    assert (DAPO().clip_low, DAPO().clip_high, DAPO().beta) == (0.2, 0.28, 0.0)
    assert (DAPO().aggregation, DAPO.defaults.minibatches) == ("token_mean", 16)
    assert DAPO.defaults.completions_per_group == 16
    assert (GSPO().clip_low, GSPO().clip_high, GSPO().beta) == (3e-4, 4e-4, 0.0)
    assert (GSPO().aggregation, GSPO.defaults.minibatches) == ("sequence_mean", 4)


def test_what_each_algorithm_needs() -> None:
    assert GRPO().needs.reference
    assert not any(a.needs.reference for a in (DAPO(), GSPO(), DrGRPO(), GRPO(beta=0)))
    needs = PPO().needs
    assert (needs.reference, needs.critic, needs.reward_model, needs.min_group) == (
        True, True, True, 1,
    )  # fmt: skip
    assert all(a.needs.min_group == 2 for a in (GRPO(), DAPO(), GSPO(), DrGRPO()))
    assert not GRPO().needs.critic
    assert GSPO.backends == ("trl",)
    assert all(a.backends == ("trl", "unsloth") for a in (PPO, GRPO, DAPO, DrGRPO))
