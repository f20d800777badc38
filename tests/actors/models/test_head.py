"""A piece of logits, used up in place, against plain autograd through a log-softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.models import head
from actors.models.head import chosen

TOLERANCE = 1e-6


def plainly(
    logits: torch.Tensor, targets: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = (logits * factor).log_softmax(-1)
    return whole.gather(-1, targets[:, None]).squeeze(-1), -(whole.exp() * whole).sum(-1)


def drawn(rows: int, vocabulary: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    logits = torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64) * spread
    return logits, torch.randint(0, vocabulary, (rows,), generator=draw)


def gradient(
    found: tuple[torch.Tensor, torch.Tensor], leaf: torch.Tensor, of_entropy: float
) -> torch.Tensor:
    logp, entropy = found
    weights = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    loss = (weights * logp).sum()
    if of_entropy:
        loss = loss + of_entropy * (weights.flip(0) * entropy).sum()
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 200),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    of_entropy=st.sampled_from([0.0, 0.3]),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    cached=st.sampled_from([1, 1000, 2**22]),
)
def test_float32_values_and_gradients_are_the_plain_ones_of_float64(
    rows: int, vocabulary: int, temperature: float, of_entropy: float, spread: float, cached: int
) -> None:
    exact, targets = drawn(rows, vocabulary, spread)
    exact = exact.float().double().requires_grad_()
    wanted = plainly(exact, targets, 1 / temperature)
    wanted_gradient = gradient(wanted, exact, of_entropy)
    leaf = exact.detach().float().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CACHED", cached)
        found = chosen(leaf * 1.0, targets, 1 / temperature, entropy=True)
        got = gradient(found, leaf, of_entropy)
    largest = max(1.0, float(exact.detach().abs().max()) / temperature)  # float32 rounds it
    for one, right in zip(found, wanted, strict=True):
        assert float((one.detach() - right.detach()).abs().max()) <= TOLERANCE * largest
    norm = max(1.0, float(wanted_gradient.norm()))
    assert float((got.double() - wanted_gradient).norm()) <= TOLERANCE * largest * norm


def test_without_a_gradient_the_values_are_the_same_bits() -> None:
    logits, targets = (each.float() if each.is_floating_point() else each for each in drawn(7, 50))
    with_gradient = chosen(logits.clone().requires_grad_() * 1.0, targets, 0.7, entropy=True)
    with torch.no_grad():
        without = chosen(logits.clone(), targets, 0.7, entropy=True)
        logp, nothing = chosen(logits.clone(), targets, 0.7, entropy=False)
    assert all(torch.equal(a, b) for a, b in zip(with_gradient, without, strict=True))
    assert torch.equal(logp, without[0])
    assert float(nothing.abs().max()) == 0


def test_logits_in_bfloat16_give_float32_and_a_gradient_in_bfloat16() -> None:
    logits, targets = drawn(6, 80)
    leaf = logits.bfloat16().requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    wanted = plainly(exact, targets, 1.0)
    found = chosen(leaf * 1.0, targets, 1.0, entropy=True)
    assert {each.dtype for each in found} == {torch.float32}
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6, atol=1e-5)
    got, right = gradient(found, leaf, 0.3), gradient(wanted, exact, 0.3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), right, rtol=2**-8, atol=1e-6)


def test_no_more_than_one_piece_is_there_at_a_time() -> None:
    """What autograd keeps is the memory that the logits lay in, and so is the gradient."""
    logits, targets = drawn(8, 64)
    leaf = logits.float().requires_grad_()
    mine = leaf * 1.0
    place = mine.data_ptr()
    logp, _ = chosen(mine, targets, 1.0, entropy=True)
    assert logp.grad_fn is not None
    kept = logp.grad_fn.saved_tensors[0]  # type: ignore[attr-defined]
    assert kept.data_ptr() == place
    seen: list[int] = []
    mine.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    logp.sum().backward()
    assert seen == [place]


def test_the_gradient_of_the_entropy_is_made_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, targets = drawn(8, 64)
    made: list[int] = []
    entr = torch.special.entr

    def watched(p: torch.Tensor) -> torch.Tensor:
        made.append(len(p))
        return entr(p)

    monkeypatch.setattr(torch.special, "entr", watched)
    for of_entropy in (0.0, 0.3):
        leaf = logits.float().requires_grad_()
        stacked = torch.stack(chosen(leaf * 1.0, targets, 1.0, entropy=True))
        gradient((stacked[0], stacked[1]), leaf, of_entropy)
        assert bool(made) is (of_entropy != 0)


def test_a_second_backward_pass_is_refused() -> None:
    logits, targets = drawn(3, 9)
    logp, _ = chosen(logits.requires_grad_() * 1.0, targets, 1.0, entropy=False)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        logp.sum().backward()
