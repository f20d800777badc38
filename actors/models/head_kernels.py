"""What head.py does with a piece of logits, on a GPU: read once forwards, written once backwards.

The logits stay in the dtype that they were computed in, and become their own gradient; the
arithmetic is in float32. Triton comes with torch's CUDA builds.

Shapes: n rows of the piece, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096
WARPS = 8


def read(
    logits: torch.Tensor, targets: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of `targets`, entropies and log-normalisers, [n] float32 each, of `logits` [n, V]
    times `factor`."""
    rows, vocabulary = logits.shape
    logp, entropy, norm = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        _read[(rows,)](
            logits,
            targets,
            logp,
            entropy,
            norm,
            logits.stride(0),
            vocabulary,
            factor,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return logp, entropy, norm


def write_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    norm: torch.Tensor,
    entropy: torch.Tensor,
    flow: torch.Tensor,
    spread: torch.Tensor,
    factor: float,
) -> None:
    """Write into `logits` [n, V] the gradient of sum(flow * logp + spread * entropy), both [n],
    already times `factor`."""
    rows, vocabulary = logits.shape
    if rows:
        _write[(rows,)](
            logits,
            targets,
            norm,
            entropy,
            flow,
            spread,
            logits.stride(0),
            vocabulary,
            factor,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@triton.jit
def _read(
    logits: Any,
    targets: Any,
    logp: Any,
    entropy: Any,
    norm: Any,
    stride: Any,
    vocabulary: Any,
    factor: Any,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    top = -1e30
    total = 0.0
    weighted = 0.0  # sum of (z - top) * exp(z - top)
    for first in range(0, vocabulary, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(start + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32) * factor
        higher = tl.maximum(top, tl.max(z, 0))
        scale = tl.exp(top - higher)
        own = tl.exp(z - higher)
        weighted = scale * (weighted + (top - higher) * total)
        weighted += tl.sum(tl.where(own > 0, (z - higher) * own, 0.0), 0)
        total = total * scale + tl.sum(own, 0)
        top = higher
    target = tl.load(targets + row)
    chosen = tl.load(start + target).to(tl.float32) * factor
    log_total = tl.log(total)
    tl.store(logp + row, chosen - top - log_total)
    tl.store(entropy + row, log_total - weighted / total)
    tl.store(norm + row, top + log_total)


@triton.jit
def _write(
    logits: Any,
    targets: Any,
    norm: Any,
    entropy: Any,
    flow: Any,
    spread: Any,
    stride: Any,
    vocabulary: Any,
    factor: Any,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target = tl.load(targets + row)
    log_total = tl.load(norm + row)
    own_entropy = tl.load(entropy + row)
    of_logp = tl.load(flow + row)
    of_entropy = tl.load(spread + row)
    for first in range(0, vocabulary, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(start + at, mask=at < vocabulary, other=0.0).to(tl.float32) * factor
        log_p = z - log_total
        p = tl.exp(log_p)
        slope = -of_logp - of_entropy * (log_p + own_entropy)
        gradient = tl.where(p == 0, 0.0, p * slope) + tl.where(at == target, of_logp, 0.0)
        tl.store(start + at, gradient.to(logits.dtype.element_ty), mask=at < vocabulary)
