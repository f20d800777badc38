"""Held-out figures: means over all pairs, or all tokens that they are of, however rows are batched
and shared out. The rows that a step trains on are counted here too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

ROW_LENGTHS = "row_lengths"
IGNORED = -100
"""The label of a token that is not trained."""


class HeldOut:
    """Before a trainer among the bases: each pair or token that is held out counts once, and alike.

    TRL's figures are means over batches of all workers, where what is left alone for the last
    batch counts as much as a full one, and so does what several workers repeat to fill it. Here
    each worker keeps the figures of its own rows, without what it repeats, and all of them are
    weighed together at the end.

    The figures of a step have `rows` besides: those that all workers trained on in it, repeats too.
    """

    model: Any
    accelerator: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # This worker's own of each batch of this evaluation, by what they are.
        self._counts: list[Mapping[str, int]] = []
        self._losses: list[float] = []  # of each batch
        self._trained = 0  # rows that this worker trained on since the last step's figures
        super().__init__(*args, **kwargs)

    def _rows(self, inputs: Mapping[str, Any]) -> int:
        """How many rows of the data a batch has."""
        raise NotImplementedError

    def _own_part(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        """How many of a batch are this worker's own, by what they are, and the batch with the
        figures of these."""
        raise NotImplementedError

    def _weighed_by(self, figure: str) -> str:
        """What a figure of a batch is a mean over, as `_own_part` names it."""
        raise NotImplementedError

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self._trained += self._rows(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        counts, own = self._own_part(inputs)
        with _alone(self.accelerator):
            found = super().compute_loss(model, own, *args, **kwargs)  # type: ignore[misc]
        self._counts.append(counts)
        self._losses.append(float(found[0] if isinstance(found, tuple) else found))
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not self.model.training and self._counts:
            figures = self._metrics["eval"]
            named = {name: values for name, values in figures.items() if name != "num_tokens"}
            means = self._of_all({"loss": self._losses, **named})
            if "eval_loss" in logs:
                logs["eval_loss"] = means["loss"]
            for name in named:
                if name in means:
                    figures[name][:] = [means[name]]
                else:
                    del figures[name]
            self._counts.clear()
            self._losses.clear()
        if "loss" in logs:  # of a step; every worker is here
            logs["rows"] = self._trained_by_all()
            self._trained = 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _own(self, batch: int) -> int:
        """How many rows of a batch are this worker's own: the first ones; then come repeats."""
        loader = self.accelerator.gradient_state
        left = loader.remainder if loader.end_of_dataloader else 0  # of all; 0: the last is full
        if left <= 0:
            return batch
        return max(0, min(batch, left - self.accelerator.process_index * batch))

    def _trained_by_all(self) -> float:
        import torch

        mine = torch.tensor([self._trained], dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.gather(mine).sum())

    def _of_all(self, figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Each figure over what all workers have counted, but for those that are over nothing."""
        import torch

        counts = {
            name: [batch[self._weighed_by(name)] for batch in self._counts] for name in figures
        }
        parts = [_part(name, values, counts[name]) for name, values in figures.items()]
        mine = [*parts, *map(sum, counts.values())]
        row = torch.tensor([mine], dtype=torch.float64, device=self.accelerator.device)
        columns = self.accelerator.gather(row).T.tolist()  # [2 * figures][workers]
        return {
            name: _extreme(name, parts) if name in _EXTREMES else sum(parts) / sum(weights)
            for name, parts, weights in zip(
                figures, columns[: len(figures)], columns[len(figures) :], strict=True
            )
            if name in _EXTREMES or sum(weights)
        }


_OF_TOKENS = {
    "entropy": "tokens",
    "mean_token_accuracy": "chosen tokens",
    "logits/chosen": "chosen tokens",
    "logits/rejected": "rejected tokens",
}
"""The figures of DPO that TRL takes over the tokens of a batch."""


class HeldOutPairs(HeldOut):
    """A figure is a mean over pairs, or over the tokens of their answers."""

    def _rows(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["input_ids"]) // 2

    def _own_part(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        own = self._own(self._rows(inputs))
        part = first_pairs(inputs, own)
        counts = {"pairs": own}
        if "completion_mask" in part:
            said = part["completion_mask"][:, 1:].sum(1) * (own > 0)
            chosen, rejected = (int(side.sum()) for side in said.chunk(2))
            counts |= {"chosen tokens": chosen, "rejected tokens": rejected}
            counts["tokens"] = chosen + rejected
        return counts, part

    def _weighed_by(self, figure: str) -> str:
        return _OF_TOKENS.get(figure, "pairs")


class HeldOutTokens(HeldOut):
    """A figure is a mean over trained tokens. Rows that lie end to end come with `ROW_LENGTHS`."""

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        self._lengths = inputs.pop(ROW_LENGTHS, None)
        if not self.model.training:
            num_items_in_batch = None  # a mean over the tokens that are here, and no other workers'
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _rows(self, inputs: Mapping[str, Any]) -> int:
        if self._lengths is None:
            return len(inputs["input_ids"])
        return int((inputs["position_ids"] == 0).sum())  # where a row of a sequence begins

    def _own_part(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        labels = inputs["labels"].clone()
        if self._lengths is None:
            labels[self._own(len(labels)) :] = IGNORED
        else:
            own = self._own(len(self._lengths))
            labels[:, int(self._lengths[:own].sum()) :] = IGNORED
        return {"tokens": int((labels[:, 1:] != IGNORED).sum())}, {**inputs, "labels": labels}

    def _weighed_by(self, figure: str) -> str:
        return "tokens"


def with_row_lengths(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """`collate` that lays rows end to end, with their lengths [rows] in tokens as `ROW_LENGTHS`."""
    import torch

    def collated(rows: Any) -> dict[str, Any]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**collate(rows), ROW_LENGTHS: lengths}

    return collated


_EXTREMES = {"min_reward": min, "max_reward": max}


def _extreme(name: str, values: Sequence[float]) -> float:
    return _EXTREMES[name](values)


def _part(name: str, values: Sequence[float], counts: Sequence[int]) -> float:
    """What one worker adds to a figure: a sum over its own, or the least or greatest value."""
    counted = [(value, count) for value, count in zip(values, counts, strict=True) if count]
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
