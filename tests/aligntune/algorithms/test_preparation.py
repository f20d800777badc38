"""Token-level targets: PPO's, and the KL in the reward of a group algorithm; over any ranks."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import Counts, TokenInputs, TokenTargets, ValueBatch
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.ppo import PPO

from . import slow


def random_groups(seed: int, groups: int = 3, least: int = 2) -> list[TokenInputs]:
    """Groups of `least` rollouts and more: interior zeros, an empty rollout, a truncated one, one
    that is not trained on."""
    rng, of_turns = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    made = []
    for g in range(groups):
        size = least + g % 2
        lengths = tuple(int(n) for n in rng.integers(1, 7, size))
        if g == 1:
            lengths = (0, *lengths[1:])
        n = sum(lengths)
        made.append(
            TokenInputs(
                lengths=lengths,
                trained=tuple(not (g == 2 and i == 0) for i in range(size)),
                truncated=tuple(bool(x) for x in rng.random(size) < 0.5),
                scores=tuple(float(x) for x in rng.normal(size=size)),
                mask=rng.random(n) < 0.8,
                old=-rng.random(n) * 3,
                reference=-rng.random(n) * 3,
                values=rng.normal(size=n),
                final_values=rng.normal(size=size),
                # Rewards of single turns, where the environment gives such.
                rewards=of_turns.normal(size=n) * (of_turns.random(n) < 0.3) if g else None,
            )
        )
    return made


@dataclasses.dataclass
class Expected:
    """Per group and token, by the slow formulas."""

    advantages: list[list[float]]
    returns: list[list[float]]
    kl: float
    explained_variance: float


def slow_ppo(groups: list[TokenInputs], algorithm: PPO) -> Expected:
    rows: list[tuple[int, list[float], list[float], list[bool]]] = []
    ks: list[float] = []
    for i, g in enumerate(groups):
        start = 0
        for c, n in enumerate(g.lengths):
            cut = slice(start, start + n)
            start += n
            mask = [bool(m) and g.trained[c] for m in g.mask[cut]]
            valid = [t for t, m in enumerate(mask) if m]
            assert g.reference is not None
            assert g.values is not None
            assert g.final_values is not None
            k = [
                slow.kl(float(a - b), algorithm.kl_estimator)[0]
                for a, b in zip(g.old[cut], g.reference[cut], strict=True)
            ]
            ks += [k[t] for t in valid]
            score = g.scores[c]
            if algorithm.score_clip is not None:
                score = min(max(score, -algorithm.score_clip), algorithm.score_clip)
            if g.truncated[c]:
                score -= algorithm.missing_eos_penalty
            beta = algorithm.beta if algorithm.kl_in == "reward" else 0.0
            rho = [-beta * k[t] if m else 0.0 for t, m in enumerate(mask)]
            if valid:
                rho[valid[-1]] += score
            if g.rewards is not None:
                earned = zip(rho, g.rewards[cut], mask, strict=True)
                rho = [r + float(own) if m else r for r, own, m in earned]
            final = 0.0
            if g.truncated[c] and algorithm.bootstrap_truncated:
                final = float(g.final_values[c])
            values = [float(v) for v in g.values[cut]]
            a = slow.gae(rho, values, mask, final, algorithm.gamma, algorithm.gae_lambda)
            rows.append((i, a, [x + v for x, v in zip(a, values, strict=True)], mask))
    flat = [x for _, a, _, mask in rows for x, m in zip(a, mask, strict=True) if m]
    returns = [x for _, _, r, mask in rows for x, m in zip(r, mask, strict=True) if m]
    white = iter(slow.whitened(flat) if algorithm.whiten_advantages else flat)
    out = Expected([[] for _ in groups], [[] for _ in groups], slow.mean(ks), 0.0)
    for i, _, r, mask in rows:
        out.advantages[i] += [next(white) if m else 0.0 for m in mask]
        out.returns[i] += [x if m else 0.0 for x, m in zip(r, mask, strict=True)]
    out.explained_variance = 1 - slow.std(flat) ** 2 / slow.std(returns) ** 2
    return out


SETTINGS: list[dict[str, Any]] = [
    {},
    {"gamma": 0.9, "gae_lambda": 0.8, "kl_estimator": "k3", "beta": 0.3},
    {"score_clip": 0.5, "missing_eos_penalty": 2.0},
    {"bootstrap_truncated": False, "whiten_advantages": False},
    {"kl_estimator": "k2", "gamma": 0.99},
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_ppo_targets_are_those_of_the_formulas(options: dict[str, Any], seed: int) -> None:
    algorithm = PPO(**options)
    groups = random_groups(seed)
    expected = slow_ppo(groups, algorithm)
    targets, figures = algorithm.prepare(groups)
    for i, target in enumerate(targets):
        assert target.advantages.tolist() == pytest.approx(expected.advantages[i], abs=2e-6)
        assert target.returns is not None
        assert target.returns.tolist() == pytest.approx(expected.returns[i], abs=2e-6)
        assert target.advantages.dtype == target.returns.dtype == np.float32
        assert target.old is groups[i].old
    assert figures["kl/reference"] == pytest.approx(expected.kl, rel=1e-9)
    assert figures["ppo/explained_variance"] == pytest.approx(
        expected.explained_variance, rel=1e-9, abs=1e-9
    )


def test_token_rewards_by_hand() -> None:
    """KL per valid token; the score on the last valid one, clipped first, then the penalty."""
    k = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0], [1.0] * 4]).double()
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    scores = torch.tensor([7.0, -7.0, 1.0], dtype=torch.float64)
    truncated = torch.tensor([False, True, True])
    algorithm = PPO(beta=0.5, score_clip=3.0, missing_eos_penalty=1.0)
    got = algorithm.token_rewards(scores, truncated, k, mask)
    assert got.tolist() == [
        [-0.5, 0.0, -2.0 + 3.0, 0.0],
        [-0.5, -1.0, -2.0, -4.0 - 4.0],
        [0.0, 0.0, 0.0, 0.0],
    ]


@pytest.mark.parametrize(("truncated", "bootstrap", "after"), [
    (False, True, 0.0), (True, True, 5.0), (True, False, 0.0),
])  # fmt: skip
def test_the_critic_stands_in_after_a_cut_completion_only(
    truncated: bool, bootstrap: bool, after: float
) -> None:
    group = TokenInputs(
        lengths=(1,), trained=(True,), truncated=(truncated,), scores=(2.0,),
        mask=np.array([True]), old=np.array([-1.0]), reference=np.array([-1.0]),
        values=np.array([0.5]), final_values=np.array([5.0]),
    )  # fmt: skip
    (target,), _ = PPO(bootstrap_truncated=bootstrap).prepare([group])
    assert target.returns is not None
    assert target.returns.tolist() == [2.0 + after]
    assert target.advantages.tolist() == [0.0]  # one token has no spread to whiten


def test_without_bootstrap_no_final_value_is_asked_for() -> None:
    groups = [dataclasses.replace(g, final_values=None) for g in random_groups(0)]
    with pytest.raises(ValueError, match="final_values"):
        PPO().prepare(groups)
    PPO(bootstrap_truncated=False).prepare(groups)


def test_explained_variance_of_perfect_and_of_constant_returns() -> None:
    def one(values: list[float], scores: tuple[float, ...]) -> dict[str, float]:
        n = len(values)
        group = TokenInputs(
            lengths=(1,) * n, trained=(True,) * n, truncated=(False,) * n, scores=scores,
            mask=np.ones(n, bool), old=-np.ones(n), values=np.array(values),
        )  # fmt: skip
        return PPO(beta=0, bootstrap_truncated=False).prepare([group])[1]

    assert one([1.0, 2.0, 3.0], (1.0, 2.0, 3.0))["ppo/explained_variance"] == 1.0
    assert one([0.0, 0.0, 0.0], (1.0, 2.0, 3.0))["ppo/explained_variance"] == 0.0
    assert one([3.0, 2.0, 1.0], (1.0, 2.0, 3.0))["ppo/explained_variance"] == -3.0
    assert "ppo/explained_variance" not in one([3.0, 2.0, 1.0], (1.0, 1.0, 1.0))
    # where rounding leaves a tiny variance
    assert "ppo/explained_variance" not in one([0.3, 0.7, 0.9] * 5, (0.1,) * 15)


def test_whitened_advantages_have_mean_zero_and_unit_spread() -> None:
    targets, _ = PPO().prepare(random_groups(4, groups=8))
    valid = np.concatenate([t.advantages for t in targets])
    valid = valid[valid != 0].astype(np.float64)
    assert valid.mean() == pytest.approx(0, abs=1e-6)
    assert valid.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_the_kl_in_the_reward_of_a_group_algorithm_lowers_its_completions_scores() -> None:
    """Also of the completion that is filtered out of the loss, which is in the baseline."""
    algorithm = GRPO(beta=0.5, kl_in="reward", kl_estimator="k1")
    groups = random_groups(1, groups=3, least=4)
    targets, figures = algorithm.prepare(groups)
    ks = []
    for group, target in zip(groups, targets, strict=True):
        assert group.reference is not None
        penalised, start = [], 0
        masks = []
        for c, n in enumerate(group.lengths):
            cut = slice(start, start + n)
            start += n
            d = (group.old[cut] - group.reference[cut])[group.mask[cut]]
            ks += d.tolist() if group.trained[c] else []
            masks.append(group.mask[cut] & group.trained[c])
            penalised.append(group.scores[c] - 0.5 * math.fsum(d))
        expected = [
            a if m else 0.0
            for a, mask in zip(slow.standardised(penalised), masks, strict=True)
            for m in mask
        ]
        assert target.advantages.tolist() == pytest.approx(expected, abs=1e-6)
        assert target.values is None
        assert target.returns is None
    assert figures == {"kl/reference": pytest.approx(slow.mean(ks), rel=1e-9)}


def test_only_what_prepares_is_prepared() -> None:
    assert PPO().prepares
    assert PPO(beta=0).prepares
    assert GRPO(kl_in="reward").prepares
    assert not GRPO().prepares


@pytest.mark.parametrize("algorithm", [PPO(), GRPO(kl_in="reward")])
@pytest.mark.parametrize("field", ["reference", "mask", "old"])
def test_missing_or_misfitting_arrays_are_errors(algorithm: Algorithm, field: str) -> None:
    groups = random_groups(0)
    if field == "reference":
        groups[1] = dataclasses.replace(groups[1], reference=None)
        with pytest.raises(ValueError, match="reference"):
            algorithm.prepare(groups)
    short = dataclasses.replace(groups[0], **{field: np.zeros(99)})
    with pytest.raises(ValueError, match="tokens"):
        algorithm.prepare([short])


def test_ppo_without_values_is_an_error() -> None:
    groups = [dataclasses.replace(g, values=None) for g in random_groups(0)]
    with pytest.raises(ValueError, match="`values`"):
        PPO().prepare(groups)


class Ranks:
    """Threads that add their vectors up, as ranks do by all-reduce."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.parts: list[torch.Tensor | None] = [None] * size

    def all_sum(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce(local: torch.Tensor) -> torch.Tensor:
            assert local.dtype == torch.float64
            self.parts[rank] = local
            self.barrier.wait()
            total = torch.stack([p for p in self.parts if p is not None]).sum(0)
            self.barrier.wait()
            return total

        return reduce


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 3), st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.sampled_from([PPO(), PPO(beta=0), GRPO(kl_in="reward")]),
)  # fmt: skip
def test_targets_and_figures_do_not_depend_on_the_ranks(
    seed: int, size: int, homes: list[int], algorithm: Algorithm
) -> None:
    groups = random_groups(seed, groups=4)
    whole, figures = algorithm.prepare(groups)
    ranks = Ranks(size)
    mine = [[i for i, home in enumerate(homes) if home % size == r] for r in range(size)]

    def work(rank: int) -> tuple[list[TokenTargets], dict[str, float]]:
        return algorithm.prepare([groups[i] for i in mine[rank]], ranks.all_sum(rank))

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(work, range(size)))
    for rank, (targets, reported) in enumerate(results):
        assert reported == pytest.approx(figures, rel=1e-9, abs=1e-12)
        for i, target in zip(mine[rank], targets, strict=True):
            np.testing.assert_allclose(target.advantages, whole[i].advantages, atol=1e-6)


