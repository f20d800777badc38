"""How many tokens a model can read, by its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig, Qwen2Config

from actors.models.loading import ModelError
from actors.models.positions import model_positions, positions_of
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
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_of_configurations(config: Any, positions: int | None) -> None:
    assert positions_of(config) == positions


def test_of_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    assert model_positions(ModelSpec(name=str(tiny_model))) == 64
    with pytest.raises(ModelError, match="no usable configuration"):
        model_positions(ModelSpec(name=str(tmp_path)))
