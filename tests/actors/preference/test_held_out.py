"""Held-out figures of pairs over several workers, in which the last batches are filled up."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from actors.preference.held_out import ROW_LENGTHS, HeldOutPairs, HeldOutTokens, first_pairs


class Workers:
    """What they wait for each other with."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class Accelerator:
    """One worker's, of which all gather together."""

    def __init__(self, index: int, workers: Workers) -> None:
        self.process_index = index
        self.device = "cpu"
        self.gradient_state = SimpleNamespace(end_of_dataloader=False, remainder=-1)
        self._workers = workers

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """The rows of all workers."""
        self._workers.rows[self.process_index] = torch.atleast_1d(row)
        self._workers.barrier.wait()
        every = torch.cat(self._workers.rows)
        self._workers.barrier.wait()
        return every

    gather_for_metrics = gather


class Base:
    """A trainer that keeps figures as TRL's do."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.model = SimpleNamespace(training=False)
        self.accelerator = accelerator
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.logged: dict[str, float] = {}

    def compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        figures = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = inputs["input_ids"].double().chunk(2)
        margins = self.accelerator.gather(inputs["margin"])
        assert (chosen == rejected).all()
        assert torch.equal(margins, 10 * chosen)
        figures["accuracy"].append(self.accelerator.gather_for_metrics(margins.mean()).item())
        figures["min_reward"].append(chosen.min().item())
        figures["max_reward"].append(chosen.max().item())
        said = inputs["completion_mask"][:, 1:]
        values = inputs["input_ids"].double()[:, None] * said
        sides = zip(values.chunk(2), said.chunk(2), ("chosen", "rejected"), strict=True)
        for value, own, side in sides:
            figures[f"logits/{side}"].append((value.sum() / own.sum()).item())
        figures["entropy"].append((values.sum() / said.sum()).item())
        figures["num_tokens"] = [7]
        return chosen.mean()

    def log(self, logs: dict[str, float]) -> None:
        figures = self._metrics["train" if self.model.training else "eval"]
        self.logged = {**logs, **{name: fmean(values) for name, values in figures.items()}}
        figures.clear()


class Trainer(HeldOutPairs, Base):
    """Both."""

    def see(self, values: Sequence[float]) -> None:
        """A batch of pairs, both sides of each of one value, and `tokens` of either."""
        side = torch.tensor(values)
        both = [tokens(value, side) for side in (0, 1) for value in values]
        said = torch.arange(9) <= torch.tensor(both)[:, None]  # with the prompt's last token
        inputs = {
            "input_ids": torch.cat([side, side]),
            "margin": 10 * side.double(),
            "completion_mask": said.long(),
        }
        self.compute_loss(None, inputs)


def tokens(value: float, side: int) -> int:
    """Of the chosen (0) or the rejected (1) answer of a pair of this value."""
    return 1 + int(value) % (3 + 2 * side)


def evaluated(values: Sequence[float], workers: int, batch: int) -> list[dict[str, float]]:
    """What each worker logs of an evaluation on pairs of these values, shared out by accelerate."""
    together = Workers(workers)

    def work(index: int) -> dict[str, float]:
        trainer = Trainer(Accelerator(index, together))
        every = BatchSampler(range(len(values)), batch, drop_last=False)
        own = every if workers == 1 else BatchSamplerShard(every, workers, index)
        batches = list(own)
        state = trainer.accelerator.gradient_state
        state.remainder = len(values) % (batch * workers)
        for number, rows in enumerate(batches, start=1):
            state.end_of_dataloader = number == len(batches)
            trainer.see([values[row] for row in rows])
        trainer.log({"eval_loss": 123.0})
        return trainer.logged

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(workers)))


@pytest.mark.slow
@given(
    values=st.lists(st.integers(-50, 50), min_size=1, max_size=23),
    workers=st.integers(1, 3),
    batch=st.integers(1, 5),
)
@settings(max_examples=60)
def test_each_pair_and_each_token_counts_once_however_they_are_shared_out(
    values: list[int], workers: int, batch: int
) -> None:
    for logged in evaluated(values, workers, batch):
        assert logged["eval_loss"] == pytest.approx(fmean(values), abs=1e-5)
        assert logged["accuracy"] == pytest.approx(10 * fmean(values), abs=1e-4)
        assert (logged["min_reward"], logged["max_reward"]) == (min(values), max(values))
        assert logged["num_tokens"] == 7
        sides = [[(value, tokens(value, side)) for value in values] for side in (0, 1)]
        for name, of in (
            ("logits/chosen", sides[0]),
            ("logits/rejected", sides[1]),
            ("entropy", sides[0] + sides[1]),
        ):
            wanted = sum(value * count for value, count in of) / sum(count for _, count in of)
            assert logged[name] == pytest.approx(wanted, abs=1e-5)


def test_figures_of_training_stay_as_they_are_and_the_next_evaluation_starts_anew() -> None:
    trainer = Trainer(Accelerator(0, Workers(1)))
    trainer.see([1.0, 1.0])
    trainer.log({})
    trainer.model.training = True
    trainer.see([1.0, 1.0])
    trainer.see([0.0])
    trainer.log({"loss": 2.0})
    assert (trainer.logged["loss"], trainer.logged["accuracy"]) == (2.0, 5.0)
    trainer.model.training = False
    trainer.see([0.25])
    trainer.log({})
    assert trainer.logged["accuracy"] == 2.5


class Bare:
    """A trainer that computes nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.model = SimpleNamespace(training=True)
        self.accelerator = accelerator

    def compute_loss(self, *args: Any, **options: Any) -> torch.Tensor:
        return torch.zeros(())

    def log(self, logs: dict[str, float]) -> None: ...


