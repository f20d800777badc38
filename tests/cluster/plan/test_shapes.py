"""Shapes of models: parameters from a table, a config or a folder's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cluster.plan.memory import parameters_of
from cluster.plan.shapes import (
    BadModelConfig,
    from_config,
    from_folder,
    from_table,
)
from cluster.plan.work import Frozen
from cluster.tables import DATA, UnknownName

TABLE = json.loads((DATA / "models.json").read_text())["models"]


@pytest.mark.parametrize("name", sorted(TABLE))
def test_what_a_config_gives_is_what_the_published_weights_have(name: str) -> None:
    published = TABLE[TABLE[name].get("same_as", name)]["parameters"]
    assert from_table(name).parameters == pytest.approx(published, rel=1e-3)


def test_the_table_goes_from_half_a_billion_to_deepseek() -> None:
    assert from_table("Qwen/Qwen2.5-0.5B-Instruct").parameters == 494_032_768
    large = from_table("deepseek-ai/DeepSeek-V3-0324")
    assert large.parameters == pytest.approx(671e9, rel=1e-3)
    assert large.active == pytest.approx(37e9, rel=0.02)
    assert large.kv_elements == 61 * (512 + 64)
    for ending in ("", "-bnb-4bit", "-unsloth-bnb-4bit"):  # of packed weights, which none trains
        named = from_table(f"unsloth/Llama-3.2-1B-Instruct{ending}")
        assert named.parameters == from_table("meta-llama/Llama-3.2-1B").parameters


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'Qwen/Qwen2.5-7B'"):
        from_table("Qwen/Qwen2.5-8B")


def test_a_local_model_is_counted_over_its_own_files(tiny_model: Path) -> None:
    from aligntune.quickstart.task import make_model

    shape = from_folder(tiny_model, "tiny")
    assert shape.parameters == sum(p.numel() for p in make_model(0).parameters())
    config = json.loads((tiny_model / "config.json").read_text())
    assert from_config(config, "tiny", "").parameters == shape.parameters


def test_weights_that_nobody_loads_are_not_counted(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    count = from_folder(tiny_model, "tiny").parameters
    assert from_folder(folder, "tiny").parameters == count

    parts = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, key in enumerate(parts)}
    for file in set(names.values()):
        save_file({key: parts[key] for key in parts if names[key] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert from_folder(folder, "tiny").parameters == count
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BadModelConfig, match=f"{file}.*cannot be read"):
        from_folder(folder, "tiny")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("saved_as", ["SequenceClassification", "CausalLM"])
def test_a_critic_or_reward_model_is_counted_with_one_output_whatever_its_folder_has(
    tmp_path: Path, saved_as: str, tied: bool, named: bool
) -> None:
    import transformers
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    sizes = {"vocab_size": 80, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(**sizes, **heads, tie_word_embeddings=tied, num_labels=1)
    getattr(transformers, f"Qwen3For{saved_as}")(config).save_pretrained(tmp_path)
    written = tmp_path / "config.json"
    tree = json.loads(written.read_text()) | {"tie_word_embeddings": tied}
    if not named:  # as configs of Gemma, whose default it is
        tree.pop("tie_word_embeddings")
    written.write_text(json.dumps(tree))
    shape = from_folder(tmp_path, "m")
    count = sum(weight.numel() for weight in Qwen3ForSequenceClassification(config).parameters())
    assert parameters_of(Frozen("reward", shape, 1, 4, 8)) == count
    assert shape.active == from_config({**tree, "tie_word_embeddings": True}, "m", "").active


def test_packed_weights_are_not_taken_for_parameters(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.weight": np.zeros((40, 1), np.uint8)}, tmp_path / "model.safetensors")
    count = from_folder(tiny_model, "tiny").parameters
    assert from_folder(tmp_path, "tiny").parameters == count


def test_a_config_without_sizes_says_what_it_lacks() -> None:
    with pytest.raises(BadModelConfig, match="no hidden_size"):
        from_config({"model_type": "t5"}, "t5", "")
