"""Causal language models through Unsloth, for the processes that train them.

Unsloth patches transformers, TRL and PEFT as it is imported, so `import_unsloth` comes before these
in a process, and no other process imports it. What Unsloth would do instead of what it was asked
(weights in 16 bits where it has no 4, a cut of what is longer than it was told) is refused here.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from actors.specs import ModelSpec

PATCHED = ("transformers", "peft", "trl")


def import_unsloth() -> Any:
    """The `unsloth` package, patches applied.

    Raises:
        ModelError: it is not installed, cannot run here, or what it patches was imported before it.
    """
    from actors.models.configuration import ModelError

    early = [name for name in PATCHED if name in sys.modules]
    if "unsloth" not in sys.modules and early:
        raise ModelError(
            f"{early[0]} was imported before Unsloth in this process, so Unsloth's patches would "
            "not hold; let nothing that a worker imports (a runtime environment's setup hook, say) "
            "import it"
        )
    # Unsloth probes vLLM by loading every compiled extension of it, also those for processors that
    # this one is not, and an illegal instruction ends the process. A trainer needs no vLLM.
    if "vllm" not in sys.modules:
        sys.modules["vllm"] = None  # type: ignore[assignment]  # import machinery: not there
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # else a model without labels gives none
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # a download that counts its users
    try:
        import unsloth
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"backend unsloth cannot be used on this node ({error}); install unsloth and "
            "unsloth_zoo there as scripts/install.sh does, or use backend: trl"
        ) from error
    return unsloth


def load_unsloth(spec: ModelSpec, max_length: int, seed: int) -> Any:
    """The causal LM that `spec` names through Unsloth's FastLanguageModel, to be trained: with LoRA
    where `spec` has settings for it, else whole. The model's own dropout is off, LoRA's stays.

    `max_length` is the longest sequence in tokens; Unsloth cuts what is longer without a word.

    Raises:
        ModelError: no such model, one that lacks weights or that Unsloth does not know, or 4 bits
            where there is no accelerator.
    """
    unsloth = import_unsloth()
    import torch

    from actors.models.configuration import ModelError, local
    from actors.models.loading import (
        check_complete,
        make_savable,
        refuse_adapters_of,
        shared_embeddings,
        switch_off_dropout,
    )
    from actors.models.text_part import freeze_beside_text

    if spec.load_in_4bit and not torch.cuda.is_available():
        raise ModelError(
            "model.load_in_4bit needs a GPU and this worker has none; give its role GPUs "
            "(policy.resources.gpus, train.resources.gpus), or remove model.load_in_4bit"
        )
    spec = local(spec)
    check_complete(spec)
    # Unsloth takes "-bnb-4bit" off the end of a name, of a folder's too, which is then not found.
    name = os.path.join(spec.name, "") if os.path.isdir(spec.name) else spec.name
    try:
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            name,
            revision=spec.revision,
            max_seq_length=max_length,
            dtype=getattr(torch, spec.dtype),
            load_in_4bit=spec.load_in_4bit,
            full_finetuning=spec.lora is None,
            use_gradient_checkpointing=spec.gradient_checkpointing,
            trust_remote_code=spec.trust_remote_code,
        )
        if spec.load_in_4bit and not getattr(model, "is_loaded_in_4bit", False):
            raise ModelError(
                f"Unsloth loaded model {spec.name!r} without 4 bits, which bitsandbytes does not "
                "do here; remove model.load_in_4bit"
            )
        switch_off_dropout(model)
        make_savable(model)
        if spec.lora is None:
            freeze_beside_text(model)
            return model
        shared = shared_embeddings(model)
        wrapped = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=spec.lora.r,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=spec.lora.target_modules,
            use_gradient_checkpointing=spec.gradient_checkpointing,
            random_state=seed,
        )
        refuse_adapters_of(shared, model)
        return wrapped
    except ModelError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"Unsloth cannot load model {spec.name!r}: {reason}") from error


def versions() -> str:
    """What runs, for people: `unsloth 2026.10.9`."""
    from importlib.metadata import version

    return f"unsloth {version('unsloth')}"
