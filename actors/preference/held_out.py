"""Held-out figures of pairs: means over all pairs, however they are batched."""

from __future__ import annotations

from typing import Any


class HeldOutPairs:
    """Before a trainer among the bases: every held-out pair counts alike in a figure.

    TRL's figures are means over batches, where a pair that is left alone for the last one counts as
    much as a full batch. What several workers repeat to fill their last batch is in its means, and
    not in its weight.
    """

    model: Any
    accelerator: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._held_out: list[int] = []  # pairs of each batch of this evaluation, on all workers
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            loader = self.accelerator.gradient_state
            left = loader.remainder if loader.end_of_dataloader else 0  # 0: the last one is full
            full = len(inputs["input_ids"]) // 2 * self.accelerator.num_processes
            self._held_out.append(left if left > 0 else full)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, *args: Any, **kwargs: Any) -> None:
        if not self.model.training:
            for name, values in self._metrics["eval"].items():
                if name != "num_tokens":  # a count, which TRL keeps once
                    values[:] = [_of_all(name, values, self._held_out)]
            self._held_out.clear()
        super().log(*args, **kwargs)  # type: ignore[misc]


def _of_all(name: str, values: list[float], pairs: list[int]) -> float:
    """A figure of all batches; `pairs` are in each."""
    if name in ("min_reward", "max_reward"):
        return min(values) if name == "min_reward" else max(values)
    weighted = [value * count for value, count in zip(values, pairs, strict=True)]
    return sum(weighted) / sum(pairs)
