"""What a model's configuration decides: whole weights in place of quantised ones, or one line that
says why not, and eager attention where SDPA would leave a cap out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.models.packed import quantised_by
from actors.specs import ModelSpec
from aligntune import create_rl_trainer
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.online.trainer import OnlineTrainer
from aligntune.preference.trainer import PreferenceTrainer
from aligntune.tracking.metrics import EventKind

PACKED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def pack(folder: Path, how: dict[str, Any]) -> None:
    """Let a model's configuration say that its weights are packed."""
    config = folder / "config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps({**tree, "quantization_config": how}))


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model, a packed one beside it under each ending, and pairs."""
    monkeypatch.chdir(tmp_path)
    for name, how in {
        "me/m": None,
        "me/m-bnb-4bit": PACKED,
        "me/m-unsloth-bnb-4bit": {"load_in_4bit": True},  # as an older bitsandbytes says it
        "me/alone-bnb-4bit": PACKED,
        "me/both": PACKED,
        "me/both-bnb-4bit": PACKED,
    }.items():
        folder = Path(shutil.copytree(tiny_model, tmp_path / name))
        if how is not None:
            pack(folder, how)
    rows = [{"prompt": f"{i}+1", "chosen": str(i + 1), "rejected": "7"} for i in range(10, 32)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def made(algorithm: str, model: str, **given: Any) -> OnlineTrainer | PreferenceTrainer:
    rewards = {"reward_model_name": "scorer"} if algorithm == "ppo" else {}
    return create_rl_trainer(
        model_name=model, dataset_name="pairs.jsonl", algorithm=algorithm, output_dir="run",
        **rewards, **given,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize("ending", ["-bnb-4bit", "-unsloth-bnb-4bit", "-bnb-4bit/"])
def test_whole_weights_take_the_place_of_packed_ones_and_it_is_said(
    place: Path, algorithm: str, ending: str
) -> None:
    packed = f"me/m{ending}"
    trainer = made(algorithm, packed, overrides=["model.revision=v1"])
    trainer.check()
    assert (trainer.config.model.name, trainer.config.model.revision) == ("me/m", None)
    first, second = (fields for kind, fields in trainer.inputs.events()[:2])
    assert (first["path"], first["value"]) == ("model.name", "me/m")
    assert (second["path"], second["value"]) == ("model.revision", None)
    assert trainer.inputs.events()[0][0] is EventKind.SETTLED
    said = f"settled: model.name=me/m: the weights of {packed} are packed by bitsandbytes"
    assert trainer.inputs.told()[0].startswith(said)

    run = place / "run"  # the same command goes on with the run that it began
    run.mkdir()
    (run / "config.yaml").write_text(dump(trainer.config))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert made(algorithm, packed).check().changed == {}


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_what_is_scored_before_the_first_step_has_whole_weights_too(
    place: Path, algorithm: str
) -> None:
    scored = made(algorithm, "me/m-bnb-4bit").scored()
    assert (scored.model, scored.origin) == ("me/m", "start")
    assert "packed by bitsandbytes" in scored.why
    assert made(algorithm, "me/m").scored().why == ""


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("me/alone-bnb-4bit", "and 'me/alone' cannot be had (there is no folder 'me/alone')"),
        ("me/both-bnb-4bit", "and those of 'me/both' are packed too; name the model with whole"),
        ("me/both", "nor loaded by vLLM; name the model with whole weights (model.load_in_4bit"),
    ],
)
def test_packed_weights_without_whole_ones_are_refused_in_one_line(
    place: Path, algorithm: str, name: str, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        made(algorithm, name).check()
    assert str(refused.value).startswith(f"model.name: the weights of '{name}' are packed")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_a_job_that_keeps_the_model_in_4_bits_begins_with_whole_weights_too(
    place: Path, algorithm: str
) -> None:
    settings = ["model.load_in_4bit=true", "model.lora={}", "train.resources.gpus=1"]
    trainer = made(algorithm, "me/m-bnb-4bit", backend="unsloth", overrides=settings)
    (decided,) = trainer.inputs.settle_model()
    assert (decided.path, decided.value) == ("model.name", "me/m")
    assert (trainer.config.model.name, trainer.config.model.load_in_4bit) == ("me/m", True)
    alone = made(algorithm, "me/alone-bnb-4bit", backend="unsloth", overrides=settings)
    with pytest.raises(UserError, match="'me/alone' cannot be had"):
        alone.inputs.settle_model()


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_a_model_that_caps_its_attention_s_scores_is_computed_without_sdpa_and_it_is_said(
    place: Path, algorithm: str
) -> None:
    config = place / "me/m/config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps({**tree, "attn_logit_softcapping": 50.0}))
    trainer = made(algorithm, "me/m")
    (decided,) = trainer.inputs.settle_model()
    assert (decided.path, decided.value) == ("model.attention", "eager")
    assert "attn_logit_softcapping" in decided.why
    assert trainer.config.model.attention == "eager"
    assert trainer.scored().why == "", "it is the model that the config names"
    flash = made(algorithm, "me/m", overrides=["model.attention=flash_attention_2"])
    assert flash.inputs.settle_model() == ()
    own = ["policy.resources.gpus=1"] if algorithm == "grpo" else ["train.resources.gpus=1"]
    unsloth = made(algorithm, "me/m", backend="unsloth", overrides=own)
    assert unsloth.inputs.settle_model() == ()


QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "unknown": {"bits": 4},
}


def said(key: str, model: str, how: str) -> str:
    return (
        f"{key}: the weights of '{model}' are quantised ({how}), and training needs whole ones; "
        "name a model that has them"
    )


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_weights_are_not_trained_and_may_be_evaluated_by_an_engine(
    place: Path, algorithm: str, how: str
) -> None:
    pack(place / "me/m", QUANTISED[how])
    trainer = made(algorithm, "me/m")
    if algorithm == "grpo":
        assert trainer.scored().model == "me/m"
    with pytest.raises(UserError) as refused:
        trainer.check()
    assert str(refused.value) == said("model.name", "me/m", how)


def test_the_language_model_of_a_composite_may_be_what_is_quantised(place: Path) -> None:
    tree = {"model_type": "gemma3", "text_config": {"quantization_config": QUANTISED["fp8"]}}
    (place / "me/m/config.json").write_text(json.dumps(tree))
    assert quantised_by(ModelSpec(name="me/m")) == "fp8"


def test_a_run_of_before_that_has_the_packed_name_is_the_same_run(place: Path) -> None:
    trainer = made("dpo", "me/m")
    run = place / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(trainer.config).replace("me/m", "me/m-bnb-4bit"))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "model.name" in made("dpo", "me/m-bnb-4bit").check().changed


@pytest.mark.parametrize("role", ["critic", "reference"])
@pytest.mark.parametrize(
    ("model", "how", "cure"),
    [
        ("me/m-bnb-4bit", "bitsandbytes", ", as 'me/m' may have them"),
        ("me/both", "fp8", ""),
    ],
)
def test_a_critic_and_a_reference_need_whole_weights(
    place: Path, role: str, model: str, how: str, cure: str
) -> None:
    if how in QUANTISED:
        pack(place / model, QUANTISED[how])
    trainer = made("ppo", "me/m", overrides=[f"{role}.model={model}"])
    with pytest.raises(UserError) as refused:
        trainer.inputs.check_weights()
    assert str(refused.value) == said(f"{role}.model", model, how) + cure
    assert trainer.scored().model == "me/m"  # an evaluation reads neither
    made("ppo", "me/m", overrides=[f"{role}.model=./me/m"]).inputs.check_weights()
