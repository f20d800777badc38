"""ALGORITHMS in plain Python loops over floats: slow, and independent of the code under test.

Every function takes nested lists. The gradient is written out by hand, term by term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Rows = list[list[float]]


@dataclass
class Options:
    """One setting of a policy loss."""

    how: str = "token_mean"
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    beta: float = 0.0
    estimator: str = "k3"
    correction: str = "none"
    cap: float = 2.0
    entropy: float = 0.0
    level: str = "token"  # token | sequence | sequence_token
    old_is_rollout: bool = False


@dataclass
class Tensors:
    """The inputs of a policy loss as lists."""

    logp: Rows
    old: Rows
    roll: Rows
    ref: Rows
    entropy: Rows
    advantages: Rows
    mask: list[list[bool]]
    budget: int


@dataclass
class Answer:
    """A loss, its gradients, and the figures it reports as global means."""

    loss: float = 0.0
    grad_logp: Rows = field(default_factory=list)
    grad_entropy: Rows = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    ratio_max: float = 0.0


def aggregation_weights(mask: list[list[bool]], how: str, budget: int) -> Rows:
    """c such that agg(x) = sum c * x."""
    tokens = sum(sum(row) for row in mask)
    nonempty = sum(1 for row in mask if any(row))
    weights = []
    for row in mask:
        n = sum(row)
        one = 0.0
        if n:
            one = {
                "token_mean": 1 / tokens,
                "sequence_mean": 1 / (n * nonempty),
                "constant": 1 / (len(mask) * budget),
            }[how]
        weights.append([one if m else 0.0 for m in row])
    return weights


def kl(d: float, estimator: str) -> tuple[float, float]:
    """The estimate and its derivative."""
    if estimator == "k1":
        return d, 1.0
    if estimator == "k2":
        return d * d / 2, d
    return math.exp(-d) - 1 + d, 1 - math.exp(-d)


def surrogate(r: float, a: float, low: float, high: float, dual: float | None):
    """ell, d ell / d r, and whether a clip holds r."""
    unclipped = r * a
    clipped = min(max(r, 1 - low), 1 + high) * a
    ell, slope = (-unclipped, -a) if unclipped <= clipped else (-clipped, 0.0)
    if dual is not None and a < 0 and -dual * a < ell:
        ell, slope = -dual * a, 0.0
    return ell, slope, slope == 0.0 and a != 0


def correction_weights(old: list[float], roll: list[float], mask: list[bool], o: Options):
    q = [math.exp(a - b) for a, b in zip(old, roll, strict=True)]
    if o.correction == "none":
        return [1.0] * len(q)
    if o.correction == "token":
        return [min(x, o.cap) for x in q]
    if o.correction == "icepop":
        return [x if 1 / o.cap <= x <= o.cap else 0.0 for x in q]
    product = math.prod(x for x, m in zip(q, mask, strict=True) if m)
    return [min(product, o.cap)] * len(q)


def policy_loss(x: Tensors, o: Options) -> Answer:
    """L = agg(w * ell) + beta * agg(k) - c * agg(H), with gradients and figures."""
    c = aggregation_weights(x.mask, o.how, x.budget)
    answer = Answer()
    totals = dict.fromkeys(
        ("clip", "w", "kl_ref", "kl_roll", "kl_update", "entropy", "sequence_clip"), 0.0
    )
    policy = 0.0
    for b, mask in enumerate(x.mask):
        valid = [t for t, m in enumerate(mask) if m]
        n = len(valid)
        old = x.roll[b] if o.old_is_rollout else x.old[b]
        w = correction_weights(old, x.roll[b], mask, o)
        grad, grad_entropy = [0.0] * len(mask), [0.0] * len(mask)
        mean_d = sum(x.logp[b][t] - old[t] for t in valid) / n if n else 0.0
        for t in valid:
            d = x.logp[b][t] - old[t]
            r = math.exp(d if o.level == "token" else mean_d)
            ell, slope, held = surrogate(r, x.advantages[b][t], o.low, o.high, o.dual)
            policy += c[b][t] * w[t] * ell
            if o.level == "sequence":
                for u in valid:
                    grad[u] += c[b][t] * w[t] * slope * r / n
            else:
                grad[t] += c[b][t] * w[t] * slope * r
            k, dk = kl(x.logp[b][t] - x.ref[b][t], o.estimator)
            answer.loss += c[b][t] * (o.beta * k - o.entropy * x.entropy[b][t])
            grad[t] += c[b][t] * o.beta * dk
            grad_entropy[t] = -o.entropy * c[b][t]
            newer = x.logp[b][t] if o.old_is_rollout else old[t]
            totals["clip"] += held
            totals["w"] += w[t]
            totals["kl_ref"] += k
            totals["kl_roll"] += kl(x.roll[b][t] - newer, "k3")[0]
            totals["kl_update"] += kl(old[t] - x.logp[b][t], "k3")[0]
            totals["entropy"] += x.entropy[b][t]
            totals["sequence_clip"] += held / n
            answer.ratio_max = max(answer.ratio_max, r)
        answer.grad_logp.append(grad)
        answer.grad_entropy.append(grad_entropy)
    answer.loss += policy
    tokens = max(sum(sum(row) for row in x.mask), 1)
    nonempty = max(sum(1 for row in x.mask if any(row)), 1)
    answer.means = {
        "loss/policy": policy,
        "policy/clip_fraction": totals["clip"] / tokens,
        "correction/weight_mean": totals["w"] / tokens,
        "kl/reference": totals["kl_ref"] / tokens,
        "kl/rollout_vs_policy": totals["kl_roll"] / tokens,
        "kl/update": totals["kl_update"] / tokens,
        "policy/entropy": totals["entropy"] / tokens,
        "gspo/sequence_clip_fraction": totals["sequence_clip"] / nonempty,
    }
    return answer


def mean(xs: list[float]) -> float:
    return math.fsum(xs) / len(xs)


def std(xs: list[float]) -> float:
    m = mean(xs)
    return math.sqrt(math.fsum((x - m) ** 2 for x in xs) / (len(xs) - 1))


def constant(xs: list[float]) -> bool:
    return max(xs) - min(xs) <= max(1e-12 * max(abs(x) for x in xs), 1e-12)


def standardised(xs: list[float]) -> list[float]:
    if len(xs) == 1 or constant(xs):
        return [0.0] * len(xs)
    return [(x - mean(xs)) / (std(xs) + 1e-6) for x in xs]


def gae(rho, values, mask, final, gamma, lam) -> list[float]:
    """One completion, by the definition as a sum: A_t = sum_j (gamma lam)^j delta_(t+j)."""
    valid = [t for t, m in enumerate(mask) if m]
    deltas = []
    for i, t in enumerate(valid):
        after = values[valid[i + 1]] if i + 1 < len(valid) else final
        deltas.append(rho[t] + gamma * after - values[t])
    out = [0.0] * len(mask)
    for i, t in enumerate(valid):
        out[t] = math.fsum((gamma * lam) ** j * d for j, d in enumerate(deltas[i:]))
    return out


def whitened(xs: list[float]) -> list[float]:
    variance = std(xs) ** 2 if len(xs) > 1 else 0.0
    return [(x - mean(xs)) / math.sqrt(variance + 1e-8) for x in xs]


def soft_overlong(n: int, l_max: int, l_cache: int) -> float:
    if n <= l_max - l_cache:
        return 0.0
    if n <= l_max:
        return (l_max - l_cache - n) / l_cache
    return -1.0
