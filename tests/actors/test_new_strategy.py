"""A strategy of one's own: its settings, its class, and one entry in the table of strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from pydantic import Field

from actors.policy import PolicyActor
from actors.specs import ModelSpec
from actors.strategies.specs import STRATEGIES, StrategySpec
from actors.strategies.torch import TorchStrategy
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.online.work import work_of
from tests.actors.policy_cases import make_group, make_jobs, make_model_folder, simple_loss


class SlowSpec(StrategySpec):
    """One rank whose every step is a fraction of AdamW's."""

    implementation: ClassVar[str] = f"{__name__}:SlowStrategy"
    several: ClassVar[bool] = False

    name: Literal["slow"] = "slow"
    fraction: float = Field(0.5, gt=0, le=1, description="of a step")


class SlowStrategy(TorchStrategy):
    """See `Strategy`."""

    def step(self, learning_rate: float) -> float:
        """Clip, step less far, clear."""
        assert isinstance(self._spec.strategy, SlowSpec)
        return super().step(learning_rate * self._spec.strategy.fraction)


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setitem(STRATEGIES, "slow", SlowSpec)
    return {
        "algorithm": "grpo",
        "model": {"name": str(make_model_folder(tmp_path / "model"))},
        "data": {"path": "x.jsonl"},
        "rewards": ["length"],
        "output_dir": str(tmp_path / "run"),
        "policy": {"learning_rate": 1e-2},
    }


def test_a_strategy_is_configured_planned_and_run_by_its_entry_in_the_table(
    tree: dict[str, Any],
) -> None:
    moved = {}
    for fraction in (0.5, 1.0):
        config = load_config(tree, ["policy.strategy=slow", f"policy.strategy.fraction={fraction}"])
        assert isinstance(config, RunConfig)
        assert load_config(yaml.safe_load(dump(config))) == config
        assert work_of(config).policy.several is False
        actor = PolicyActor(ModelSpec(name=config.model.name), config.policy, 0, 1, 10, 0)
        actor.start("", 0)
        before = {n: p.detach().clone() for n, p in actor._strategy.model.named_parameters()}
        actor.update(*make_jobs([make_group(0, 4, [3, 9, 5])], simple_loss))
        after = dict(actor._strategy.model.named_parameters())
        moved[fraction] = sum(float((after[n].detach() - before[n]).abs().sum()) for n in before)
    assert moved[0.5] == pytest.approx(0.5 * moved[1.0], rel=1e-3)


def test_its_options_are_its_own(tree: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"fraction is an option of slow, and policy\.strategy is"):
        load_config(tree, ["policy.strategy={name: torch, fraction: 0.5}"])
    with pytest.raises(UserError, match=r"slow is one rank and policy\.ranks=2"):
        load_config(tree, ["policy.strategy=slow", "policy.ranks=2"])
