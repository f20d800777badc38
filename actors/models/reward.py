"""Sequence classifiers with one label: looked at, loaded, and made of a causal LM to be trained.

torch and transformers are imported when one is, as in `loading`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.models.caps import attention_of
from actors.models.configuration import ModelError, local, own_configuration
from actors.models.loading import switch_off_dropout
from actors.models.text_part import freeze_beside_text
from actors.specs import ModelSpec

if TYPE_CHECKING:
    import torch


def check_reward_model(spec: ModelSpec, label: str | None = None) -> None:
    """Look at the configuration alone: is this a reward model that can be loaded?

    Raises:
        ModelError: no such model, a causal LM, no such label, or several where none is named.
    """
    _reward_config(spec, label)


def load_reward_model(spec: ModelSpec, label: str | None = None) -> Any:
    """The complete sequence classifier that `spec` names, in evaluation mode, on CPU.

    Raises:
        ModelError: as `check_reward_model`, or a model without the weights of its scoring head.
    """
    model, missing = _load(spec, _reward_config(spec, label))
    if missing:
        raise ModelError(
            f"reward model {spec.name!r} lacks {len(missing)} weights, {missing[0]!r} the first: "
            "its scores would be random. Give a trained one (algorithm: reward_model trains one)"
        )
    return model.eval()


def new_reward_model(spec: ModelSpec, seed: int) -> Any:
    """A sequence classifier with one label to be trained: a causal LM or another model with a fresh
    head drawn by `seed`, or a reward model as it is. Dropout is off.

    Raises:
        ModelError: no such model, or more than the head is missing.
    """
    config = own_configuration(spec)
    import torch

    if not _is_classifier(config):
        config.num_labels = 1
    elif config.num_labels != 1:
        raise ModelError(_labels_message(spec, config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing = _load(spec, config)
    body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if body:
        raise ModelError(
            f"model {spec.name!r} lacks {len(body)} weights beside the scoring head, {body[0]!r} "
            "the first; give a complete model"
        )
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    switch_off_dropout(model)
    freeze_beside_text(model)
    return model


def _load(spec: ModelSpec, config: Any) -> tuple[Any, list[str]]:
    """The classifier and the names of the weights its folder does not have."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from actors.models.float_head import give_float_heads

    spec = local(spec)
    attention = attention_of(spec.attention, config)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            spec.name,
            config=config,
            revision=spec.revision,
            dtype=getattr(torch, spec.dtype),
            # sdpa is transformers' own choice wherever an architecture has it; DeBERTa has not
            attn_implementation=None if attention == "sdpa" else attention,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ImportError, ValueError) as error:
        raise ModelError(f"reward model {spec.name!r} could not be loaded: {error}") from error
    give_float_heads(model)
    return model, sorted(info["missing_keys"])


def _is_classifier(config: Any) -> bool:
    return any(
        name.endswith(("ForSequenceClassification", "RewardModel"))
        for name in config.architectures or ()
    )


def score_of(logits: torch.Tensor, config: Any, label: str | None, output: str) -> torch.Tensor:
    """The score [B] of `label` in a classifier's `logits` [B, L]; of the only label for None.

    A probability is that of the label among all, or by itself where the model was trained so
    (`problem_type` multi_label_classification) or has one label.
    """
    index = 0 if label is None else _indices(config)[label]
    if output == "logit":
        return logits[:, index]
    alone = logits.shape[1] == 1 or config.problem_type == "multi_label_classification"
    return (logits.sigmoid() if alone else logits.softmax(1))[:, index]


def _reward_config(spec: ModelSpec, label: str | None) -> Any:
    config = own_configuration(spec)
    saved_as = (config.architectures or [type(config).__name__])[0]
    if saved_as.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"reward model {spec.name!r} is a causal language model ({saved_as}), which has no "
            "scoring head; train a reward model from it with algorithm: reward_model, or give a "
            "sequence classification model with one label"
        )
    if label is not None and label not in _indices(config):
        raise ModelError(f"model {spec.name!r} has no label {label!r}; it has {_labels(config)}")
    if label is None and config.num_labels != 1:
        raise ModelError(
            f"{_labels_message(spec, config)}, or name one of them by 'label': {_labels(config)}"
        )
    return config


def _indices(config: Any) -> dict[str, int]:
    return {str(name): int(index) for index, name in config.id2label.items()}


def _labels(config: Any) -> str:
    names = list(map(repr, _indices(config)))
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _labels_message(spec: ModelSpec, config: Any) -> str:
    return (
        f"reward model {spec.name!r} has {config.num_labels} labels; a reward model gives one "
        "number, so give a sequence classification model with num_labels 1"
    )
