"""Random loss inputs, the same as tensors and as lists, and what both need to be compared."""

from __future__ import annotations

import dataclasses

import torch

from actors.messages import Counts, LossTerms, TokenBatch

from . import slow

BUDGET = 9


def counts_of(mask: torch.Tensor) -> Counts:
    """The denominators of a step that holds exactly these rows."""
    return Counts(
        tokens=float(mask.sum()), rows=float(len(mask)), nonempty_rows=float(mask.any(1).sum())
    )


def random_batch(
    seed: int,
    rows: int = 6,
    width: int = 7,
    drift: float = 0.4,
    dtype: torch.dtype = torch.float64,
    per_token_advantages: bool = False,
) -> TokenBatch:
    """Rows with interior zeros, a padded tail, one row without a trained token, one advantage 0.

    `drift` is the standard deviation of logp - old per token.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    old = -normal(rows, width).abs() - 0.1
    mask = torch.rand(rows, width, generator=g) < 0.75
    mask[0] = True
    mask[1 % rows, 1:-1] = torch.tensor([t % 2 == 0 for t in range(width - 2)])
    if rows > 2:
        mask[2] = False
    advantages = normal(rows, width if per_token_advantages else 1).expand(rows, width).clone()
    if rows > 3:
        advantages[3] = 0.0
    tensors = {
        "logp": old + drift * normal(rows, width),
        "old": old,
        "roll": old + 0.5 * normal(rows, width),
        "ref": old + 0.3 * normal(rows, width),
        "entropy": normal(rows, width).abs(),
        "advantages": advantages,
    }
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    for leaf in ("logp", "entropy"):
        tensors[leaf].requires_grad_()
    return TokenBatch(mask=mask, counts=counts_of(mask), budget=BUDGET, **tensors)


def as_lists(batch: TokenBatch) -> slow.Tensors:
    """The same batch for the slow reference."""
    names = ("logp", "old", "roll", "ref", "entropy", "advantages", "mask")
    return slow.Tensors(
        **{name: getattr(batch, name).detach().tolist() for name in names}, budget=batch.budget
    )


def take(batch: TokenBatch, rows: list[int], pad: int = 0) -> TokenBatch:
    """Some rows of a batch as fresh leaves, with `pad` more columns; counts stay the step's."""

    def part(x: torch.Tensor, fill: float) -> torch.Tensor:
        extra = torch.full((len(rows), pad), fill, dtype=x.dtype)
        return torch.cat([x.detach()[rows], extra], dim=1)

    fields = {
        name: part(getattr(batch, name), fill)
        for name, fill in {
            "logp": -3.0, "old": -1.0, "roll": 0.0, "ref": -9.0, "entropy": 5.0, "advantages": 7.0,
            "mask": 0,
        }.items()
    }  # fmt: skip
    for leaf in ("logp", "entropy"):
        fields[leaf].requires_grad_()
    return dataclasses.replace(batch, **fields)


def figures(terms: list[LossTerms], counts: Counts) -> dict[str, float]:
    """What shares report together: sums over their denominators, maxima."""
    out: dict[str, float] = {}
    for name in terms[0].sums:
        denominator = max(getattr(counts, terms[0].sums[name][1]), 1.0)
        out[name] = sum(t.sums[name][0].item() for t in terms) / denominator
    for name in terms[0].maxima:
        out[name] = max(t.maxima[name].item() for t in terms)
    return out