@pytest.mark.parametrize(
    ("kind", "batch", "rows"),
    [
        (HeldOutPairs, {"input_ids": torch.zeros(6, 5)}, 3),
        (HeldOutTokens, {"input_ids": torch.zeros(3, 5)}, 3),
        (
            HeldOutTokens,
            {
                "input_ids": torch.zeros(1, 9),
                "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2]]),
                ROW_LENGTHS: torch.tensor([5, 4]),
            },
            4,
        ),
    ],
    ids=["pairs", "padded", "packed"],
)
def test_a_step_has_the_rows_that_all_workers_trained_on_in_it(
    kind: type, batch: dict[str, torch.Tensor], rows: int
) -> None:
    together = Workers(2)
    made: Any = type("Counting", (kind, Bare), {})

    def work(index: int) -> list[dict[str, float]]:
        trainer = made(Accelerator(index, together))
        logged: list[dict[str, float]] = []
        for passes in (2, 1):
            for _ in range(passes):
                trainer.compute_loss(None, dict(batch))
            logged.append({"loss": 1.0})
            trainer.log(logged[-1])
        logged.append({"train_runtime": 1.0})
        trainer.log(logged[-1])
        return logged

    with ThreadPoolExecutor(2) as pool:
        for first, second, last in pool.map(work, range(2)):
            assert (first["rows"], second["rows"]) == (4 * rows, 2 * rows)
            assert "rows" not in last


def test_of_a_batch_the_first_pairs_are_both_their_sides() -> None:
    inputs = {
        "input_ids": torch.tensor([[1], [2], [3], [11], [12], [13]]),
        "ref_chosen_logps": torch.tensor([1.0, 2.0, 3.0]),
        "return_loss": True,
    }
    cut = first_pairs(inputs, 2)
    assert cut["input_ids"].tolist() == [[1], [2], [11], [12]]
    assert cut["ref_chosen_logps"].tolist() == [1.0, 2.0]
    assert cut["return_loss"] is True
    assert first_pairs(inputs, 3) is inputs
    assert first_pairs(inputs, 0) is inputs


def test_a_figure_over_no_token_at_all_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.tokens", lambda value, side: 1 - side)
    (logged,) = evaluated([1, 2, 3], 1, 2)
    assert "logits/rejected" not in logged
    assert logged["logits/chosen"] == pytest.approx(2)
    assert logged["eval_loss"] == pytest.approx(2)
