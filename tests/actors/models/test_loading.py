"""What is said of a model that cannot be loaded as it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.models.configuration import ModelError
from actors.models.loading import check_causal_lm, check_complete, load_causal_lm
from actors.specs import ModelSpec
from tests.actors.policy_cases import causal_lm


def test_a_multimodal_checkpoint_is_called_one_and_its_language_model_is_named(
    tmp_path: Path,
) -> None:
    tree = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError) as refused:
        check_causal_lm(ModelSpec(name=str(tmp_path)))
    assert str(refused.value) == (
        f"model '{tmp_path}' is a multimodal checkpoint (Qwen3_5ForConditionalGeneration), of "
        "which only the language model can be trained: give a checkpoint of that part alone, whose "
        "config.json names Qwen3_5ForCausalLM"
    )


def test_an_encoder_and_decoder_is_no_causal_language_model(tmp_path: Path) -> None:
    tree = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="is not a causal language model: it is BartForCond"):
        check_causal_lm(ModelSpec(name=str(tmp_path)))


def test_attention_that_a_model_lacks_is_told_by_the_key_that_changes_it(tmp_path: Path) -> None:
    causal_lm("GptOss", num_local_experts=2, num_experts_per_tok=1).save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path))
    with pytest.raises(ModelError) as refused:
        load_causal_lm(spec)
    assert str(refused.value) == (
        f"model '{tmp_path}' cannot compute with model.attention=sdpa; set model.attention=eager"
    )
    load_causal_lm(spec.model_copy(update={"attention": "eager"}))


def test_weights_of_other_sizes_are_told_in_one_line(tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="could not be loaded") as refused:
        check_complete(ModelSpec(name=str(tmp_path)))
    assert "\n" not in str(refused.value)
