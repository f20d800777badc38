"""Held-out figures of pairs: means over all pairs, however they are batched and shared out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class HeldOutPairs:
    """Before a trainer among the bases: every held-out pair counts once, and alike, in a figure.

    TRL's figures are means over batches of all workers, where a pair that is left alone for the
    last batch counts as much as a full one, and so does what several workers repeat to fill it.
    Here each worker keeps the figures of its own pairs, without what it repeats, and all of them
    are weighed together at the end.
    """

    model: Any
    accelerator: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pairs: list[int] = []  # this worker's own of each batch of this evaluation
        self._losses: list[float] = []  # of each batch
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        own = self._own(len(inputs["input_ids"]) // 2)
        with _alone(self.accelerator):
            found = super().compute_loss(  # type: ignore[misc]
                model, first_pairs(inputs, own), *args, **kwargs
            )
        self._pairs.append(own)
        self._losses.append(float(found[0] if isinstance(found, tuple) else found))
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not self.model.training and self._pairs:
            figures = self._metrics["eval"]
            named = {name: values for name, values in figures.items() if name != "num_tokens"}
            means = self._of_all({"loss": self._losses, **named})
            if "eval_loss" in logs:
                logs["eval_loss"] = means["loss"]
            for name, values in named.items():
                values[:] = [means[name]]
            self._pairs.clear()
            self._losses.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _own(self, batch: int) -> int:
        """How many pairs of a batch are this worker's own: the first ones; then come repeats."""
        loader = self.accelerator.gradient_state
        left = loader.remainder if loader.end_of_dataloader else 0  # of all; 0: the last is full
        if left <= 0:
            return batch
        return max(0, min(batch, left - self.accelerator.process_index * batch))

    def _of_all(self, figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Each figure over the pairs of all workers."""
        import torch

        mine = [sum(self._pairs), *(_part(n, v, self._pairs) for n, v in figures.items())]
        row = torch.tensor([mine], dtype=torch.float64, device=self.accelerator.device)
        pairs, *columns = self.accelerator.gather(row).T.tolist()  # [1 + figures][workers]
        return {
            name: _extreme(name, parts) if name in _EXTREMES else sum(parts) / sum(pairs)
            for name, parts in zip(figures, columns, strict=True)
        }


_EXTREMES = {"min_reward": min, "max_reward": max}


def _extreme(name: str, values: Sequence[float]) -> float:
    return _EXTREMES[name](values)


def _part(name: str, values: Sequence[float], pairs: Sequence[int]) -> float:
    """What one worker adds to a figure: a sum over its pairs, or the least or greatest value."""
    counted = [(value, count) for value, count in zip(values, pairs, strict=True) if count]
    if name in _EXTREMES:
        none = math.inf if name == "min_reward" else -math.inf
        return _extreme(name, [value for value, _ in counted] or [none])
    return sum(value * count for value, count in counted)


def first_pairs(inputs: Mapping[str, Any], pairs: int) -> Mapping[str, Any]:
    """A batch of the first `pairs` pairs of `inputs`, whose tensors have a row for each pair, or
    the rows [2B] of the chosen and then of the rejected sides. Of no pairs it is the whole batch:
    a worker without pairs of its own takes part with repeats, which count nothing."""
    import torch

    batch = len(inputs["input_ids"]) // 2
    if pairs in (0, batch):
        return inputs

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if len(value) == 2 * batch:
            return torch.cat([value[:pairs], value[batch : batch + pairs]])
        return value[:pairs]

    return {name: cut(value) for name, value in inputs.items()}


@contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """Figures are of this worker's own tensors meanwhile: workers have differently many."""
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, lambda tensor: tensor)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)  # its class has them
