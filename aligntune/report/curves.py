"""Which curves a report draws, in what order, and what is normal in each. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Curve:
    """One line: a metric of steps, or of evaluations where its name begins with `eval/`."""

    metric: str
    label: str
    part_of: str = ""  # the metric that it is shown as a share of


@dataclass(frozen=True)
class Chart:
    """One picture; curves that a run has not are left out of it."""

    title: str
    unit: str  # of the y axis; empty where there is none
    curves: tuple[Curve, ...]
    about: str = ""  # what it is, what is normal and what is wrong
    share: bool = False  # between 0 and 1
    number: int = 0  # of a figure that a user named; 0: the title is one of this file

    @property
    def id(self) -> str:
        """Its name in the page. Titles of this file differ in it; two of a user's may not."""
        if self.number:
            return f"figure-{self.number}"
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Part:
    """Charts under one heading."""

    title: str
    charts: tuple[Chart, ...]
    folded: bool = False

    @property
    def id(self) -> str:
        """Its name in the page."""
        return self.title.lower().replace(" ", "-")


def _chart(
    title: str, unit: str, curves: Iterable[tuple[str, str]], about: str = "", share: bool = False
) -> Chart:
    return Chart(title, unit, tuple(Curve(*curve) for curve in curves), about, share)


BOTH = (("reward/mean", "training"), ("eval/reward/mean", "held-out"))

LEARNING = (
    _chart(
        "Reward",
        "weighted sum",
        BOTH,
        "The weighted sum of all criteria. Held-out rises with training, later and less; training "
        "that rises while held-out falls is overfitting, or a reward that is being gamed.",
    ),
    _chart(
        "Spread of the reward",
        "reward",
        (("reward/std", "training"), ("eval/reward/std", "held-out")),
        "Standard deviation over completions. At 0 all score alike and there is nothing to learn "
        "from.",
    ),
    _chart(
        "Accuracy",
        "share",
        (("reward/accuracy", "training"), ("eval/reward/accuracy", "held-out")),
        "Share of pairs whose chosen side scores above the rejected one. 0.5 is a coin.",
        share=True,
    ),
    _chart(
        "Token accuracy",
        "share",
        (
            ("policy/token_accuracy", "training"),
            ("eval/policy/token_accuracy", "held-out"),
        ),
        "Share of trained tokens that the model finds likeliest, in supervised warm-up.",
        share=True,
    ),
    _chart(
        "Margin",
        "reward",
        (("reward/margin", "training"), ("eval/reward/margin", "held-out")),
        "Chosen minus rejected. It grows; held-out that turns down is overfitting.",
    ),
    _chart(
        "Chosen and rejected",
        "reward",
        (
            ("reward/chosen", "chosen"),
            ("reward/rejected", "rejected"),
            ("eval/reward/chosen", "chosen, held-out"),
            ("eval/reward/rejected", "rejected, held-out"),
        ),
        "In DPO both may fall; a chosen side that falls as fast as the rejected one learns little.",
    ),
    _chart(
        "KL to the reference",
        "nats per token",
        (("kl/reference", "KL"),),
        "How far the policy has gone from its start. A slow rise is normal; a jump, or a rise "
        "while the reward stands still, is not: lower the learning rate or raise beta.",
    ),
    _chart(
        "Entropy",
        "nats per token",
        (("policy/entropy", "entropy"), ("eval/policy/entropy", "held-out")),
        "How open the policy is. It falls slowly; near 0 every completion is the same and nothing "
        "more is found.",
    ),
    _chart(
        "Loss",
        "",
        (
            ("loss", "training"),
            ("loss/total", "total"),
            ("loss/policy", "policy"),
            ("loss/value", "value"),
            ("eval/loss/total", "held-out"),
            ("eval/loss", "held-out"),
        ),
        "In policy-gradient methods it need not fall: look at the reward. In preference jobs "
        "held-out loss falls.",
    ),
    _chart(
        "Gradient norm",
        "",
        (("policy/grad_norm", "policy"), ("critic/grad_norm", "critic")),
        "Before clipping. Single spikes are normal; a steady rise is the start of divergence.",
    ),
    _chart(
        "Clip fraction",
        "share of tokens",
        (
            ("policy/clip_fraction", "tokens"),
            ("gspo/sequence_clip_fraction", "completions"),
            ("ppo/value_clip_fraction", "values"),
        ),
        "Outside the clip window, where no gradient flows. Some per cent is normal; above 0.3 the "
        "steps are too large.",
        share=True,
    ),
    _chart(
        "Engine against trainer",
        "nats per token",
        (("kl/rollout_vs_policy", "rollout against policy"), ("kl/update", "by the update")),
        "Below 0.01 the engine samples what the trainer trains. Far above, at staleness 0, the two "
        "disagree: other precision, other weights, another template.",
    ),
    _chart(
        "Learning rate",
        "",
        (("policy/learning_rate", "policy"), ("critic/learning_rate", "critic")),
    ),
)

