"""Norms that are torch's own in all but the name are made torch's; no other is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.models.fused import fuse_norms
from tests.actors.policy_cases import VOCABULARY, causal_lm


@pytest.mark.parametrize(("family", "norms"), [("Qwen3", 9), ("Llama", 5), ("Gemma2", 0)])
def test_fused_norms_give_the_logits_and_gradients_of_the_models_own(
    family: str, norms: int
) -> None:
    def results(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(3, 23)[None] % VOCABULARY
        logits = model(input_ids=ids).logits
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        return logits.detach(), torch.cat([gradient.flatten() for gradient in found])

    model = causal_lm(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
    wanted = results(model)
    assert fuse_norms(model) == norms
    for got, reference in zip(results(model), wanted, strict=True):
        assert float((got - reference).norm() / reference.norm()) < 1e-5


def test_a_norm_in_another_dtype_than_its_input_stays_as_it_is() -> None:
    model = causal_lm("Llama").to(torch.bfloat16)
    norm = model.model.norm
    hidden = torch.randn(3, 32)
    wanted = norm(hidden)
    fuse_norms(model)
    assert torch.equal(norm(hidden), wanted)
