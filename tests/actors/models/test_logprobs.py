"""Chunked log-probs against a plain log-softmax over whole logits, values and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import GroupTensors
from actors.models.configuration import ModelError
from actors.models.inputs import collate
from actors.models.logprobs import LogProbModel, check_model, group_logprobs, head_calls, rows_of
from actors.packing import microbatches
from actors.specs import rows_at_once
from tests.actors.policy_cases import VOCABULARY, causal_lm

Sequences = list[tuple[np.ndarray, np.ndarray]]


def sequences(lengths: list[tuple[int, int]], seed: int = 0) -> Sequences:
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, VOCABULARY, p), draw.integers(0, VOCABULARY, n)) for p, n in lengths]


LENGTHS = [(3, 5), (1, 9), (4, 2), (2, 1)]
some_lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=6)


def plainly(model: Any, rows: Sequences, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, one sequence at a time, from whole logits."""
    logps, entropies = [], []
    for prompt, response in rows:
        ids = torch.tensor(np.concatenate([prompt, response]))[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
        whole = logits.log_softmax(-1)
        logps.append(whole.gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
        entropies.append(-(whole.exp() * whole).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


def gradients(model: torch.nn.Module, value: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(
    lengths=some_lengths,
    chunk=st.integers(1, 40),
    packed=st.booleans(),
    temperature=st.sampled_from([0.7, 1.0, 1.3]),
)
def test_values_and_gradients_are_those_of_a_whole_log_softmax(
    lengths: list[tuple[int, int]], chunk: int, packed: bool, temperature: float
) -> None:
    model = causal_lm().double()
    rows = sequences(lengths)
    wanted, spread = plainly(model, rows, temperature)
    weights = torch.linspace(-1, 2, len(wanted), dtype=torch.float64)
    wanted_grad = gradients(model, (weights * wanted).sum() + (weights.flip(0) * spread).sum())

    inputs = collate(rows, packed)
    logp, entropy = LogProbModel(model, chunk)(
        **vars(inputs), temperature=temperature, entropy=True
    )
    assert entropy is not None
    grad = gradients(model, (weights * logp).sum() + (weights.flip(0) * entropy).sum())

    torch.testing.assert_close(logp, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, spread, rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
def test_float32_agrees_with_float64(packed: bool) -> None:
    rows = sequences(LENGTHS)
    wanted, _ = plainly(causal_lm().double(), rows, 1.0)
    logp, _ = LogProbModel(causal_lm(), 4)(**vars(collate(rows, packed)), temperature=1.0)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_the_head_never_sees_more_tokens_than_a_chunk(grad: bool) -> None:
    model = causal_lm()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[:-1].numel()))
    inputs = collate(sequences(LENGTHS), packed=False)
    with torch.set_grad_enabled(grad):
        logp, _ = LogProbModel(model, 4)(**vars(inputs), temperature=1.0)
        forwards = len(seen)
        if grad:
            logp.sum().backward()
    assert forwards == -(-len(inputs.targets) // 4)
    recomputed = forwards - 1 if grad else 0  # backwards, chunk by chunk, but for the last
    assert len(seen) == forwards + recomputed
    assert max(seen) <= 4


def test_backward_keeps_no_more_than_one_chunk_alive() -> None:
    """What autograd saves between the passes is of the size of hidden states, and of one chunk."""
    saved: list[int] = []
    model = LogProbModel(causal_lm(), 4)
    head = model.causal_lm.lm_head.weight.untyped_storage().data_ptr()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.shape[-1:] == (VOCABULARY,)
        its_own = tensor.untyped_storage().data_ptr() != head
        saved.append(tensor.numel() if wide and its_own else 0)
        return tensor

    inputs = collate(sequences(LENGTHS), packed=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**vars(inputs), temperature=1.0, entropy=True)
    assert len(saved) > 1
    assert sum(saved) <= 4 * VOCABULARY


def test_surplus_chunks_change_nothing_and_too_few_are_refused() -> None:
    model = LogProbModel(causal_lm(), 4)
    inputs = collate(sequences(LENGTHS), packed=False)
    enough, _ = model(**vars(inputs), temperature=1.0)
    more, _ = model(**vars(inputs), temperature=1.0, chunks=9)
    assert torch.equal(enough, more)
    with pytest.raises(ValueError, match="17 tokens need 5 chunks, not 2"):
        model(**vars(inputs), temperature=1.0, chunks=2)


@pytest.mark.parametrize(
    "family",
    [
        ("Gemma2", {"final_logit_softcapping": 0.5}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.2}),
    ],
    ids=lambda family: family[0],
)
def test_models_that_transform_their_logits_are_followed(family: tuple[str, dict]) -> None:
    name, options = family
    model = causal_lm(name, **options).double()
    rows = sequences(LENGTHS)
    wanted, _ = plainly(model, rows, 0.9)
    logp, _ = LogProbModel(model, 4)(**vars(collate(rows, packed=False)), temperature=0.9)
    torch.testing.assert_close(logp, wanted, rtol=0, atol=1e-10)


def test_a_model_whose_logits_are_not_understood_is_refused() -> None:
    model = causal_lm()
    honest = model.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        out = honest(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = odd
    with pytest.raises(ModelError, match="transforms its logits in a way that is not supported"):
        check_model(LogProbModel(model, 4), packing=False)


def test_a_model_whose_training_mode_is_random_is_refused_and_the_random_stream_stays() -> None:
    noisy = causal_lm("Phimoe", num_local_experts=4, router_jitter_noise=1.0)
    before = torch.get_rng_state()
    check_model(LogProbModel(noisy, 4), packing=False)
    with pytest.raises(ModelError, match="PhimoeForCausalLM draws at random while it trains"):
        check_model(LogProbModel(noisy, 4), packing=False, training=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_neither_dropout_of_new_adapters_nor_an_order_of_adding_is_taken_for_that() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    model = LogProbModel(get_peft_model(causal_lm(), lora), 64)
    check_model(model, packing=True, training=True)
    decoder, rounding = model.causal_lm.base_model, itertools.count(1)
    honest = decoder.forward

    def inexact(**kwargs: Any) -> Any:
        out = honest(**kwargs)
        out.last_hidden_state = out.last_hidden_state * (1 + 1e-7 * next(rounding))
        return out

    decoder.forward = inexact
    check_model(model, packing=True, training=True)


def test_a_model_that_mixes_packed_sequences_is_refused_for_packing_only() -> None:
    wrapped = LogProbModel(causal_lm(), 64)
    decoder = wrapped.causal_lm.base_model
    honest = decoder.forward

    def leaky(*, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        width = position_ids.shape[1]
        return honest(position_ids=torch.arange(width).expand_as(position_ids), **kwargs)

    decoder.forward = leaky
    check_model(wrapped, packing=False)
    with pytest.raises(ModelError, match=r"set policy.packing to false"):
        check_model(wrapped, packing=True)


def test_bfloat16_log_probs_are_float32_numbers() -> None:
    model = causal_lm().bfloat16()
    logp, _ = LogProbModel(model, 4)(**vars(collate(sequences(LENGTHS), False)), temperature=1.0)
    assert logp.dtype == torch.float32
    assert not torch.equal(logp, logp.bfloat16().float())


def test_group_logprobs_land_at_their_completions() -> None:
    model = LogProbModel(causal_lm(), 5)
    draw = np.random.default_rng(3)
    groups = {}
    for work, lengths in ((4, (3, 1, 6)), (7, (2, 2))):
        total = sum(lengths)
        groups[work] = GroupTensors(
            group_id=work,
            prompt_ids=draw.integers(0, VOCABULARY, work).astype(np.int32),
            lengths=lengths,
            token_ids=draw.integers(0, VOCABULARY, total).astype(np.int32),
            logprobs=np.zeros(total, np.float32),
            mask=np.ones(total, bool),
        )
    batches = microbatches(rows_of(groups), 20, packed=False)
    chunks = head_calls(model, groups, batches)
    assert len(batches) > 1
    found = group_logprobs(model, groups, batches, chunks, 1.0, False, torch.device("cpu"))
    for work, group in groups.items():
        pairs = [
            (group.prompt_ids, group.token_ids[group.completion(i)])
            for i in range(len(group.lengths))
        ]
        wanted, _ = plainly(model.model, pairs, 1.0)
        assert found[work].dtype == np.float32
        np.testing.assert_allclose(found[work], wanted.detach().numpy(), atol=1e-5)


def adapted(model: Any) -> Any:
    """The model under adapters on its head too, which add something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(model, lora)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize(
    ("tied", "wrap"),
    [(True, lambda model: model), (False, lambda model: model), (False, adapted)],
    ids=["tied", "untied", "lora"],
)
def test_gradients_reach_the_head_whatever_it_is(
    chunk: int, tied: bool, wrap: Callable[[Any], Any]
) -> None:
    model = wrap(causal_lm(tie_word_embeddings=tied)).double()
    rows = sequences(LENGTHS)
    wanted, spread = plainly(model, rows, 0.8)
    weights = torch.linspace(-1, 2, len(wanted), dtype=torch.float64)
    wanted_grad = gradients(model, (weights * (wanted - 0.1 * spread)).sum())
    logp, entropy = LogProbModel(model, chunk)(
        **vars(collate(rows, packed=False)), temperature=0.8, entropy=True
    )
    assert entropy is not None
    grad = gradients(model, (weights * (logp - 0.1 * entropy)).sum())
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-9, atol=1e-10)
    head = model.get_output_embeddings()
    assert any(p.grad is not None and bool(p.grad.any()) for p in head.parameters())


def test_left_to_itself_a_chunk_takes_the_memory_of_the_head_and_64_mib_at_least() -> None:
    assert LogProbModel(causal_lm(), None).tokens_per_chunk == 64 * 2**20 // (4 * VOCABULARY)
    assert rows_at_once(152_064, 64) == 110
    assert rows_at_once(152_064, 3584) == 3584


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 of a batch has an empty prompt"):
        collate(sequences([(2, 2), (0, 3)]), packed=True)
