"""Packed rows attend to themselves alone, without a mask over the pack, or as the model did."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

import actors.models.attention as attention
from actors.models.attention import PACKED_ROWS, attend, settle
from actors.models.configuration import ModelError
from actors.models.inputs import collate
from actors.models.logprobs import LogProbModel, check_model
from actors.models.values import ValueModel, check_packing
from actors.preference.packed import check_apart
from actors.specs import ModelSpec
from tests.actors.policy_cases import VOCABULARY, causal_lm

CPU = torch.device("cpu")
FAMILIES = [
    ("Qwen3", {}),
    ("Qwen2", {}),
    ("Llama", {}),
    ("Mistral", {"sliding_window": 3}),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
]


def rows(*sizes: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [tuple(draw.integers(3, VOCABULARY, size=n) for n in pair) for pair in sizes]  # type: ignore[misc]


def packing(model: Any, wanted: Any, **options: Any) -> tuple[bool, str]:
    return settle(wanted, ModelSpec(name="x", **options), model, CPU)


def results(model: LogProbModel, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of their squares' sum."""
    inputs = collate(rows((5, 17), (2, 3), (7, 12), (1, 1)), packed)
    logp, _ = model(**vars(inputs), temperature=1.0)
    parameters = list(model.parameters())
    found = torch.autograd.grad(logp.square().sum(), parameters)
    return logp.detach(), torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_rows_of_a_pack_have_the_log_probs_and_gradient_of_padded_ones(
    family: tuple[str, dict[str, Any]], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = causal_lm(family[0], **family[1]).double()
    if checkpointing:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    model = LogProbModel(causal, 16)
    model.train(checkpointing)
    wanted = results(model, packed=False)
    assert packing(causal, True) == (True, "packed rows, sdpa row by row")
    called = []
    by_rows = attention._row_by_row
    monkeypatch.setattr(
        attention, "_row_by_row", lambda *given: called.append(1) or by_rows(*given)
    )
    for packed in (True, False):
        for got, reference in zip(results(model, packed), wanted, strict=True):
            assert float((got - reference).abs().max()) < 1e-12
    assert len(called) == 2 * (2 if checkpointing else 1)  # layers, in the packed pass alone
    check_model(LogProbModel(causal.float(), 16), packing=True)


def test_without_a_kernel_by_length_auto_pads_and_the_model_stays_as_it_is() -> None:
    causal = causal_lm()
    assert packing(causal, "auto") == (False, "padded rows, sdpa")
    assert packing(causal, False) == (False, "padded rows, sdpa")
    assert causal.config._attn_implementation == "sdpa"


def test_auto_packs_where_a_kernel_by_length_runs_and_the_model_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_kernel", lambda device, dtype: "a kernel")
    assert packing(causal_lm(), "auto") == (True, "packed rows, a kernel")
    assert packing(causal_lm("Gemma2"), "auto") == (False, "padded rows, eager")
    assert packing(causal_lm(), "auto", attention="eager") == (False, "padded rows, eager")
    flash = packing(causal_lm(), "auto", attention="flash_attention_2")
    assert flash == (True, "packed rows, flash_attention_2")


def test_a_model_that_cannot_attend_by_rows_keeps_its_own_attention_and_it_is_said() -> None:
    for causal, own, why in (
        (causal_lm("Gemma2"), "eager", "its attention caps scores"),
        (causal_lm(head_dim=4), "sdpa", "its heads have a width of 4"),
    ):
        assert packing(causal, True) == (True, f"packed rows, {own} with a dense mask: {why}")
        assert causal.config._attn_implementation != PACKED_ROWS
        check_model(LogProbModel(causal, 16), packing=True)


def check_rows(causal: Any) -> None:
    """The check of a job over packed rows, of which DeepSpeed has not placed the model yet."""
    where = SimpleNamespace(device=torch.device("meta"))
    check_apart(SimpleNamespace(model=causal, args=where, compute_loss_context_manager=nullcontext))


@pytest.mark.parametrize(
    "check",
    [
        lambda causal: check_model(LogProbModel(causal, 16), packing=True, training=True),
        lambda causal: check_packing(ValueModel(causal), "m"),
        check_rows,
    ],
    ids=["log-probs", "values", "rows of a job"],
)
def test_on_a_cpu_a_model_is_checked_without_flash_kernels_and_keeps_them(
    check: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a kernel of GPUs was given tensors on a CPU")

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", kernel)
    causal = causal_lm()
    causal.config._attn_implementation = "flash_attention_2"
    check(causal)
    assert causal.config._attn_implementation == "flash_attention_2"
    mixing = causal.base_model.embed_tokens
    mixing.register_forward_hook(lambda _, __, found: found + found.cumsum(1))
    with pytest.raises(ModelError, match="pack"):
        check(causal)
    assert causal.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"s_aux": torch.ones(2)}, {"dropout": 0.1}])
def test_what_a_layer_asks_beyond_it_is_refused_not_ignored(asked: dict[str, Any]) -> None:
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)
    parts = [torch.zeros(1, 2, 3, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=r"set policy\.packing to false"):
        attend(None, *parts, None, cu_seq_lens_q=ends, max_length_q=2, **asked)


def test_an_export_says_nothing_of_how_rows_attended(tmp_path: Any) -> None:
    causal = causal_lm()
    packing(causal, True)
    causal.save_pretrained(tmp_path)
    assert PACKED_ROWS not in (tmp_path / "config.json").read_text()
