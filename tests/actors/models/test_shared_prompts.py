"""A pack that holds each prompt once has the log-probs, entropies and gradients of padded rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actors.models.attention as attention
from actors.messages import GroupTensors, Row
from actors.models.attention import Pieces, settle
from actors.models.configuration import ModelError
from actors.models.inputs import collate_rows
from actors.models.logprobs import LogProbModel, check_packs, rows_of
from actors.specs import ModelSpec
from tests.actors.policy_cases import causal_lm, make_group

CPU = torch.device("cpu")
SPEC = ModelSpec(name="x")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {}),
    "Llama": ("Llama", {}),
    "window": ("Mistral", {"sliding_window": 3}),
    "some layers": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}
some_groups = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
    min_size=1,
    max_size=3,
)


def exactly(model: Any) -> Any:
    """The model in float64, with norms in float64: transformers' are in float32 in any model, so a
    gradient that is summed before or after them differs by its rounding."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda states, norm=module: torch.nn.functional.rms_norm(
                states, states.shape[-1:], norm.weight, norm.variance_epsilon
            )
    return model


def adapted(model: Any) -> Any:
    """The model under adapters that add something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def sharing(model: Any, causal: Any, chunk: int = 16) -> LogProbModel:
    """`model`, whose causal LM is `causal`, ready for packs that share prompts."""
    settled = settle("auto", SPEC, causal, CPU, shared=True)
    assert settled == (True, "packed rows, sdpa row by row, prompts shared")
    return LogProbModel(model, chunk)


def results(
    model: LogProbModel,
    groups: dict[int, GroupTensors],
    rows: list[Row],
    temperature: float,
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[2, N] log-probs and entropies, and the gradient of a sum that weighs each its own way."""
    inputs = collate_rows(groups, rows, packed=shared, shared=shared)
    found = model(**vars(inputs), temperature=temperature, entropy=True)
    assert isinstance(found, torch.Tensor)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad((weights * found).sum(), trained)
    return found.detach(), torch.cat([part.flatten() for part in gradient])


@pytest.fixture(scope="module")
def models() -> dict[str, LogProbModel]:
    made = {
        name: sharing(causal, causal)
        for name, (family, options) in FAMILIES.items()
        for causal in [exactly(causal_lm(family, **options))]
    }
    base = exactly(causal_lm())
    return made | {"lora": sharing(exactly(adapted(base)), base)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "lora"])
@settings(deadline=None, max_examples=12)
@given(shapes=some_groups, temperature=st.sampled_from([0.7, 1.0]), data=st.data())
def test_log_probs_entropies_and_gradients_are_those_of_padded_rows(
    models: dict[str, LogProbModel], name: str, shapes: Any, temperature: float, data: Any
) -> None:
    """Ragged groups, several of them in a pack, some of their completions, in any order."""
    groups = {work: make_group(work, *shape) for work, shape in enumerate(shapes)}
    rows = data.draw(st.permutations(rows_of(groups)))
    rows = rows[: data.draw(st.integers(1, len(rows)))]
    model = models[name]
    model.tokens_per_chunk = data.draw(st.integers(1, 40))
    wanted, got = (results(model, groups, rows, temperature, shared) for shared in (False, True))
    for value, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_float32_they_agree_to_a_millionth(checkpointing: bool) -> None:
    causal = causal_lm()
    if checkpointing:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    model = sharing(causal, causal).train(checkpointing)
    groups = {0: make_group(0, 20, [3, 9, 5]), 1: make_group(1, 6, [2, 11])}
    wanted, got = (results(model, groups, rows_of(groups), 1.0, shared) for shared in (False, True))
    for value, reference in zip(got, wanted, strict=True):
        assert float((value - reference).norm()) <= 1e-6 * float(reference.norm())


def test_a_pack_has_each_prompt_once_and_its_completions_go_on_at_its_end() -> None:
    groups = {4: make_group(0, 3, [2, 1]), 7: make_group(1, 2, [3])}
    inputs = collate_rows(groups, rows_of(groups), packed=True, shared=True)
    assert inputs.pieces == Pieces((3, 2, 1, 2, 3), (None, 0, 0, None, 3))
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4]]
    # The last token of a prompt, at 2 and at 7, predicts the first of each of its completions.
    assert inputs.positions.tolist() == [2, 3, 2, 7, 8, 9]
    tokens = [*groups[4].prompt_ids, *groups[4].token_ids]
    assert inputs.input_ids[0, :6].tolist() == tokens
    assert inputs.row_ends is not None
    assert inputs.row_ends.tolist() == [0, 3, 5, 6, 8, 11]
    assert inputs.longest == 5


def test_an_empty_prompt_is_refused() -> None:
    groups = {0: make_group(9, 0, [2, 1])}
    with pytest.raises(ValueError, match="group 9 of a batch has an empty prompt"):
        collate_rows(groups, rows_of(groups), packed=True, shared=True)


@pytest.mark.parametrize(
    ("make", "spec", "why"),
    [
        (lambda: causal_lm("Gemma2"), SPEC, "its attention caps scores"),
        (
            lambda: causal_lm("Gemma2"),
            SPEC.model_copy(update={"attention": "eager"}),  # as it is settled
            "its attention caps scores",
        ),
        (lambda: causal_lm(head_dim=4), SPEC, "its heads have a width of 4"),
        (causal_lm, SPEC.model_copy(update={"attention": "eager"}), "model.attention is eager"),
        (
            causal_lm,
            SPEC.model_copy(update={"attention": "flash_attention_2"}),
            "model.attention is flash_attention_2",
        ),
    ],
)
def test_a_model_that_cannot_share_prompts_is_refused_with_the_reason(
    make: Callable[[], Any], spec: ModelSpec, why: str
) -> None:
    with pytest.raises(ModelError, match=rf"{why}; set policy.shared_prompts to false"):
        settle("auto", spec, make(), CPU, shared=True)


def test_layers_of_another_kind_are_refused() -> None:
    causal = causal_lm()
    causal.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="it has layers of linear_attention"):
        settle("auto", SPEC, causal, CPU, shared=True)


def test_a_pack_with_shared_prompts_is_refused_by_any_other_attention() -> None:
    groups = {0: make_group(0, 3, [2, 1])}
    inputs = collate_rows(groups, rows_of(groups), packed=True, shared=True)
    with pytest.raises(ValueError, match="was given to a model with sdpa attention"):
        LogProbModel(causal_lm(), 16)(**vars(inputs), temperature=1.0)


def alone(pieces: Pieces, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Keys of each piece without its prompt's."""
    return list(tensor.split(pieces.lengths, dim=2))


def beside(count: int, seen: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Aligned with the first keys, as some kernels take a causal mask."""
    return torch.ones(count, seen, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [(Pieces, "with_prompts", alone), (attention, "_band", beside)],
    ids=["no prompt", "another alignment"],
)
def test_a_device_that_attends_otherwise_is_found_at_the_start(
    where: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = causal_lm()
    model = sharing(causal, causal)
    check_packs(model, model, SPEC, CPU, shared=True)
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(ModelError, match=r"set policy\.shared_prompts to false"):
        check_packs(model, model, SPEC, CPU, shared=True)
