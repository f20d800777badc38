"""Whether a model keeps the rows of a packed sequence apart."""

from __future__ import annotations

from typing import Any

from actors.models.attention import on_its_device
from actors.models.configuration import ModelError

SAME = 1e-2  # of the largest logit: far above what a kernel's order of adding does


def check_apart(trainer: Any) -> None:
    """Raise ModelError where what stands in one row changes the logits of the next.

    Attention keeps packed rows apart by their positions; layers that carry a state along the
    sequence, as linear attention does, may not.
    """
    import torch

    model = trainer.model
    device = next(model.parameters()).device  # a CPU still where DeepSpeed is to place it
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(4, device=device).repeat(2)[None]
    other = ids.clone()
    other[:, :4] = ids[:, 4:]
    training = model.training
    model.eval()
    with torch.no_grad(), on_its_device(model), trainer.compute_loss_context_manager():
        one, two = (
            model(input_ids=row, position_ids=positions, use_cache=False).logits[0, 4:].float()
            for row in (ids, other)
        )
    model.train(training)
    if (one - two).abs().max() > SAME * one.abs().max():
        raise ModelError(
            "algorithm.packing: this model does not keep the rows of a packed sequence apart; set "
            "packing: false, or model.attention=flash_attention_2 where it knows that"
        )
