"""Weights by the names of a checkpoint are what `save_pretrained` writes, for every way in which
transformers names and cuts them otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.models.checkpoint_names import checkpoint_weights
from tests.actors.policy_cases import causal_lm

pytestmark = pytest.mark.slow

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "as they are": ("Qwen3", {}),
    "other names": ("GPTNeoX", {"tie_word_embeddings": False}),
    "experts apart": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 16}),
    "both": ("Mixtral", EXPERTS),
    "experts apart, and buffers": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "new"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_what_is_saved(family: str, loaded: bool, tmp_path: Path) -> None:
    name, options = FAMILIES[family]
    model = causal_lm(name, **options)
    model.save_pretrained(tmp_path)
    if loaded:
        model = type(model).from_pretrained(tmp_path)
    offered = list(checkpoint_weights(model, model.named_parameters()))
    found, saved = dict(offered), load_file(tmp_path / "model.safetensors")
    assert len(offered) == len(found)
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(found[key], tensor), key


def test_of_a_mixture_no_more_is_held_than_one_weight() -> None:
    model = causal_lm("Mixtral", **EXPERTS)
    taken: list[str] = []

    def weights() -> Any:
        for name, parameter in model.named_parameters():
            taken.append(name)
            yield name, parameter

    for given, _ in enumerate(checkpoint_weights(model, weights()), start=1):
        assert len(taken) <= given, "it takes no weight before it has given the last one"
