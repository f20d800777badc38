"""A run in words and a few numbers: what it was, how it ended, what it changed. Pure but for the
reading of files."""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aligntune.report.curves import STAGES
from aligntune.runs.measure import comparable
from aligntune.runs.reading import RunOnDisk
from aligntune.tracking.metrics import EventKind, mean

Row = Mapping[str, Any]

LOWER_IS_BETTER = ("eval/loss", "eval/loss/total", "eval/reward/rejected")
LESSONS = (
    "eval/reward/",
    "eval/loss",
    "eval/policy/token_accuracy",
    "eval/completions/length_mean",
)
"""What is told of the evaluations, by the beginning of its name."""


MAIN = {
    "eval/reward/mean": "Held-out reward",
    "eval/reward/accuracy": "Held-out accuracy",
    "eval/policy/token_accuracy": "Held-out token accuracy",
}
"""The figure that says whether a run has learned, and what people call it."""


@dataclass(frozen=True)
class Change:
    """A figure of the first and of the last evaluation."""

    name: str
    before: float
    after: float
    best: float
    best_step: int

    @property
    def label(self) -> str:
        """Its name for people."""
        if self.name.endswith("/length_mean"):
            return "length, tokens"
        plain = self.name.removeprefix("eval/").removeprefix("policy/").removesuffix("/mean")
        short = plain.removeprefix("reward/")
        return plain if short == "reward" else short  # one that is called as the sum of all

    @property
    def has_best(self) -> bool:
        """Whether more of it, or less, is better."""
        return not self.name.startswith("eval/completions/")

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class Stage:
    """A stage's time over the whole run."""

    name: str
    seconds: float
    share: float  # of the steps' time


