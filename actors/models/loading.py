"""Causal language models and their tokenizers, through transformers and PEFT.

A model comes back complete or not at all: a folder that is missing, holds something else than a
causal language model, or lacks weights is an error here, never a randomly initialised layer later.

torch and transformers are imported when a model is looked at, not with this module: what is wrong
with its name is told without them, and a process that loads its model through Unsloth has to import
that first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.models.auto import import_light
from actors.models.caps import attention_of
from actors.models.configuration import (
    ModelError,
    local,
    not_had,
    own_configuration,
    require_source,
)
from actors.models.templates import give
from actors.models.text_part import freeze_beside_text, lora_config
from actors.specs import LoRASpec, ModelSpec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLING_ONLY = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
"""Options of a generation config that it must not set unless it samples."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_causal_lm(spec: ModelSpec, lora: bool = False) -> PreTrainedModel:
    """The causal LM that `spec` names, on CPU, in `spec.dtype`, with its own dropout switched off.

    With `lora` the model is wrapped by PEFT as `spec.lora` says: base weights frozen, adapters in
    float32 and trainable. Dropout is off because a log-prob must not depend on when it is computed;
    LoRA's own dropout, which the user sets, stays.

    Raises:
        ModelError: the folder or hub name is missing, is no causal LM, or lacks weights.
    """
    spec = local(spec)
    config = _config(spec)
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            spec.name,
            config=config,
            revision=spec.revision,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=attention_of(spec.attention, config),
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ImportError, ValueError) as error:
        raise _not_loaded(spec, error) from error
    _require_all(info, spec, config)
    switch_off_dropout(model)
    make_savable(model)
    freeze_beside_text(model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        if spec.lora is None:
            raise ModelError(f"model {spec.name!r}: LoRA was asked for without model.lora settings")
        model = _wrap_lora(model, spec.lora)
    return model


def check_adapters(spec: ModelSpec) -> None:
    """Whether `model.lora.target_modules`, where it lists names, can be what gets adapters; looks
    at the model without weights.

    Raises:
        ModelError: nothing has such a name, or it is a weight that the model uses twice.
    """
    if spec.lora is not None and spec.lora.target_modules != "all-linear":
        import torch

        with torch.device("meta"):
            load_skeleton(spec)


def load_skeleton(spec: ModelSpec) -> PreTrainedModel:
    """The model with the adapters of `spec.lora`, as `load_causal_lm` gives it, without weights of
    its own: call it under `torch.device("meta")`. Raises ModelError."""
    spec = local(spec)
    if spec.lora is None:
        raise ModelError(f"model {spec.name!r}: LoRA was asked for without model.lora settings")
    config = _config(spec)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    return _wrap_lora(model, spec.lora)


def load_tokenizer(spec: ModelSpec, writes: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of `spec`; padding falls back to the end-of-sequence token, which masks cover.
    Its chat template gets `spec.chat_template_kwargs`, unchecked, and `spec.chat_template_day`.

    Raises:
        ModelError: there is no tokenizer, or it has no end-of-sequence token and the model `writes`
            completions, which only that ends.
    """
    spec = local(spec)
    require_source(spec.name)
    import_light()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ImportError, ValueError) as error:
        raise not_had(
            spec.name, f"the tokenizer of model {spec.name!r} could not be loaded: {error}"
        ) from error
    if tokenizer.eos_token_id is None and writes:
        raise ModelError(
            f"the tokenizer of model {spec.name!r} has no end-of-sequence token, so a completion "
            "could never end; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    give(tokenizer, spec.chat_template_kwargs, spec.chat_template_day)
    return tokenizer


def check_place(spec: ModelSpec) -> None:
    """Whether there is a model where `spec` says; a folder is not read, and nothing is imported.

    Raises:
        ModelError: there is none, or no hub answers.
    """
    require_source(local(spec).name)


def check_causal_lm(spec: ModelSpec) -> None:
    """Look at the configuration alone, without weights: is this a causal LM that can be loaded?

    Raises:
        ModelError: as `load_causal_lm`, but for what only the weights can show.
    """
    _config(spec)


def whole_model(model: Any, spec: ModelSpec) -> Any:
    """What to save whole weights with: `model` itself, or where it is kept in 4 bits, and would be
    saved as such, the model that `spec` names."""
    if not getattr(model, "is_quantized", False):
        return model
    return load_causal_lm(spec.model_copy(update={"lora": None}))


def name_dtype(folder: Path, dtype: str) -> None:
    """Let the config.json of a saved model say what its weights are in; transformers writes what
    those of the model were that it saved them with."""
    config = folder / "config.json"
    tree = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**tree, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def check_complete(spec: ModelSpec) -> None:
    """Compare the names of the model's weights with those that are there, and read none of them.

    Raises:
        ModelError: as `load_causal_lm`.
    """
    spec = local(spec)
    config = _config(spec)
    from transformers import AutoModelForCausalLM

    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            spec.name,
            config=config,
            revision=spec.revision,
            device_map="meta",
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise _not_loaded(spec, error) from error
    _require_all(info, spec, config)


def _not_loaded(spec: ModelSpec, error: Exception) -> ModelError:
    """What to raise where transformers does not load a model, with the cure by our key."""
    if 'attn_implementation="eager"' in str(error):
        return ModelError(
            f"model {spec.name!r} cannot compute with model.attention={spec.attention}; set "
            "model.attention=eager"
        )
    return ModelError(f"model {spec.name!r} could not be loaded: {error}")


def _require_all(loading_info: Any, spec: ModelSpec, config: Any) -> None:
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {spec.name!r} lacks {len(missing)} weights of a causal LM, {missing[0]!r} the "
            f"first; it was saved as {_architecture(config)}. Give a complete causal LM"
        )


def _config(spec: ModelSpec) -> Any:
    spec = local(spec)
    config = own_configuration(spec)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    saved_as = _architecture(config)
    remote = spec.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    wrong_head = "For" in saved_as and not saved_as.endswith(("ForCausalLM", "LMHeadModel"))
    if (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote) or (
        wrong_head and saved_as not in _causal_class_names(config)
    ):
        parts = sorted(_causal_class_names(config))
        if parts and config.get_text_config() is not config:
            raise ModelError(
                f"model {spec.name!r} is a multimodal checkpoint ({saved_as}), of which only the "
                f"language model can be trained: give a checkpoint of that part alone, whose "
                f"config.json names {parts[0]}"
            )
        raise ModelError(
            f"model {spec.name!r} is not a causal language model: it is {saved_as}. "
            "Give one whose config.json names a ...ForCausalLM architecture"
        )
    return config


def _causal_class_names(config: Any) -> set[str]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return set()
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return {c.__name__ for c in (found if isinstance(found, tuple | list) else (found,))}


def _architecture(config: Any) -> str:
    architectures = getattr(config, "architectures", None)
    return architectures[0] if architectures else type(config).__name__


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability in `model` to 0."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def make_savable(model: Any) -> None:
    """Let `model.save_pretrained` write its generation config: transformers loads one that
    contradicts itself, as a temperature without `do_sample`, and refuses to save it.

    What is read only by sampling goes where nothing samples. Where that is not enough, all goes but
    the special tokens.
    """
    found = getattr(model, "generation_config", None)
    if found is None:  # remote code that does not generate
        return
    if found.do_sample is not True:
        for name in SAMPLING_ONLY:
            setattr(found, name, None)
    try:
        found.validate(strict=True)
    except ValueError:
        tokens = {name: getattr(found, name) for name in SPECIAL_TOKENS}
        if isinstance(tokens["pad_token_id"], int) and tokens["pad_token_id"] < 0:
            del tokens["pad_token_id"]
        model.generation_config = type(found)(**tokens)


def shared_embeddings(model: Any) -> dict[str, nn.Module]:
    """The input and the output embeddings of `model` by name, where the two share one weight."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if None in ends or ends[0].weight is not ends[1].weight:
        return {}
    return {name: part for name, part in model.named_modules() if any(part is end for end in ends)}


def refuse_adapters_of(shared: dict[str, nn.Module], model: nn.Module) -> None:
    """Raise ModelError where `model` has adapters now in place of what was `shared`.

    An adapter changes one of the two uses of the weight, and a file, or an engine, has one weight.
    """
    adapted = [name for name, part in shared.items() if model.get_submodule(name) is not part]
    if adapted:
        raise ModelError(
            f"LoRA could not be added: model.lora.target_modules has {' and '.join(adapted)}, but "
            "input and output embeddings of this model are one weight, and what is exported or "
            "sampled from would be another model than the trained one; leave it out (all-linear "
            "does), or give a model whose config.json has tie_word_embeddings: false"
        )


def _wrap_lora(model: PreTrainedModel, lora: LoRASpec) -> PreTrainedModel:
    from peft import get_peft_model

    shared = shared_embeddings(model)
    try:
        settings = lora_config(model, lora, "CAUSAL_LM")
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(f"LoRA could not be added: {error}") from error
    refuse_adapters_of(shared, model)
    return wrapped
