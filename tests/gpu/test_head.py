"""The kernels of the output head are the plain operations, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from actors.models.head import chosen


def whole(logits: torch.Tensor, targets: torch.Tensor, factor: float) -> tuple[torch.Tensor, ...]:
    logp = (logits * factor).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("vocabulary", [61, 4096, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_entropy", [False, True])
def test_values_and_gradients_are_those_of_a_whole_log_softmax(
    vocabulary: int, dtype: torch.dtype, of_entropy: bool
) -> None:
    torch.manual_seed(0)
    leaf = (3 * torch.randn(37, vocabulary, device="cuda")).to(dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    targets = torch.randint(0, vocabulary, (37,), device="cuda")
    flow, spread = torch.randn(2, 37, device="cuda")
    got = chosen(leaf.clone(), targets, 0.7, True)  # what it is given is used up
    wanted = whole(exact, targets, 0.7)
    for value, reference in zip(got, wanted, strict=True):
        assert float((value - reference).abs().max()) < 1e-4
    (got[0] * flow + of_entropy * got[1] * spread).sum().backward()
    (wanted[0] * flow + of_entropy * wanted[1] * spread).sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-5
    assert float((leaf.grad - exact.grad).norm() / exact.grad.norm()) < bound


def test_what_is_impossible_has_no_gradient_and_nan_stays_nan() -> None:
    logits = torch.randn(2, 300, device="cuda")
    logits[0, 7] = -torch.inf
    logits[1, 5] = torch.nan
    leaf = logits.clone().requires_grad_()
    targets = torch.tensor([3, 3], device="cuda")
    logp, entropy = chosen(leaf.clone(), targets, 1.0, True)
    assert torch.isfinite(torch.stack([logp[0], entropy[0]])).all()
    assert torch.isnan(logp[1])
    (logp[0] + entropy[0]).backward()
    assert leaf.grad is not None
    assert float(leaf.grad[0, 7]) == 0.0
