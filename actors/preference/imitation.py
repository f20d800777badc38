"""How improbable the policy finds what it is to imitate: the loss of SFT as a mean over the tokens
of a step, and DPO's part `sft`, of the better answers, as one over pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMITATION = "sft"


class ImitatesPairs:
    """Before DPOTrainer among the bases: the part is of each pair by itself, as all others are.

    TRL's own is a mean over the tokens of a forward pass, so a step's loss would depend on how its
    pairs are shared out over passes and workers.
    """

    loss_types: list[str]
    loss_weights: list[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parts = list(zip(self.loss_types, self.loss_weights, strict=True))
        self._imitation = sum(weight for name, weight in parts if name == IMITATION)
        others = [part for part in parts if part[0] != IMITATION]
        self.loss_types = [name for name, _ in others]
        self.loss_weights = [weight for _, weight in others]

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        loss, outputs = super()._compute_loss(model, inputs, True)  # type: ignore[misc]
        if self._imitation:
            loss = loss + self._imitation * imitation(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss


def imitation(logits: Any, inputs: Mapping[str, Any]) -> Any:
    """The mean over pairs of -log pi(y) / |y|, y the better answer of |y| tokens (2404.19733 has
    the term, with the prompt in the length).

    `logits` are [2B, T, V], and `input_ids` and `completion_mask` of `inputs` [2B, T]: of B better
    answers, and then of the others.
    """
    from torch.nn.functional import cross_entropy

    pairs = len(logits) // 2
    said = inputs["completion_mask"][:pairs, 1:].bool()
    each = cross_entropy(
        logits[:pairs, :-1][said], inputs["input_ids"][:pairs, 1:][said], reduction="none"
    )
    lengths = said.sum(1)
    return (each / lengths.repeat_interleave(lengths)).sum() / pairs


def taught_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """The loss of `labels` [B, T] by the logits [B, T, V] of `outputs`: a sum divided by
    `num_items_in_batch`, the trained tokens of a whole step on all workers; without it the mean
    over those that are here.

    The models' own have one denominator, or scale with the number of passes and workers, or pair
    a token with itself, by their class.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = outputs.logits
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)
