"""A policy through Unsloth has the plain one's log-probs, updates and exports; what cannot be is
refused. Unsloth patches the process it is in, so what needs it runs in one of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.models.configuration import ModelError
from actors.policy import PolicyActor
from actors.specs import LoRASpec, ModelSpec
from tests.actors.policy_cases import (
    causal_lm,
    forks,
    logprobs_of,
    make_group,
    make_jobs,
    make_model_folder,
    policy_spec,
    simple_loss,
    weights,
)

pytestmark = pytest.mark.slow

WAIT_S = 240.0  # imports, on a machine that may be busy
GROUPS = [make_group(0, 4, [3, 9, 5]), make_group(1, 6, [2, 2, 11, 7], holes=True)]
LORA = {"lora": LoRASpec(r=4, alpha=8.0)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "lora": (LORA, {}),
    "packed": (LORA, {"packing": True}),
    "checkpointed": ({"gradient_checkpointing": True}, {}),
}


class Process:
    """A process of its own that functions of this module are called in."""

    def __init__(self, context: BaseContext) -> None:
        self._pool = ProcessPoolExecutor(1, context)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.submit(function, *args).result(WAIT_S)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(scope="module")
def unsloth() -> Iterator[Process]:
    """A process in which Unsloth is imported first."""
    process = Process(multiprocessing.get_context("spawn"))
    yield process
    process.close()


@pytest.fixture
def process() -> Iterator[Process]:
    """A new process, which has imported transformers."""
    process = Process(forks())
    yield process
    process.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("policy"))
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 2}')
    return folder


def make_actor(backend: str, model: ModelSpec, settings: dict[str, Any]) -> PolicyActor:
    from actors.unsloth_policy import UnslothPolicyActor

    arguments = (model, policy_spec(**settings), 0, 1, 100, 0)
    if backend == "unsloth":
        return UnslothPolicyActor(*arguments, 64)
    return PolicyActor(*arguments)


def life(backend: str, model: ModelSpec, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Everything a policy rank says of a model in two updates."""
    actor = make_actor(backend, model, settings)
    said: dict[str, Any] = {"info": actor.start("", 0)}
    said["logprobs"] = [logprobs_of(actor, GROUPS, 0.9)]
    for step in (1, 2):
        (job,) = make_jobs(GROUPS, simple_loss, minibatches=2, step=step)
        actor.update(job)
        said["logprobs"].append(logprobs_of(actor, GROUPS, 0.9))
    said["weights"] = {name: array.numpy() for name, array in weights(actor).items()}
    actor.save_model(out)
    return said


def start_only(model: ModelSpec) -> str:
    """What starting a policy through Unsloth ends with."""
    try:
        return str(make_actor("unsloth", model, {}).start("", 0)["backend"])
    except ModelError as error:
        return str(error)


@pytest.mark.parametrize(
    "case",
    [
        "full",
        "lora",
        *(pytest.param(c, marks=pytest.mark.long) for c in ("packed", "checkpointed")),
    ],
)
def test_log_probs_updates_and_exports_are_those_of_the_plain_path(
    unsloth: Process, folder: Path, tmp_path: Path, case: str
) -> None:
    options, settings = CASES[case]
    model = ModelSpec(name=str(folder), **options)
    plain = life("trl", model, settings, tmp_path / "plain")
    ours = unsloth.call(life, "unsloth", model, settings, tmp_path / "unsloth")

    assert plain["info"]["backend"].startswith("transformers ")
    assert ours["info"]["backend"].startswith("unsloth ")
    for key in ("parameters", "trainable"):
        assert ours["info"][key] == plain["info"][key]
    for got, wanted in zip(ours["logprobs"], plain["logprobs"], strict=True):
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)
    first, *_, last = plain["logprobs"]
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(first, last, strict=True))

    assert list(ours["weights"]) == list(plain["weights"])
    for name, array in plain["weights"].items():
        assert ours["weights"][name].dtype == array.dtype
        np.testing.assert_allclose(ours["weights"][name], array, atol=1e-4, rtol=0, err_msg=name)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("plain", "unsloth")
    }
    assert saved["unsloth"].keys() == saved["plain"].keys()
    for name, tensor in saved["plain"].items():
        torch.testing.assert_close(saved["unsloth"][name], tensor, atol=1e-4, rtol=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "unsloth")) > 0
    assert (tmp_path / "unsloth" / "adapter").is_dir() == ("lora" in options)


