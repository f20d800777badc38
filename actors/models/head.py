"""Log-probs and entropies from a piece of logits, whose gradient is made where the logits lie.

A piece of logits is all the memory that this takes, forwards and backwards: the logits become
probabilities, and the probabilities become the gradient. Entropy costs no second piece, and its
gradient is made only where a loss asks for one. On a GPU, Triton's kernels do the same in two
passes over the piece, in the dtype that it was computed in (head_kernels.py).

Shapes: n rows of the piece, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

CACHED = 2**22  # bytes that are worked on at a time: a core's cache holds them
ON_GPU = 2**28


def chosen(
    logits: torch.Tensor, targets: torch.Tensor, factor: float, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [n] of `targets` [n] under the softmax of `logits` [n, V] times `factor`, and
    entropies [n] in nats (zeros without `entropy`), float32 or wider.

    `logits` are used up: they belong to nobody else, and nothing may read them afterwards.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and _has_triton():
        if not logits.is_contiguous():
            logits = logits.contiguous()
        fused: tuple[torch.Tensor, torch.Tensor] = _ChosenOnGpu.apply(logits, targets, factor)
        return fused
    if torch.is_grad_enabled() and logits.requires_grad:
        found: tuple[torch.Tensor, torch.Tensor] = _Chosen.apply(logits, targets, factor)
        return found
    logp, spread, _ = _read(logits, targets, factor, entropy, keep=False)
    return logp, spread


class _Chosen(torch.autograd.Function):
    """With z = factor * logits, p = softmax(z) and H its entropy: d logp / dz = onehot - p, and
    dH / dz = -p log p - p H."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy, p = _read(logits, targets, factor, entropy=True, keep=True)
        ctx.save_for_backward(p, targets, entropy)
        ctx.factor, ctx.dtype, ctx.spent = factor, logits.dtype, False
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(
        ctx: Any, of_logp: torch.Tensor | None, of_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None]:
        if ctx.spent:
            raise RuntimeError("log-probs have one backward pass: it uses their memory up")
        ctx.spent = True
        p, targets, entropy = ctx.saved_tensors
        flow = torch.zeros_like(entropy) if of_logp is None else of_logp * ctx.factor
        if of_entropy is None or not bool(of_entropy.any()):
            p.mul_(-flow[:, None])
        else:
            spread = of_entropy * ctx.factor
            for rows in _blocks(p):
                own = torch.special.entr(p[rows]).mul_(spread[rows, None])
                p[rows].mul_(-(flow + spread * entropy)[rows, None]).add_(own)
        p.scatter_add_(-1, targets[:, None], flow[:, None])
        return p.to(ctx.dtype), None, None


class _ChosenOnGpu(torch.autograd.Function):
    """As `_Chosen`. The entropy comes with the log-probs, whether it is wanted or not."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from actors.models.head_kernels import read

        logp, entropy, norm = read(logits, targets, factor)
        ctx.save_for_backward(logits, targets, norm, entropy)
        ctx.factor, ctx.spent = factor, False
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(
        ctx: Any, of_logp: torch.Tensor | None, of_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None]:
        from actors.models.head_kernels import write_gradient

        if ctx.spent:
            raise RuntimeError("log-probs have one backward pass: it uses their memory up")
        ctx.spent = True
        logits, targets, norm, entropy = ctx.saved_tensors
        flow, spread = (
            torch.zeros_like(norm) if flow is None else (flow * ctx.factor).float().contiguous()
            for flow in (of_logp, of_entropy)
        )
        write_gradient(logits, targets, norm, entropy, flow, spread, ctx.factor)
        return logits, None, None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _read(
    logits: torch.Tensor, targets: torch.Tensor, factor: float, entropy: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs [n], entropies [n] and, with `keep`, probabilities in place of the logits."""
    # The head may compute in bfloat16; a log-softmax there has no digits left for a ratio.
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if factor != 1.0:
        z.mul_(factor)
    logp = z.gather(-1, targets[:, None]).squeeze(-1)
    spread = torch.zeros_like(logp)
    for rows in _blocks(z):
        own = z[rows]
        top = own.amax(-1)
        weights = own.sub_(top[:, None]).exp()
        total = weights.sum(-1)
        logp[rows] -= top
        logp[rows] -= total.log()
        if entropy:
            torch.sub(total.log(), (own * weights).sum(-1) / total, out=spread[rows])
        if keep:
            torch.div(weights, total[:, None], out=own)
    return logp, spread, z


def _blocks(z: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on at a time, so that what an operation leaves is small."""
    size = ON_GPU if z.is_cuda else CACHED
    step = max(1, size // max(1, z.shape[-1] * z.element_size()))
    return (slice(start, start + step) for start in range(0, len(z), step))