COMPLETIONS = (
    _chart(
        "Length",
        "tokens",
        (
            ("completions/length_mean", "mean"),
            ("completions/length_max", "longest"),
            ("eval/completions/length_mean", "mean, held-out"),
        ),
        "A slow rise is common in reasoning. A fall to a few tokens, or a climb to the limit, is "
        "mostly a reward that pays for it.",
    ),
    _chart(
        "Truncated",
        "share of completions",
        (
            ("completions/truncated_fraction", "training"),
            ("eval/completions/truncated_fraction", "held-out"),
        ),
        "Cut by a limit before they ended. Above 0.2 raise it: rollout.max_completion_length, or "
        "of episodes the one that finish_reason in samples.jsonl names.",
        share=True,
    ),
    _chart(
        "Constant groups",
        "share of groups",
        (("groups/constant_fraction", "constant"),),
        "Groups whose completions all score the same, which give no gradient. Above 0.8 the data "
        "is too easy or too hard for the model, or the reward too coarse.",
        share=True,
    ),
    _chart(
        "Groups",
        "groups",
        (
            ("groups/trained", "trained"),
            ("groups/filtered", "filtered"),
            ("groups/quarantined", "quarantined"),
        ),
        "How the groups of a step ended. A quarantined one failed too often: see the events.",
    ),
    _chart(
        "Turns",
        "turns",
        (("turns/mean", "mean"), ("turns/max", "most"), ("eval/turns/mean", "mean, held-out")),
        "Of the policy in an episode.",
    ),
    _chart(
        "Tools",
        "calls",
        (
            ("tools/calls", "made"),
            ("tools/failed", "failed"),
            ("tools/timed_out", "timed out"),
            ("tools/malformed", "malformed"),
        ),
        "Malformed calls fall first when a policy learns to use tools.",
    ),
)

STAGES = ("rollout", "reward", "reference", "prepare", "update", "weight_sync")

SPEED = (
    Chart(
        "Time per stage",
        "s",
        (
            Curve("time/step", "step"),
            *(Curve(f"time/{stage}", stage.replace("_", " ")) for stage in STAGES),
        ),
        "Wall time of a step with at least one such call running. Stages overlap where staleness "
        "is above 0, so they do not add up to the step.",
    ),
    _chart(
        "Time in tools",
        "s of an episode",
        (("time/tools", "mean"),),
        "In which the policy waits for tools and environment. Other episodes go on meanwhile.",
    ),
    Chart(
        "Idle",
        "share of the step",
        (
            Curve("time/idle_rollout", "engines", "time/step"),
            Curve("time/idle_policy", "trainer", "time/step"),
        ),
        "At staleness 0 each waits for the other. With staleness 1 the longer one should be near "
        "0; give its role more, or the other less.",
        share=True,
    ),
    _chart(
        "Throughput",
        "tokens per s",
        (("throughput/tokens_per_s", "of the step"), ("rollout/tokens_per_s", "in the engines")),
        "Sampled tokens.",
    ),
    _chart(
        "Staleness",
        "versions",
        (("staleness/mean", "mean"), ("staleness/max", "oldest")),
        "Age of each group's oldest token. It never passes train.max_staleness.",
    ),
    _chart(
        "Time of a group",
        "s",
        (("rollout/group_s_mean", "mean"), ("rollout/group_s_max", "longest")),
        "From a replica's taking it to its end. A longest far above the mean holds up the step.",
    ),
    _chart(
        "In the engines",
        "completions",
        (("rollout/running", "running"), ("rollout/queue", "waiting")),
        "A queue that never empties: more replicas would help. Few running: raise "
        "rollout.max_concurrent_groups.",
    ),
    _chart("Cache in use", "share", (("rollout/kv_cache_used", "of keys and values"),), share=True),
)

CRITERION = re.compile(r"(?:eval/)?reward/(.+)/mean")
ABOUT_CRITERION = "Unweighted mean over the completions that it scores."


def parts(metrics: Collection[str]) -> list[Part]:
    """The parts of a report over all these metrics; each metric is in one chart."""
    criteria = sorted({match[1] for name in metrics if (match := CRITERION.fullmatch(name))})
    numbers = itertools.count(1)
    of_criteria = tuple(
        _own(
            next(numbers),
            f"Reward: {name}",
            "score",
            ((f"reward/{name}/mean", "training"), (f"eval/reward/{name}/mean", "held-out")),
            ABOUT_CRITERION,
        )
        for name in criteria
    )
    learning = (LEARNING[0], *of_criteria, *LEARNING[1:])
    made = [
        Part(title, tuple(_present(charts, metrics)))
        for title, charts in (
            ("Learning", learning),
            ("Completions", COMPLETIONS),
            ("Speed", SPEED),
        )
    ]
    drawn = {c.metric for part in made for chart in part.charts for c in chart.curves}
    rest = tuple(
        _own(next(numbers), name, "", ((name, name),)) for name in sorted({*metrics} - drawn)
    )
    return [part for part in (*made, Part("Everything else", rest, folded=True)) if part.charts]


def _own(
    number: int, title: str, unit: str, curves: Iterable[tuple[str, str]], about: str = ""
) -> Chart:
    """A picture of figures that a user named."""
    return replace(_chart(title, unit, curves, about), number=number)


def _present(charts: Sequence[Chart], metrics: Collection[str]) -> Iterator[Chart]:
    for chart in charts:
        curves = tuple(c for c in chart.curves if c.metric in metrics)
        if curves:
            yield replace(chart, curves=curves)
