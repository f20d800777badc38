"""What a layer leaves for its backward pass, beside what autograd really keeps of it."""

from __future__ import annotations

import pytest
import torch

from cluster.plan.memory import layer_activations
from cluster.plan.shapes import from_config

TOKENS = 64
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "vocab_size": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_mixtures_layer_leaves_what_is_counted(frozen: bool) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    config = Qwen3MoeConfig(**SIZES, attn_implementation="sdpa")
    model = Qwen3MoeModel(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and ".experts." in name))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(1, TOKENS, config.hidden_size, requires_grad=True)
    places = torch.arange(TOKENS)[None]
    around = model.rotary_emb(hidden, places)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.layers[0](hidden, position_embeddings=around, position_ids=places)
    assert out.requires_grad
    shape = from_config(config.to_dict(), "tiny", "")
    counted = layer_activations(shape, 4, TOKENS, False, frozen)
    assert sum(kept.values()) / TOKENS == pytest.approx(counted, rel=0.15)
