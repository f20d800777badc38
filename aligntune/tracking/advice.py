"""What a run's figures say is going wrong, and what to try. Pure.

Each trouble is seen over several steps, never in one; thresholds are for per-token figures of
language models, and err on the side of silence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from aligntune.tracking.metrics import mean

Row = Mapping[str, float]

RECENT = 5  # steps that a trouble must last
STILL = 20  # steps after which something should have moved
AGAIN = 50  # steps after which a trouble that lasts is told again

CONSTANT = 0.9  # share of groups
TRUNCATED = 0.2  # share of completions
ENTROPY = 0.05  # nats per token
ENTROPY_FALL = 0.2  # of what it was at first
KL = 1.0  # nats per token, from the starting model
DISAGREE = 0.05  # nats per token, engine against trainer
MOVED = 1e-7  # nats per token

CONTRAST = (
    "where all fail, take easier prompts or a reward that gives parts of a point; where all "
    "succeed, harder prompts. Try train.completions_per_group higher, rollout.temperature higher, "
    "or algorithm=dapo, which draws other prompts"
)
"""What to try where the completions of a group have one reward."""
THINKS = (
    "this model thinks before it answers, and "
    "'model.chat_template_kwargs={enable_thinking: false}' switches that off"
)
"""What else helps a run whose model does, where thoughts take the tokens of a completion."""


def troubles(rows: Sequence[Row]) -> dict[str, str]:
    """What is wrong in the last rows of `metrics.jsonl`, by a short name: a sentence that says what
    is seen and what to try. `rows` are all steps so far, or at least the first and last ones."""
    found = {name: check(rows) for name, check in CHECKS.items()} if len(rows) >= RECENT else {}
    return {name: said for name, said in found.items() if said}


class Adviser:
    """Tells each trouble of a run as it comes, and again where it lasts."""

    def __init__(self, before: Iterable[tuple[int, Row]] = ()) -> None:
        """`before` are the steps of earlier starts and their figures, ascending; at least the first
        `RECENT` and the last `STILL`."""
        self._first: list[tuple[int, Row]] = []
        self._last: deque[tuple[int, Row]] = deque(maxlen=STILL)
        self._told: dict[str, int] = {}  # by trouble, the step at which it was told
        for step, figures in before:
            self._remember(step, figures)

    def hear(self, step: int, figures: Row) -> dict[str, str]:
        """What is to be told after `step`, by a short name."""
        self._remember(step, figures)
        if len(self._last) < RECENT:  # after a rollback, those of before are long ago
            return {}
        first = [row for known, row in self._first if known < self._last[0][0]]
        new = {}
        for name, said in troubles([*first, *(row for _, row in self._last)]).items():
            if name not in self._told or step - self._told[name] >= AGAIN:
                self._told[name] = step
                new[name] = said
        return new

    def back_to(self, step: int) -> None:
        """Forget the steps after `step`, and what was told of them: they come again."""
        self._first = [each for each in self._first if each[0] <= step]
        self._last = deque((each for each in self._last if each[0] <= step), STILL)
        self._told = {name: told for name, told in self._told.items() if told <= step}

    def _remember(self, step: int, figures: Row) -> None:
        if len(self._first) < RECENT:
            self._first.append((step, figures))
        self._last.append((step, figures))


def _recent(rows: Sequence[Row], name: str) -> list[float]:
    """A figure in each of the last rows; nothing where one of them is without."""
    values = [row[name] for row in rows[-RECENT:] if name in row]
    return values if len(values) == RECENT else []


def _of_a_table(rows: Sequence[Row]) -> bool:
    """Whether these are steps of a job over a table, which rolls nothing out."""
    return any("loss" in row and "loss/total" not in row for row in rows)


def _constant(rows: Sequence[Row]) -> str:
    shares = _recent(rows, "groups/constant_fraction")
    if not shares or min(shares) < CONSTANT:
        return ""
    return (
        f"{mean(shares):.0%} of the groups had one reward for all their completions in "
        f"the last {RECENT} steps, and such a group teaches nothing. Look at samples.jsonl: "
        f"{CONTRAST}"
    )


def _all_constant(rows: Sequence[Row]) -> bool:
    """Whether no group of these steps had two rewards: whatever the learning rate, none teaches."""
    shares = [row.get("groups/constant_fraction", 0.0) for row in rows]
    return bool(shares) and min(shares) == 1.0


def _truncated(rows: Sequence[Row]) -> str:
    shares = _recent(rows, "completions/truncated_fraction")
    if not shares or min(shares) <= TRUNCATED:
        return ""
    if any("turns/mean" in row for row in rows[-RECENT:]):
        return (
            f"{mean(shares):.0%} of the episodes were cut at a limit, and are judged without their "
            "end. finish_reason in samples.jsonl says which limits. Try a higher one: "
            "episodes.max_turns or episodes.max_tool_calls for `turns`, "
            "rollout.max_completion_length for `length`, episodes.max_tokens for `context`, "
            "episodes.episode_timeout_s for `time`"
        )
    return (
        f"{mean(shares):.0%} of the completions were cut at their limit, and are "
        "judged without their end. Try rollout.max_completion_length higher, or a reward that "
        "prefers short answers (`length`)"
    )


def _entropy(rows: Sequence[Row]) -> str:
    if _of_a_table(rows[-RECENT:]):
        return ""  # to be sure of the answers is the aim there
    name = "policy/entropy"
    first = [row[name] for row in rows[:RECENT] if name in row]
    last = _recent(rows, name)
    if not last or not first or len(rows) < 2 * RECENT:
        return ""
    before, now = mean(first), mean(last)
    if now >= ENTROPY or now >= ENTROPY_FALL * before:
        return ""
    return (
        f"the entropy fell from {before:.3f} to {now:.3f} nats per token: the model says nearly "
        "the same each time, and finds little that is new. Try policy.learning_rate lower, "
        "algorithm.beta higher, or an earlier checkpoint (--resume)"
    )


def _kl(rows: Sequence[Row]) -> str:
    values = _recent(rows, "kl/reference")
    if not values or min(values) < KL or values[-1] < values[0]:
        return ""
    return (
        f"the policy is {values[-1]:.2f} nats per token from its starting model and moves on: it "
        "may be exploiting the reward, or falling apart. Read samples.jsonl. Try "
        "policy.learning_rate lower, algorithm.beta higher, or an earlier checkpoint (--resume)"
    )


def _disagree(rows: Sequence[Row]) -> str:
    values = _recent(rows, "kl/rollout_vs_policy")
    if not values or min(values) < DISAGREE or _age(rows) > 0:
        return ""  # older weights are bound to differ
    apart = mean(values)
    return (
        f"engine and trainer give the same tokens log-probs that are {apart:.3f} nats per token "
        "apart: what is trained is not what was sampled. Try model.dtype=float32, or "
        "rollout.engine=transformers to see whether the engine is the cause"
    )


def _age(rows: Sequence[Row]) -> float:
    return max((row.get("staleness/max", 0.0) for row in rows[-RECENT:]), default=0.0)


def _still(rows: Sequence[Row]) -> str:
    if len(rows) < STILL:
        return ""
    margins = [abs(row["reward/margin"]) for row in rows[-STILL:] if "reward/margin" in row]
    moved = [row["kl/reference"] for row in rows[-STILL:] if "kl/reference" in row]
    grad = [row["policy/grad_norm"] for row in rows[-STILL:] if "policy/grad_norm" in row]
    table = _of_a_table(rows[-STILL:])
    idle = len(grad) == STILL and max(grad) == 0.0
    if not (
        idle
        or (table and margins and max(margins) < 1e-4)
        or (moved and max(map(abs, moved)) < MOVED)
    ):
        return ""
    if _all_constant(rows[-STILL:]):
        return (
            f"nothing has moved in {STILL} steps, for no group had two different rewards: "
            f"{CONTRAST}"
        )
    key = "train.learning_rate" if table else "policy.learning_rate"
    compared = any("groups/constant_fraction" in row for row in rows[-STILL:])
    groups = ", and see that the rewards of a group differ" if compared else ""
    return (
        f"nothing has moved in {STILL} steps: the model is what it was. Try {key} higher (full "
        f"fine-tuning takes about 1e-6, LoRA 1e-5 to 1e-4, tiny models more){groups}"
    )


CHECKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "constant": _constant,
    "truncated": _truncated,
    "entropy": _entropy,
    "kl": _kl,
    "disagree": _disagree,
    "still": _still,
}


def unmoved(before: Row, after: Row, steps: Sequence[Row]) -> str:
    """What to try where every figure of a run's last evaluation is that of one before training: one
    mean may be equal by chance.

    `steps` are the rows of `metrics.jsonl`; they say whether the rewards are the cause.
    """
    if before["step"] != 0 or _held_out(before) != _held_out(after):
        return ""
    same = "each held-out figure is exactly what it was before training"
    if _all_constant(steps):
        return f"{same}: in no step had a group two different rewards; {CONTRAST}"
    return f"{same}: try more steps, or a higher learning rate"


def _held_out(row: Row) -> dict[str, float]:
    """What an evaluation says of the model: not how long it took, nor what was trained."""
    return {
        name: value
        for name, value in row.items()
        if name.startswith("eval/") and not name.startswith(("eval/time/", "eval/tokens"))
    }
