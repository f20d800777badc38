"""Which parts of a multimodal model text never reaches, as a tower for images and its projector.

Nothing here trains by anything else than text, which gives them no gradient. So they are frozen: as
trained weights they would end DDP's second step and every checkpoint of FSDP, shrink by DeepSpeed's
weight decay, and have moments in memory for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.specs import LoRASpec

if TYPE_CHECKING:
    from peft import LoraConfig

    from actors.models.wrapped import TrainedModel

OF_BEFORE = (
    "was written by a version that trained parts of this model which text never reaches, such as "
    "its vision tower; finish the run with that version, or begin a new one"
)


def beside_text(model: Any) -> list[str]:
    """The modules of a transformers model that text never reaches, by their names in it: what its
    body has beside its language model and the embeddings. A model of text alone has none."""
    config, body = model.config, model.base_model
    if config.get_text_config() is config or config.is_encoder_decoder:
        return []
    decoder = body.get_decoder()
    if decoder is body:
        return []
    kept = (decoder, model.get_input_embeddings())
    prefix = next(name for name, part in model.named_modules() if part is body)
    return [
        f"{prefix}.{name}" if prefix else name
        for name, part in body.named_children()
        if not any(each is one for each in part.modules() for one in kept)
    ]


def freeze_beside_text(model: Any) -> None:
    """Train nothing of `model` that text never reaches."""
    for name in beside_text(model):
        model.get_submodule(name).requires_grad_(False)


def named_beside_text(model: TrainedModel, names: Iterable[str]) -> set[str]:
    """Those of `names`, which a checkpoint gives to weights of `model`, that text never reaches."""
    inner = model.unwrapped
    if not (parts := beside_text(inner)):
        return set()
    prefix = next(name for name, part in model.named_modules() if part is inner)
    below = tuple(f"{prefix}.{part}." for part in parts)
    return {name for name in names if name.startswith(below)}


def check_text_part(model: TrainedModel, names: Iterable[str], folder: Path) -> None:
    """Whether DeepSpeed's checkpoint in `folder`, which names weights `names`, can be this model's.

    It names trained weights and buffers, and an old one of LoRA frozen weights too.

    Raises:
        ValueError: it was written when weights that text never reaches were trained.
    """
    beside = named_beside_text(model, names)
    if model.unwrapped is model.model:
        trained = beside & {name for name, _ in model.named_parameters(remove_duplicate=False)}
    else:
        trained = beside - model.state_dict().keys()
    if trained:
        raise ValueError(f"{folder} {OF_BEFORE}")


def lora_config(model: Any, lora: LoRASpec, task: str, **more: Any) -> LoraConfig:
    """PEFT's settings of `lora` for `model`, whose adapters never lie where text does not come;
    `task` is one of PEFT's TaskType."""
    from peft import LoraConfig

    names = "|".join(map(re.escape, beside_text(model)))
    return LoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=rf"({names})(\..*)?" if names else None,
        **more,
    )
