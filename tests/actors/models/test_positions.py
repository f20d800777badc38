"""How many tokens a model can read, by its configuration alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    Phi3Config,
    Qwen2Config,
    RobertaConfig,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from actors.models.configuration import ModelError
from actors.models.positions import (
    BEHIND_PADDING,
    Bound,
    bound_of,
    model_bound,
    model_positions,
    positions_in_table,
    positions_of,
)
from actors.specs import ModelSpec

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1000,
}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (Qwen2Config(max_position_embeddings=1000), 1000),
        (GPT2Config(n_positions=77), 77),
        (BloomConfig(), None),  # ALiBi
        (Qwen2Config(max_position_embeddings=1000, rope_parameters=YARN), 4000),
        (Qwen2Config(max_position_embeddings=4000, rope_parameters=YARN), 4000),
        (LlamaConfig(max_position_embeddings=8000, rope_parameters=LLAMA3), 8000),
        (
            LlamaConfig(
                max_position_embeddings=1000,
                rope_parameters={"rope_type": "linear", "factor": 2.0},
            ),
            2000,
        ),
        (Gemma3Config(text_config={"max_position_embeddings": 500}), 500),
        (RobertaConfig(max_position_embeddings=514), 512),  # its padding is 1
        (RobertaConfig(max_position_embeddings=514, pad_token_id=0), 513),
        (MPNetConfig(max_position_embeddings=514, pad_token_id=0), 512),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_of_configurations(config: Any, positions: int | None) -> None:
    assert positions_of(config) == positions


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "of_vllm", "of_transformers", "by"),
    [
        (Qwen2Config(max_position_embeddings=1000), 1000, 1000, "max_position_embeddings"),
        (BloomConfig(), None, None, ""),
        (
            Phi3Config(
                max_position_embeddings=8192,
                original_max_position_embeddings=1024,
                rope_parameters=dict(LONG),
            ),
            1024,
            1024,
            "original_max_position_embeddings of LongRoPE, .* the rows beside",
        ),
        (
            LlamaConfig(max_position_embeddings=1000, rope_parameters=dict(DYNAMIC)),
            1000,
            1000,
            "max_position_embeddings of dynamic scaling, .* the rows beside",
        ),
        (
            Qwen2Config(max_position_embeddings=1000, rope_parameters=dict(YARN)),
            1000,
            4000,
            r"to be 4000 in its config\.json",
        ),
        (
            Qwen2Config(max_position_embeddings=4000, rope_parameters=dict(YARN)),
            4000,
            4000,
            "max_position_embeddings$",
        ),
    ],
    ids=["plain", "alibi", "longrope", "dynamic", "yarn", "yarn-written"],
)
def test_as_far_as_a_row_has_the_same_log_probs_whatever_is_beside_it_and_whoever_computes_them(
    config: Any, of_vllm: int | None, of_transformers: int | None, by: str
) -> None:
    found = bound_of(config, vllm=True)
    assert (found and found.tokens) == of_vllm
    assert found is None or re.search(by, found.by)
    elsewhere = bound_of(config, vllm=False)
    assert (elsewhere and elsewhere.tokens) == of_transformers


@pytest.mark.parametrize(
    "kind", sorted({"albert", "bert", "deberta-v2", "distilbert", "gpt2", "opt", *BEHIND_PADDING})
)
def test_the_configuration_says_what_the_table_holds(kind: str) -> None:
    config = AutoConfig.for_model(
        kind, num_hidden_layers=1, vocab_size=100, max_position_embeddings=64, pad_token_id=3
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    read = positions_of(config)
    assert read == {"mpnet": 62}.get(kind, 60 if kind in BEHIND_PADDING else 64)
    assert positions_in_table(model) == read


def test_a_model_that_computes_its_positions_has_no_table() -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            Qwen2Config(num_hidden_layers=1, vocab_size=100)
        )
    assert positions_in_table(model) is None


def test_every_classifier_of_transformers_whose_positions_begin_behind_padding_is_known() -> None:
    models = Path(transformers.__file__).parent / "models"
    found = {
        kind
        for kind in CLASSIFIERS
        for source in (models / model_type_to_module_name(kind)).glob("modeling_*.py")
        if "create_position_ids_from_input_ids(" in source.read_text()
    }
    assert found == BEHIND_PADDING


def test_of_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    assert model_positions(ModelSpec(name=str(tiny_model))) == 64
    assert model_bound(ModelSpec(name=str(tiny_model)), vllm=True) == Bound(64)
    with pytest.raises(ModelError, match="no usable configuration"):
        model_positions(ModelSpec(name=str(tmp_path)))
