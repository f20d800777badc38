"""Of a multimodal model what text reaches is trained and adapted, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.loading import load_causal_lm
from actors.models.reward import new_reward_model
from actors.models.text_part import beside_text, lora_config
from actors.specs import LoRASpec, ModelSpec
from tests.actors.policy_cases import causal_lm, make_composite_folder, make_model_folder

BESIDE = ["model.vision_tower", "model.multi_modal_projector"]


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = make_model_folder(tmp_path_factory.mktemp("words"))
    return make_composite_folder(tmp_path_factory.mktemp("composite"), words)


def without_gradient(model: Any) -> set[str]:
    """The weights that a text gives no gradient, though all might be trained."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(input_ids=torch.tensor([[5, 9, 11, 30, 7, 8]])).logits.sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.slow
def test_what_text_gives_no_gradient_is_frozen(composite: Path) -> None:
    spec = ModelSpec(name=str(composite))
    for model in (load_causal_lm(spec), new_reward_model(spec, seed=0)):
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert beside_text(model) == BESIDE
        assert frozen == without_gradient(model) != set()


@pytest.mark.slow
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "fc1", "down_proj"]])
def test_no_adapter_lies_where_text_does_not_come(composite: Path, target_modules: Any) -> None:
    lora = LoRASpec(r=2, target_modules=target_modules)
    model: Any = load_causal_lm(ModelSpec(name=str(composite), lora=lora), lora=True)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapters
    assert not adapters & without_gradient(model)


def test_a_model_of_text_alone_is_trained_and_adapted_whole() -> None:
    model = causal_lm()
    assert beside_text(model) == []
    assert lora_config(model, LoRASpec(), "CAUSAL_LM").exclude_modules is None
