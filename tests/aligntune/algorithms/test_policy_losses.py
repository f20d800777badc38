"""Every policy loss, its gradients and its figures against the slow reference, to 1e-9."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch

from actors.messages import Counts, TokenBatch
from aligntune.algorithms import losses
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO

from . import slow
from .batches import BUDGET, as_lists, counts_of, figures, random_batch

EXACT = {"rtol": 1e-9, "atol": 1e-9}

CASES: dict[str, tuple[Algorithm, slow.Options]] = {
    "ppo": (PPO(correction="none"), slow.Options()),
    "ppo, kl in loss": (
        PPO(correction="none", kl_in="loss", kl_estimator="k3", beta=0.2),
        slow.Options(beta=0.2, estimator="k3"),
    ),
    "grpo": (GRPO(), slow.Options(how="sequence_mean", beta=0.04, correction="token")),
    "grpo, k2": (
        GRPO(kl_estimator="k2", beta=0.3, correction="sequence"),
        slow.Options(how="sequence_mean", beta=0.3, estimator="k2", correction="sequence"),
    ),
    "grpo, dual clip": (
        GRPO(dual_clip=1.5, beta=0, correction="icepop"),
        slow.Options(how="sequence_mean", dual=1.5, correction="icepop"),
    ),
    "grpo, dual clip inside the window": (
        GRPO(dual_clip=1.05, beta=0, correction="none"),
        slow.Options(how="sequence_mean", dual=1.05),
    ),
    "grpo, entropy": (
        GRPO(entropy_coefficient=0.1, aggregation="token_mean", correction_cap=1.2),
        slow.Options(beta=0.04, entropy=0.1, correction="token", cap=1.2),
    ),
    "grpo, old is the rollout": (
        GRPO(old="rollout"),
        slow.Options(how="sequence_mean", beta=0.04, old_is_rollout=True),
    ),
    "dr_grpo": (DrGRPO(), slow.Options(how="constant", correction="token")),
    "dr_grpo, entropy and kl": (
        DrGRPO(beta=0.1, entropy_coefficient=0.2, correction="none"),
        slow.Options(how="constant", beta=0.1, entropy=0.2),
    ),
    "dapo": (DAPO(), slow.Options(high=0.28, correction="token")),
    "gspo": (
        GSPO(),
        slow.Options(
            how="sequence_mean", low=3e-4, high=4e-4, level="sequence", correction="token"
        ),
    ),
    "gspo, wide window, dual clip": (
        GSPO(clip_low=0.1, clip_high=0.1, dual_clip=1.15, correction="sequence", beta=0.1),
        slow.Options(
            how="sequence_mean", low=0.1, high=0.1, dual=1.15, level="sequence",
            correction="sequence", beta=0.1,
        ),
    ),
    "gspo, token": (
        GSPO(importance="token", clip_low=0.1, clip_high=0.1, correction="token"),
        slow.Options(
            how="sequence_mean", low=0.1, high=0.1, level="sequence_token", correction="token"
        ),
    ),
    "grpo, sequence weights, low cap": (
        GRPO(beta=0, correction="sequence", correction_cap=1.2),
        slow.Options(how="sequence_mean", correction="sequence", cap=1.2),
    ),
    "grpo, icepop, low cap": (
        GRPO(beta=0, correction="icepop", correction_cap=1.2),
        slow.Options(how="sequence_mean", correction="icepop", cap=1.2),
    ),
    "gspo, token mean": (
        GSPO(aggregation="token_mean", clip_low=0.1, clip_high=0.1),
        slow.Options(low=0.1, high=0.1, level="sequence", correction="token"),
    ),
}  # fmt: skip


def gradients(algorithm: Algorithm, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """With respect to log-probs and entropy."""
    loss = algorithm.loss(batch).loss
    inputs = (batch.logp, batch.entropy)
    found = torch.autograd.grad(loss, inputs, allow_unused=True)  # type: ignore[arg-type]
    return tuple(torch.zeros_like(batch.logp) if g is None else g for g in found)  # type: ignore


@pytest.fixture(params=CASES, ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Algorithm, slow.Options]:
    return CASES[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("drift", [0.4, 1e-3])
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_gradients_and_figures_are_those_of_the_formulas(
    case: tuple[Algorithm, slow.Options], seed: int, drift: float, per_token: bool
) -> None:
    algorithm, options = case
    batch = random_batch(seed, drift=drift, per_token_advantages=per_token)
    expected = slow.policy_loss(as_lists(batch), options)

    terms = algorithm.loss(batch)
    grad_logp, grad_entropy = gradients(algorithm, batch)

    assert terms.loss.dtype == torch.float64
    assert terms.loss.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(
        grad_logp, torch.tensor(expected.grad_logp, dtype=torch.float64), **EXACT
    )
    torch.testing.assert_close(
        grad_entropy, torch.tensor(expected.grad_entropy, dtype=torch.float64), **EXACT
    )
    reported = figures([terms], batch.counts)
    assert reported.pop("policy/ratio_max") == pytest.approx(expected.ratio_max, rel=1e-9)
    assert reported == pytest.approx(
        {name: expected.means[name] for name in reported}, rel=1e-9, abs=1e-9
    )


def test_the_random_batches_reach_every_branch() -> None:
    """Or agreement above would say little: both clip sides bind, and dual clip, and icepop."""
    seen = set()
    for seed in range(4):
        x = as_lists(random_batch(seed))
        for b, t in [(b, t) for b, row in enumerate(x.mask) for t, m in enumerate(row) if m]:
            r, a = math.exp(x.logp[b][t] - x.old[b][t]), x.advantages[b][t]
            sign = (a > 0) - (a < 0)
            seen.add((sign, "high" if r > 1.2 else "low" if r < 0.8 else "inside"))
            q = math.exp(x.old[b][t] - x.roll[b][t])
            seen.add("over" if q > 2 else "under" if q < 0.5 else "kept")
            if a < 0 and r > 1.5:
                seen.add("dual")
    sides = {(s, w) for s in (-1, 0, 1) for w in ("low", "inside", "high")}
    assert seen >= {*sides, "over", "under", "kept", "dual"}


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", [n for n in CASES if n != "gspo, token"])  # it stops a gradient
def test_gradients_pass_gradcheck(name: str, per_token: bool) -> None:
    algorithm, _ = CASES[name]
    batch = random_batch(11, rows=4, width=5, per_token_advantages=per_token)

    def loss(logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return algorithm.loss(dataclasses.replace(batch, logp=logp, entropy=entropy)).loss

    assert torch.autograd.gradcheck(loss, (batch.logp, batch.entropy), eps=1e-7, atol=1e-6)


def test_grpo_by_hand() -> None:
    """Two rewards 1 and 0; one token of ratio 3/2 clipped at 1.2, one of 1/2 clipped at 0.8."""
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    advantages = torch.stack(
        GRPO().sequence_advantages([torch.tensor([[1.0], [0.0]])], torch.ones(1))
    )
    assert advantages.tolist() == [[pytest.approx(a, abs=1e-15), pytest.approx(-a, abs=1e-15)]]

    old = torch.tensor([[-1.0, -2.0], [-1.0, -3.0]], dtype=torch.float64)
    r = torch.tensor([[1.5, 0.5], [0.5, 99.0]], dtype=torch.float64)
    logp = (old + r.log()).requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    ref = logp.detach() - torch.tensor([[math.log(2), 0.0], [0.0, 0.0]], dtype=torch.float64)
    batch = TokenBatch(
        logp=logp, old=old, roll=old, mask=mask, ref=ref, budget=8,
        advantages=advantages[0][:, None].expand(2, 2), counts=counts_of(mask),
    )  # fmt: skip
    k3 = 0.5 - 1 + math.log(2)  # of the one token that is twice as likely as under the reference
    by_hand = 0.5 * (-(1.2 * a + 0.5 * a) / 2 + 0.8 * a) + 0.04 * 0.5 * (k3 / 2)

    loss = GRPO().loss(batch).loss
    assert loss.item() == pytest.approx(by_hand, abs=1e-12)
    loss.backward()
    assert logp.grad is not None
    # clipped tokens keep only their KL; the masked one has nothing
    assert logp.grad.tolist() == [
        [pytest.approx(0.04 / 4 * 0.5, abs=1e-12), pytest.approx(-0.5 * a / 4, abs=1e-12)],
        [pytest.approx(0.0, abs=1e-12), 0.0],
    ]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("edge", [0.75, 1.25])
def test_gradient_flows_on_the_edge_and_not_one_step_beyond(sign: float, edge: float) -> None:
    at = torch.tensor([[math.log(edge)]], dtype=torch.float64)
    low = high = 0.25
    exact = at.exp().item()
    if edge < 1:
        low = 1.0 - exact
        beyond = at - 1e-12
        assert 1.0 - low == exact
    else:
        high = exact - 1.0
        beyond = at + 1e-12
        assert 1.0 + high == exact
    a = torch.full((1, 1), sign, dtype=torch.float64)
    valid = torch.ones(1, 1, dtype=torch.bool)

    slopes = []
    for log_ratio in (at, beyond):
        leaf = log_ratio.clone().requires_grad_()
        ell, _ = losses.clipped_surrogate(leaf, a, valid, low, high)
        ell.sum().backward()
        assert leaf.grad is not None
        slopes.append(leaf.grad.item())
    clips_here = (sign > 0) == (edge > 1)
    assert slopes[0] == pytest.approx(-sign * edge, abs=1e-12)
    assert slopes[1] == pytest.approx(0.0 if clips_here else -sign * edge, abs=1e-11)


@pytest.mark.parametrize("algorithm", [PPO(), GRPO(), DrGRPO(beta=0.1), DAPO(), GSPO(beta=0.1)])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e4, -1e4])
def test_what_stands_at_masked_positions_reaches_nothing(
    algorithm: Algorithm, garbage: float
) -> None:
    algorithm = algorithm.model_copy(update={"entropy_coefficient": 0.1})
    clean = random_batch(5)
    fields = ("logp", "old", "roll", "ref", "entropy", "advantages")
    spoiled = {
        name: torch.where(clean.mask, getattr(clean, name).detach(), garbage) for name in fields
    }
    for leaf in ("logp", "entropy"):
        spoiled[leaf].requires_grad_()
    dirty = dataclasses.replace(clean, **spoiled)

    assert algorithm.loss(dirty).loss.item() == algorithm.loss(clean).loss.item()
    assert figures([algorithm.loss(dirty)], clean.counts) == figures(
        [algorithm.loss(clean)], clean.counts
    )
    for got, wanted in zip(gradients(algorithm, dirty), gradients(algorithm, clean), strict=True):
        assert torch.equal(got, wanted)
        assert (got[~clean.mask] == 0).all()


@pytest.mark.parametrize("algorithm", [PPO(), GRPO(), DrGRPO(), DAPO(), GSPO()])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_share_without_a_trained_token_is_zero(algorithm: Algorithm, rows: int) -> None:
    x = torch.full((rows, 4), -1.0, dtype=torch.float64)
    logp = x.clone().requires_grad_()
    batch = TokenBatch(
        logp=logp, old=x, roll=x, ref=x, entropy=x, advantages=x,
        mask=torch.zeros(rows, 4, dtype=torch.bool), counts=Counts(0, rows, 0), budget=4,
    )  # fmt: skip
    terms = algorithm.loss(batch)
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert set(figures([terms], batch.counts).values()) == {0.0}


@pytest.mark.parametrize("a", [1.0, 0.0])
def test_a_ratio_that_overflows_beyond_the_clip_leaves_zero_gradient(a: float) -> None:
    leaf = torch.tensor([[200.0]], requires_grad=True)  # exp overflows float32
    ell, _ = losses.clipped_surrogate(
        leaf, torch.full((1, 1), a), torch.ones(1, 1, dtype=torch.bool), 0.2, 0.2
    )
    ell.sum().backward()
    assert ell.item() == pytest.approx(-1.2 * a)
    assert leaf.grad is not None
    assert leaf.grad.item() == 0.0


def token_batch(logp: list[float], old: list[float], roll: list[float], a: float) -> TokenBatch:
    """One completion in float32, on its own a whole step."""

    def row(values: list[float]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.float32)

    n = len(logp)
    return TokenBatch(
        logp=row(logp).requires_grad_(), old=row(old), roll=row(roll), advantages=row([a] * n),
        mask=torch.ones(1, n, dtype=torch.bool), counts=Counts(n, 1, 1), budget=n,
        ref=row(logp), entropy=row([0.5] * n),
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", [PPO, GRPO, DrGRPO, DAPO])
def test_a_token_dropped_with_weight_zero_is_dropped_whatever_its_ratio(
    algorithm: type[Algorithm],
) -> None:
    """Its ratio is exp(89), which overflows float32: 0 * inf would be NaN."""
    batch = token_batch([-1.0, -1.0], [-90.0, -1.0], [-1.0, -1.0], a=-1.0)
    dropping = algorithm(correction="icepop", beta=0, aggregation="token_mean")  # type: ignore[call-arg]
    terms = dropping.loss(batch)
    terms.loss.backward()
    assert terms.loss.item() == 0.5
    assert batch.logp.grad is not None
    assert batch.logp.grad.tolist() == [[0.0, 0.5]]
    assert all(math.isfinite(x) for x in figures([terms], batch.counts).values())


@pytest.mark.parametrize("importance", ["sequence", "token"])
def test_a_sequence_of_dropped_tokens_is_dropped_by_gspo(importance: str) -> None:
    batch = token_batch([-1.0, -1.0], [-99.0, -99.0], [-1.0, -1.0], a=-1.0)
    terms = GSPO(correction="icepop", importance=importance).loss(batch)  # type: ignore[arg-type]
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert batch.logp.grad is not None
    assert batch.logp.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_a_weight_that_underflows_drops_its_tokens(correction: str) -> None:
    batch = token_batch([-1.0], [-200.0], [-1.0], a=-1.0)
    terms = GRPO(correction=correction, beta=0).loss(batch)  # type: ignore[arg-type]
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert batch.logp.grad is not None
    assert batch.logp.grad.item() == 0.0


@pytest.mark.parametrize("algorithm", [PPO, GRPO, DrGRPO, DAPO, GSPO])
def test_figures_of_a_step_that_clips_do_not_overflow(algorithm: type[Algorithm]) -> None:
    """exp(87) fits into float32, its sum over 8 tokens does not, nor does exp(100) at all."""
    for drift in (87.0, 100.0):
        batch = token_batch([-1.0] * 8, [-1.0 - drift] * 8, [-1.0 - drift] * 8, a=1.0)
        shown = figures([algorithm(beta=0).loss(batch)], batch.counts)  # type: ignore[call-arg]
        assert shown["kl/update"] == pytest.approx(math.exp(drift) - 1 - drift, rel=1e-6)
        assert shown["policy/ratio_max"] == pytest.approx(math.exp(drift), rel=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_pulls_towards_the_reference(estimator: str) -> None:
    """The expected gradient over pi itself; that of k1, (0, 0, 0), is why it is refused."""
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    pi = logits.softmax(0).detach()
    expected = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        logp = logits.log_softmax(0)[token].reshape(1, 1)
        row = logp.detach()
        batch = TokenBatch(
            logp=logp, old=row, roll=row, ref=reference[token].reshape(1, 1),
            advantages=torch.zeros(1, 1, dtype=torch.float64), entropy=None,
            mask=torch.ones(1, 1, dtype=torch.bool), counts=Counts(1, 1, 1), budget=1,
        )  # fmt: skip
        algorithm = PPO(kl_in="loss", kl_estimator=estimator, beta=1.0)  # type: ignore[arg-type]
        expected += pi[token] * torch.autograd.grad(algorithm.loss(batch).loss, logits)[0]
    if estimator == "k2":  # its expected gradient is that of KL(pi || ref)
        assert expected.tolist() == pytest.approx([0.278, 0.014, -0.292], abs=1e-3)
    assert expected[0] > 0 > expected[2]


@pytest.mark.parametrize("algorithm", [PPO(), GRPO(), DrGRPO(), DAPO(), GSPO()])
def test_half_precision_is_widened_before_the_difference(algorithm: Algorithm) -> None:
    half = random_batch(3, dtype=torch.bfloat16)
    fields = ("logp", "old", "roll", "ref", "entropy", "advantages")
    full = dataclasses.replace(half, **{n: getattr(half, n).detach().double() for n in fields})
    got, wanted = algorithm.loss(half).loss, algorithm.loss(full).loss
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)


def test_advantages_and_every_other_input_are_detached() -> None:
    batch = random_batch(2)
    others = {
        name: getattr(batch, name).detach().clone().requires_grad_()
        for name in ("old", "roll", "ref", "advantages")
    }
    GRPO().loss(dataclasses.replace(batch, **others)).loss.backward()
    assert batch.logp.grad is not None
    assert all(x.grad is None for x in others.values())


def test_figures_carry_no_graph() -> None:
    for algorithm in (
        PPO(kl_in="loss", kl_estimator="k2"),
        GRPO(entropy_coefficient=0.1),
        GSPO(beta=0.1),
    ):
        terms = algorithm.loss(random_batch(1))
        assert not any(x.requires_grad for x, _ in terms.sums.values())
        assert not any(x.requires_grad for x in terms.maxima.values())


def test_a_kl_or_entropy_term_without_its_input_is_an_error() -> None:
    batch = random_batch(0)
    with pytest.raises(ValueError, match="reference"):
        GRPO().loss(dataclasses.replace(batch, ref=None))
    with pytest.raises(ValueError, match="entropy"):
        GRPO(entropy_coefficient=0.1).loss(dataclasses.replace(batch, entropy=None))


def test_a_kl_in_the_reward_is_not_charged_in_the_loss_too() -> None:
    batch = random_batch(0)
    charged = GRPO(beta=5.0, kl_in="reward").loss(batch)
    assert charged.loss.item() == GRPO(beta=0.0).loss(batch).loss.item()
    assert "kl/reference" not in charged.sums


def test_the_constant_normaliser_is_the_budget_not_the_padded_width() -> None:
    batch = random_batch(0, width=5)
    assert batch.budget == BUDGET != 5
    twice = dataclasses.replace(batch, budget=2 * BUDGET)
    assert DrGRPO().loss(twice).loss.item() == pytest.approx(DrGRPO().loss(batch).loss.item() / 2)


@pytest.mark.parametrize(
    ("q", "kept"), [(2.0, 2.0), (0.5, 0.5), (2.0 + 1e-12, 0.0), (0.5 - 1e-12, 0.0)]
)
def test_icepop_keeps_the_edges_of_its_window(q: float, kept: float) -> None:
    old = torch.tensor([[math.log(q)]], dtype=torch.float64)
    at, mask = old.exp().item(), torch.ones(1, 1, dtype=torch.bool)
    cap = at if q > 1 else 1.0 / at  # the window's edge is where the ratio really lies
    cap = cap if kept else 2.0
    weights = losses.rollout_weights(old, torch.zeros_like(old), mask, "icepop", cap)
    assert weights.item() == pytest.approx(kept, abs=1e-12)


def test_gspo_token_has_the_very_ratio_of_its_sequence_in_float32() -> None:
    """Else tokens of one sequence could fall on both sides of a window of 3e-4."""
    batch = random_batch(0, drift=5.0, dtype=torch.float32)
    token = GSPO(importance="token", correction="none").loss(batch)
    sequence = GSPO(correction="none").loss(batch)
    assert token.loss.item() == sequence.loss.item()
    assert token.sums["gspo/sequence_clip_fraction"] == sequence.sums["gspo/sequence_clip_fraction"]


def test_the_gspo_window_survives_float32() -> None:
    """A mean log-ratio of 3.5e-4 lies inside [1 - 3e-4, 1 + 4e-4], one of 4.5e-4 outside."""
    width = 512
    for shift, fraction in ((3.5e-4, 0.0), (4.5e-4, 1.0)):
        old = torch.full((1, width), -1.5)
        mask = torch.ones(1, width, dtype=torch.bool)
        batch = TokenBatch(
            logp=(old + shift).requires_grad_(), old=old, roll=old, mask=mask,
            advantages=torch.ones(1, width), counts=counts_of(mask), budget=width,
        )  # fmt: skip
        terms = GSPO().loss(batch)
        assert figures([terms], batch.counts)["gspo/sequence_clip_fraction"] == fraction


def test_a_loss_can_be_sent_to_another_process() -> None:
    batch = random_batch(0)
    for algorithm, _ in CASES.values():
        sent = pickle.loads(pickle.dumps(algorithm.loss))
        assert sent(batch).loss.item() == algorithm.loss(batch).loss.item()
