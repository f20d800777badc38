"""Held-out figures of pairs over several workers, in which the last batch is filled up."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from actors.preference.held_out import HeldOutPairs


class Base:
    """A trainer on two workers that keeps figures as TRL's do."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(training=False)
        self.accelerator = SimpleNamespace(
            num_processes=2,
            gradient_state=SimpleNamespace(end_of_dataloader=False, remainder=3),
        )
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.logged: dict[str, float] = {}

    def compute_loss(self, model: Any, inputs: Any) -> None:
        mode = "train" if self.model.training else "eval"
        for name in ("accuracy", "min_reward", "max_reward"):
            self._metrics[mode][name].append(inputs["figure"])
        self._metrics[mode]["num_tokens"] = [7]

    def log(self, logs: dict[str, float]) -> None:
        mode = "train" if self.model.training else "eval"
        means = {name: sum(each) / len(each) for name, each in self._metrics[mode].items()}
        self.logged = {**logs, **means}
        self._metrics[mode].clear()


class Trainer(HeldOutPairs, Base):
    """Both."""

    def see(self, figure: float, pairs: int, last: bool = False) -> None:
        self.accelerator.gradient_state.end_of_dataloader = last
        self.compute_loss(None, {"input_ids": [[0]] * 2 * pairs, "figure": figure})


@pytest.mark.parametrize("left", [3, 0])
def test_the_last_batch_counts_as_many_pairs_as_are_left_and_no_copies(left: int) -> None:
    trainer = Trainer()
    trainer.accelerator.gradient_state.remainder = left
    trainer.see(1.0, 4)
    trainer.see(0.0, 4, last=True)
    trainer.log({})
    assert trainer.logged["accuracy"] == pytest.approx(8 / (8 + (left or 8)))
    assert (trainer.logged["min_reward"], trainer.logged["max_reward"]) == (0.0, 1.0)
    assert trainer.logged["num_tokens"] == 7


def test_figures_of_training_stay_as_they_are_and_the_next_evaluation_starts_anew() -> None:
    trainer = Trainer()
    trainer.see(1.0, 4)
    trainer.log({})
    trainer.model.training = True
    trainer.see(1.0, 4)
    trainer.see(0.0, 1)
    trainer.log({"loss": 2.0})
    assert (trainer.logged["loss"], trainer.logged["accuracy"]) == (2.0, 0.5)
    trainer.model.training = False
    trainer.see(0.25, 4)
    trainer.log({})
    assert trainer.logged["accuracy"] == 0.25