def test_the_model_s_own_dropout_is_off(unsloth: Process, folder: Path, tmp_path: Path) -> None:
    """Or the check at the start would see other log-probs in training mode."""
    noisy = make_model_folder(tmp_path / "noisy")
    causal_lm(attention_dropout=0.5).save_pretrained(noisy)
    assert unsloth.call(start_only, ModelSpec(name=str(noisy))).startswith("unsloth ")


def test_adapters_on_embeddings_that_are_the_head_too_are_refused(
    unsloth: Process, folder: Path
) -> None:
    for name in ("lm_head", "embed_tokens"):
        lora = LoRASpec(target_modules=["q_proj", name])
        said = unsloth.call(start_only, ModelSpec(name=str(folder), lora=lora))
        assert "embeddings of this model are one weight" in said


def test_four_bits_without_a_gpu_are_refused(unsloth: Process, folder: Path) -> None:
    model = ModelSpec(name=str(folder), load_in_4bit=True, **LORA)
    said = unsloth.call(start_only, model)
    assert "model.load_in_4bit needs a GPU" in said
    assert len(said.splitlines()) == 1


def test_a_model_without_all_its_weights_is_refused(
    unsloth: Process, folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_model_folder(tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights" in unsloth.call(start_only, ModelSpec(name=str(broken)))


def test_a_model_of_another_kind_is_refused(unsloth: Process, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    said = unsloth.call(start_only, ModelSpec(name=str(tmp_path)))
    assert "is not a causal language model" in said


def without_unsloth(model: ModelSpec) -> str:
    sys.modules["unsloth"] = None  # type: ignore[assignment]
    return start_only(model)


def with_transformers_first(model: ModelSpec) -> str:
    assert "transformers" in sys.modules
    return start_only(model)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (without_unsloth, "backend unsloth cannot be used on this node"),
        (with_transformers_first, "transformers was imported before Unsloth"),
    ],
)
def test_a_process_that_cannot_have_unsloth_says_so(
    process: Process, folder: Path, function: Callable[..., str], message: str
) -> None:
    assert message in process.call(function, ModelSpec(name=str(folder)))


class FourBitPolicy(PolicyActor):
    """A policy whose frozen weights bitsandbytes keeps in 4 bits, which it can on a CPU too."""

    def _causal_lm(self) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        model = AutoModelForCausalLM.from_pretrained(
            self._model_spec.name,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
            ),
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # it packs weights once more
                module.support_avx512bf16_for_cpu = False
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def test_a_model_in_four_bits_is_exported_and_saved_whole(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    causal_lm(hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(folder)
    model = ModelSpec(name=str(folder))
    actor = FourBitPolicy(model, policy_spec(), 0, 1, 100, 0)
    actor.start("", 0)
    layer = actor._strategy.model.unwrapped.model.layers[0].mlp.down_proj
    assert layer.base_layer.weight.dtype == torch.uint8, "not in 4 bits, so nothing is tested"
    (job,) = make_jobs(GROUPS, simple_loss)
    actor.update(job)
    exported = weights(actor)

    with torch.no_grad():
        probe = torch.eye(128)
        merged = layer(probe).T  # what the layer does to each input, adapters included
    torch.testing.assert_close(
        exported["model.layers.0.mlp.down_proj.weight"], merged, atol=1e-4, rtol=0
    )

    from transformers import AutoModelForCausalLM

    actor.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not getattr(saved.config, "quantization_config", None)
    state = saved.state_dict()
    for name, tensor in exported.items():
        assert torch.equal(state[name], tensor), name
