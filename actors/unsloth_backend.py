"""Causal language models through Unsloth, for the processes that train them.

Unsloth patches transformers, TRL and PEFT as it is imported, so `import_unsloth` comes before these
in a process, and no other process imports it.
"""

from __future__ import annotations

import sys
from typing import Any

from actors.specs import ModelSpec

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What `target_modules: all-linear` means to Unsloth, which takes names."""


def import_unsloth() -> Any:
    """The `unsloth` package, patches applied.

    Raises:
        ModelError: it is not installed or cannot run here.
    """
    # Unsloth probes vLLM by loading every compiled extension of it, also those for processors that
    # this one is not, and an illegal instruction ends the process. A trainer needs no vLLM.
    if "vllm" not in sys.modules:
        sys.modules["vllm"] = None  # type: ignore[assignment]  # import machinery: not there
    try:
        import unsloth
    except (ImportError, NotImplementedError, RuntimeError) as error:
        from actors.loading import ModelError

        raise ModelError(
            f"backend unsloth cannot be used on this node ({error}); install unsloth and "
            "unsloth_zoo there as scripts/install.sh does, or use backend: trl"
        ) from error
    return unsloth


def load_unsloth(spec: ModelSpec, max_length: int, seed: int) -> Any:
    """The causal LM that `spec` names through Unsloth's FastLanguageModel, to be trained: with LoRA
    where `spec` has settings for it, else whole.

    Raises:
        ModelError: no such model, or one that Unsloth does not know.
    """
    unsloth = import_unsloth()
    import torch

    from actors.loading import ModelError, check_causal_lm

    check_causal_lm(spec)
    try:
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            spec.name,
            revision=spec.revision,
            max_seq_length=max_length,
            dtype=getattr(torch, spec.dtype),
            load_in_4bit=False,
            full_finetuning=spec.lora is None,
            trust_remote_code=spec.trust_remote_code,
        )
        if spec.lora is None:
            return model
        targets = spec.lora.target_modules
        return unsloth.FastLanguageModel.get_peft_model(
            model,
            r=spec.lora.r,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=PROJECTIONS if targets == "all-linear" else targets,
            use_gradient_checkpointing=spec.gradient_checkpointing,
            random_state=seed,
        )
    except (OSError, ImportError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"Unsloth cannot load model {spec.name!r}: {error}") from error
