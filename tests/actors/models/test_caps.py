"""Gemma 2's cap on attention scores is computed by whatever loads the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.caps import attention_of, caps_scores
from actors.models.loading import load_causal_lm
from actors.models.reward import load_reward_model, new_reward_model
from actors.specs import ModelSpec
from aligntune.chat import Asking, Conversation
from aligntune.rewards.encoder import encoder
from tests.actors.policy_cases import VOCABULARY, causal_lm
from tests.e2e.page import byte_tokenizer

IDS = torch.arange(3, 20)[None] % VOCABULARY


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM and a reward model whose scores are far over their cap."""
    from transformers import Gemma2ForSequenceClassification

    folder = tmp_path_factory.mktemp("capped")
    causal = causal_lm("Gemma2", attn_logit_softcapping=0.5)
    for layer in causal.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(50)
    causal.save_pretrained(folder / "lm")
    causal.config.num_labels = 1
    scorer = Gemma2ForSequenceClassification(causal.config)
    scorer.model.load_state_dict(causal.model.state_dict())
    scorer.save_pretrained(folder / "rm")
    for name in ("lm", "rm"):
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def bodies(folder: Path) -> dict[str, Callable[[], Any]]:
    """What loads a model, by the body that it gives."""
    lm, rm = (ModelSpec(name=str(folder / name)) for name in ("lm", "rm"))
    return {
        "policy": lambda: load_causal_lm(lm).model,
        "reward": lambda: load_reward_model(rm).model,
        "job": lambda: new_reward_model(lm, seed=0).model,
        "encoder": lambda: encoder.__wrapped__(lm.name)._model,
        "chat": lambda: Conversation(folder / "lm", Asking(), 0.0, 5)._model.model,
    }


@pytest.mark.slow
@pytest.mark.parametrize("who", ["policy", "reward", "job", "encoder", "chat"])
def test_whoever_loads_a_model_computes_its_cap(capped: Path, who: str) -> None:
    from transformers import AutoModelForCausalLM

    def states(body: Any) -> torch.Tensor:
        with torch.no_grad():
            return body(input_ids=IDS).last_hidden_state

    whole, left_out = (
        states(AutoModelForCausalLM.from_pretrained(capped / "lm", attn_implementation=kind).model)
        for kind in ("eager", "sdpa")
    )
    assert float((whole - left_out).abs().max()) > 1e-2, "transformers' sdpa has no cap"
    torch.testing.assert_close(states(bodies(capped)[who]()), whole)


def test_only_sdpa_is_replaced_and_only_where_there_is_a_cap() -> None:
    from transformers import Gemma2Config, Gemma3Config, T5GemmaConfig, VaultGemmaConfig

    for kind in (Gemma2Config, VaultGemmaConfig, T5GemmaConfig):
        assert [attention_of(one, kind()) for one in ("sdpa", "eager", "flash_attention_2")] == [
            "eager",
            "eager",
            "flash_attention_2",
        ]
    for plain in (Gemma2Config(attn_logit_softcapping=None), Gemma3Config(), causal_lm().config):
        assert not caps_scores(plain)
        assert attention_of("sdpa", plain) == "sdpa"