def value_batch(seed: int, clip_scale: float = 0.4) -> ValueBatch:
    g = torch.Generator().manual_seed(seed)
    old, noise, returns = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=g) < 0.7
    mask[2] = False
    counts = Counts(float(mask.sum()), 4.0, float(mask.any(1).sum()))
    values = (old + clip_scale * noise).requires_grad_()
    return ValueBatch(values, old, returns, mask, counts, budget=8)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("seed", range(3))
def test_value_loss_and_gradient_are_those_of_the_formula(
    seed: int, clip: float | None, how: str
) -> None:
    batch = value_batch(seed)
    c = slow.aggregation_weights(batch.mask.tolist(), how, batch.budget)
    loss, clipped = 0.0, 0
    grad = [[0.0] * 5 for _ in range(4)]
    for b, t in [(b, t) for b in range(4) for t in range(5) if batch.mask[b, t]]:
        v, old, r = (x[b, t].item() for x in (batch.values, batch.old, batch.returns))
        plain, slope = (v - r) ** 2, v - r
        if clip is not None:
            held = (old + min(max(v - old, -clip), clip) - r) ** 2
            if held > plain:
                plain, slope, clipped = held, 0.0, clipped + 1
        loss += 0.5 * c[b][t] * plain
        grad[b][t] = c[b][t] * slope
    terms = PPO(value_clip=clip, aggregation=how).value_loss(batch)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-9)
    assert batch.values.grad is not None
    torch.testing.assert_close(
        batch.values.grad, torch.tensor(grad, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    assert terms.sums["ppo/value_clip_fraction"][0].item() == clipped
    assert (clipped > 0) == (clip is not None)


def test_value_loss_shares_add_up_and_garbage_behind_the_mask_reaches_nothing() -> None:
    batch = value_batch(1)
    whole = PPO().value_loss(batch).loss.item()
    total = 0.0
    for rows in ([0, 2], [3], [1], []):
        part = {
            name: torch.where(batch.mask, getattr(batch, name).detach(), math.nan)[rows]
            for name in ("values", "old", "returns")
        }
        part["values"].requires_grad_()
        share = PPO().value_loss(dataclasses.replace(batch, mask=batch.mask[rows], **part))
        share.loss.backward()
        assert part["values"].grad is not None
        assert part["values"].grad.isfinite().all()
        total += share.loss.item()
    assert total == pytest.approx(whole, rel=1e-12)


def test_the_adaptive_weight_goes_to_the_next_step() -> None:
    algorithm = PPO(beta=0.1, kl_target=0.2, kl_horizon=100)
    after = algorithm.after_step({"kl/reference": 0.4}, completions=10)
    assert after.beta == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    assert after.kl_target == 0.2
    assert algorithm.beta == 0.1
    assert PPO(beta=0.1).after_step({}, completions=10).beta == 0.1
    assert algorithm.after_step({}, completions=10) == algorithm, "no token was trained"


@pytest.mark.parametrize("algorithm", [PPO(beta=0.1), GRPO(beta=0.1, kl_in="reward")])
def test_a_step_without_a_trained_token_has_no_mean_over_tokens(algorithm: Algorithm) -> None:
    groups = [
        dataclasses.replace(group, trained=(False,) * len(group.lengths))
        for group in random_groups(0)
    ]
    _, figures = algorithm.prepare(groups)
    assert figures.keys() <= {"ppo/beta"}


def test_a_resumed_run_keeps_the_adapted_weight_and_else_what_the_config_says() -> None:
    saved = PPO(beta=0.1, kl_target=0.2, clip_high=0.2).model_copy(update={"beta": 0.17})
    now = PPO(beta=0.1, kl_target=0.3, clip_high=0.5)
    assert now.carried_on(saved.model_dump(mode="json")) == PPO(
        beta=0.17, kl_target=0.3, clip_high=0.5
    )
    fixed = PPO(beta=0.4)
    assert fixed.carried_on(saved.model_dump(mode="json")) == fixed
    assert now.carried_on(fixed.model_dump(mode="json")) == now
    assert GRPO(beta=0.0).carried_on(GRPO(beta=0.1).model_dump(mode="json")).beta == 0.0


@pytest.mark.parametrize("completions", [50, 64, 1000])
def test_a_horizon_in_which_beta_could_reach_zero_is_refused(completions: int) -> None:
    with pytest.raises(ValueError, match="give more than"):
        PPO(kl_target=0.1, kl_horizon=0.2 * completions).check_run([], 10, completions)
    PPO(kl_target=0.1, kl_horizon=0.2 * completions + 0.1).check_run([], 10, completions)


def test_early_stop_names_the_figure_it_watches() -> None:
    assert PPO().early_stop is None
    assert PPO(max_update_kl=0.02).early_stop == ("kl/update", 0.02)
