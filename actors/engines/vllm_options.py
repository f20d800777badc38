"""Options of vLLM's engine: which of them are aligntune's own, and limits of a batch by default."""

from __future__ import annotations

import difflib
from typing import Any

from actors.engines.specs import VLLMSpec
from actors.specs import RolloutSpec

PLANNED_TOKENS = 8192  # of one pass, for which a plan counts workspace (`cluster.plan.memory`)
PLANNED_SEQUENCES = 1024  # that are sampled at once, in the same way

# What this engine's promises rest on; setting them would break one of them.
_OURS = {
    "model": "model.name",
    "revision": "model.revision",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "max_model_len": "rollout.max_prompt_length and rollout.max_completion_length",
    "tensor_parallel_size": "rollout.engine.tensor_parallel_size",
    "gpu_memory_utilization": "rollout.engine.gpu_memory_utilization",
    "seed": "train.seed",
    "disable_log_stats": None,
    "logprobs_mode": None,
    "weight_transfer_config": None,
    "worker_extension_cls": None,
    "skip_tokenizer_init": None,
    "generation_config": None,
    "enable_lora": "rollout.weight_sync",
    "max_loras": None,
    "max_cpu_loras": None,
    "max_lora_rank": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
}

_DRAFTS = "lets another model draft tokens, and no update gives that one its weights"
_DRAWS = "changes what is drawn, and the policy's log-probs are those of the model alone"
_ANOTHER = "samples from another model than the one that is trained, which reads model.name"
_STALE = "keeps keys and values elsewhere, where those of earlier weights may stay"

# What would break one of these promises too, though nothing here sets it.
_REFUSED = {
    "speculative_config": _DRAFTS,
    "spec_method": _DRAFTS,
    "spec_model": _DRAFTS,
    "spec_tokens": _DRAFTS,
    "logits_processors": _DRAWS,
    "watermark_config": _DRAWS,
    "diffusion_config": _DRAWS,
    "override_generation_config": "would be ignored: how tokens are drawn is the run's own",
    "model_weights": _ANOTHER,
    "hf_config_path": _ANOTHER,
    "hf_overrides": _ANOTHER,
    "kv_transfer_config": _STALE,
    "kv_offloading_backend": _STALE,
}


def batch_limits(
    spec: RolloutSpec,
    sequences: int,
    most_sequences: int,
    most_tokens: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """`options` with what of `max_num_seqs` and `max_num_batched_tokens` they leave open.

    Every one of the `sequences` in flight takes part in a step of decoding, and a step of prefill
    takes all their prompts, or one whole sequence: vLLM's defaults of 128 and 2,048 are a server's.
    Both are bounded by what vLLM itself would take on this device (`most_...`), for it allocates
    by them; what is beyond waits its turn in vLLM. Where the cache is given, vLLM measures nothing,
    and what it allocates beside is bounded by what a plan counts.
    """
    if isinstance(spec.engine, VLLMSpec) and spec.engine.kv_cache_gib is not None:
        most_tokens = min(most_tokens, PLANNED_TOKENS)
        most_sequences = min(most_sequences, PLANNED_SEQUENCES)
    budget = options.get("max_num_batched_tokens", most_tokens)
    seqs = options.get("max_num_seqs", min(sequences, most_sequences, budget))
    longest = spec.max_length
    prompts = seqs * (longest - spec.max_completion_length)
    tokens = max(seqs, min(max(prompts, longest), most_tokens))
    return {"max_num_seqs": seqs, "max_num_batched_tokens": tokens} | options


def check_engine_options(options: dict[str, Any], known: set[str]) -> None:
    """Refuse what vLLM does not know, what aligntune sets itself, and what would make log-probs,
    weights or versions of rollouts untrue.

    Raises:
        ValueError: naming the option and the cure.
    """
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"rollout.engine.options: vLLM has no option {name!r}{hint}")
        if name in _OURS:
            cure = f"set {_OURS[name]} instead" if _OURS[name] else "remove it"
            raise ValueError(f"rollout.engine.options: {name!r} is set by aligntune; {cure}")
        if name in _REFUSED:
            raise ValueError(f"rollout.engine.options: {name!r} {_REFUSED[name]}; remove it")
