"""How many tokens a model can read, by its configuration alone."""

from __future__ import annotations

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
    Qwen2Config,
    RobertaConfig,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from actors.models.loading import ModelError
from actors.models.positions import (
    BEHIND_PADDING,
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
    with pytest.raises(ModelError, match="no usable configuration"):
        model_positions(ModelSpec(name=str(tmp_path)))
