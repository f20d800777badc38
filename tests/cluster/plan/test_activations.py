"""What a layer leaves for its backward pass, beside what autograd really keeps of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cluster.plan.memory import activations, layer_activations
from cluster.plan.shapes import ADAPTED_EXPERTS, from_config
from cluster.plan.work import Kept, Trained

TOKENS = 256
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


def kept_by(layer: Any, around: Any) -> int:
    """Bytes that autograd keeps of a pass of TOKENS tokens, weights left out, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(1, TOKENS, SIZES["hidden_size"], requires_grad=True)
    places = torch.arange(TOKENS)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(
            hidden, position_embeddings=around.rotary_emb(hidden, places), position_ids=places
        )
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all", "all but experts", "adapters"])
def test_a_mixtures_layer_leaves_what_is_counted(trained: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**SIZES, attn_implementation="sdpa", tie_word_embeddings=False)
    model: Any = Qwen3MoeForCausalLM(config)
    shape = from_config(config.to_dict(), "tiny", "")
    inner = model.model
    if trained == "all but experts":
        inner.layers[0].mlp.experts.requires_grad_(False)
    if trained == "adapters":
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        sizes = [p.numel() for p in wrapped.parameters() if p.requires_grad]
        assert sum(sizes) == shape.lora_parameters(4)
        work = Trained("policy", shape, 1, Kept(), 4, TOKENS, TOKENS, lora_rank=4)
        counted = activations(work) // 2  # of this layer, and of one more
    else:
        counted = TOKENS * layer_activations(shape, 4, TOKENS, False, trained != "all")
    assert kept_by(inner.layers[0], inner) == pytest.approx(counted, rel=0.15)


@pytest.mark.slow
def test_types_whose_experts_get_adapters_are_those_of_peft() -> None:
    from peft.utils import transformers_weight_conversion as of_peft

    bases = of_peft._MOE_TARGET_MODULE_MAPPING
    types = {key for key, base in of_peft._MODEL_TO_CONVERSION_PATTERN.items() if base in bases}
    assert types == ADAPTED_EXPERTS