@dataclass(frozen=True)
class Headline:
    """A number that is shown large."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Summary:
    """What stands at the top of a report."""

    state: str
    sentences: tuple[str, ...]
    headlines: tuple[Headline, ...]
    warnings: tuple[str, ...]  # that the run gave, the last of each kind
    changes: tuple[Change, ...]
    stages: tuple[Stage, ...]


def summary(run: RunOnDisk) -> Summary:
    """The whole of it."""
    changes = evaluated(comparable(run.evals), tuple(_penalties(run)))
    sentences = [_where_it_stands(run), _learned(run, changes), _work(run), _time(run)]
    return Summary(
        state=run.ending.state,
        sentences=tuple(sentence for sentence in sentences if sentence),
        headlines=tuple(_headlines(run, changes)),
        warnings=tuple(_warnings(run.events)),
        changes=tuple(changes),
        stages=tuple(stages(run.metrics)),
    )


def _headlines(run: RunOnDisk, changes: Sequence[Change]) -> Iterator[Headline]:
    main = next((change for change in changes if change.name in MAIN), None)
    if main is not None:
        value = f"{main.before:.3f} → {main.after:.3f}"
        yield Headline(MAIN[main.name], value, f"{main.change:+.3f}")
    total = planned(run)
    done = last_step(run)
    yield Headline("Steps", f"{done:,}", f"of {total:,}" if total and total != done else "")
    seconds = [row["time/step"] for row in run.metrics if "time/step" in row]
    if seconds:
        yield Headline("Time of a step", duration(statistics.median(seconds)), "median")
    tokens = [r["throughput/tokens_per_s"] for r in run.metrics if "throughput/tokens_per_s" in r]
    if tokens:
        yield Headline("Tokens", f"{statistics.median(tokens):,.0f}", "per s, median")


def _warnings(events: Sequence[Row]) -> list[str]:
    """What the run said is wrong, and what to try: the last word on each trouble."""
    told = {
        str(event.get("name", "")): f"Step {event.get('step', 0):,}: {event.get('advice', '')}"
        for event in events
        if event["kind"] == EventKind.TROUBLE
    }
    return list(told.values())


def last_step(run: RunOnDisk) -> int:
    """The last step with figures; 0 where there is none."""
    return max((int(row["step"]) for row in run.metrics), default=0)


def planned(run: RunOnDisk) -> int | None:
    """The steps that it is to make, where config.yaml says so."""
    train = run.config.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


def _where_it_stands(run: RunOnDisk) -> str:
    step, total, ending = last_step(run), planned(run), run.ending
    of = f" of {total:,}" if total else ""
    match ending.state:
        case "finished":
            return f"The run finished after {step:,} step{'' if step == 1 else 's'}."
        case "running":
            return f"The run is going on: step {step:,}{of} is done."
        case "stopped":
            return f"The run stopped after step {step:,}{of}: {ending.reason.rstrip('.')}."
        case _:
            return (
                f"The run ended without a word after step {step:,}{of}: its process was killed, or "
                "its machine was lost."
            )


def _penalties(run: RunOnDisk) -> Iterator[str]:
    """The held-out figures of rewards with a weight below 0."""
    for reward in run.config.get("rewards") or ():
        weight = reward.get("weight") if isinstance(reward, Mapping) else None
        if isinstance(weight, int | float) and weight < 0:
            yield f"eval/reward/{_criterion(reward)}/mean"


def _criterion(reward: Mapping[str, Any]) -> str:
    """What a reward is called in figures, by its entry of config.yaml."""
    if reward.get("name"):
        return str(reward["name"])
    if url := reward.get("url"):
        return urlsplit(str(url)).hostname or str(url)
    if model := reward.get("model"):
        return os.path.basename(os.path.normpath(str(model)))
    return str(reward.get("function", "")).rpartition(":")[2]


def evaluated(evals: Sequence[Row], lower: Collection[str] = ()) -> list[Change]:
    """What changed from the first evaluation to the last; nothing with fewer than two. Of a figure
    of `lower`, beside losses, the lowest is the best."""
    told = sorted({name for row in evals for name in row if name.startswith(LESSONS)})
    told.sort(key=lambda name: (name not in MAIN, not name.startswith("eval/reward/")))
    changes = []
    for name in told:
        rows = [row for row in evals if isinstance(row.get(name), int | float)]
        if len(rows) < 2 or name.endswith("/std"):
            continue
        choose = min if name in LOWER_IS_BETTER or name in lower else max
        best = choose(rows, key=lambda row: row[name])
        changes.append(Change(name, rows[0][name], rows[-1][name], best[name], best["step"]))
    return changes


def _learned(run: RunOnDisk, changes: Sequence[Change]) -> str:
    main = next((change for change in changes if change.name in MAIN), None)
    if main is not None:
        best = (
            f"; its best was {main.best:.3f} after step {main.best_step:,}"
            if main.best > main.after
            else ""
        )
        return f"{MAIN[main.name]} went from {main.before:.3f} to {main.after:.3f}{best}."
    rewards = [row["reward/mean"] for row in run.metrics if "reward/mean" in row]
    if not rewards:
        return ""
    some = max(1, len(rewards) // 10)
    first, last = mean(rewards[:some]), mean(rewards[-some:])
    return (
        f"Training reward went from {first:.3f} to {last:.3f} (means of the first and last "
        f"{'step' if some == 1 else f'{some:,} steps'}); nothing was evaluated twice."
    )


def _work(run: RunOnDisk) -> str:
    books = run.books
    if books is None:
        return ""
    left = [
        f", {count:,} {what}"
        for count, what in ((books.filtered, "filtered"), (books.quarantined, "quarantined"))
        if count
    ]
    return f"Groups: {books.trained:,} trained on" + "".join(left) + "."


def _time(run: RunOnDisk) -> str:
    seconds = [row["time/step"] for row in run.metrics if "time/step" in row]
    if not seconds:
        return ""
    whole = sum(sessions(run.events, run.last_sign))
    typical = statistics.median(seconds)
    text = f"A step took {duration(typical)} (median), all steps {duration(sum(seconds))}"
    starts = sum(event["kind"] == EventKind.RUN_STARTED for event in run.events)
    again = f" in {starts} starts" if starts > 1 else ""
    known = whole >= sum(seconds)  # else the end of a start that was killed is not
    return text + (f", the run {duration(whole)}{again}." if known else ".")


def sessions(events: Sequence[Row], last_sign: float | None = None) -> list[float]:
    """Seconds of each start of a run: to its end, or to its last event; of the last one to
    `last_sign` where that is later, in seconds since 1970."""
    found: list[float] = []
    begun = 0.0
    for event in events:
        if event["kind"] == EventKind.RUN_STARTED:
            begun = event["time"]
            found.append(0.0)
        elif found:
            found[-1] = event["time"] - begun
    if found and last_sign is not None:
        found[-1] = max(found[-1], last_sign - begun)
    return found


def stages(metrics: Sequence[Row]) -> list[Stage]:
    """Where the steps' time went, the longest stage first."""
    rows = [row for row in metrics if row.get("time/step")]
    whole = sum(row["time/step"] for row in rows)
    found = []
    for name in (*STAGES, "idle_rollout", "idle_policy"):
        seconds = sum(row.get(f"time/{name}", 0.0) for row in rows)
        if seconds:
            label = {"idle_rollout": "engines idle", "idle_policy": "trainer idle"}.get(
                name, name.replace("_", " ")
            )
            found.append(Stage(label, seconds, seconds / whole))
    return sorted(found, key=lambda stage: (stage.name.endswith("idle"), -stage.seconds))


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
