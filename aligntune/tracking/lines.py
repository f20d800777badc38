"""The words of a run's progress: figures, times, and lines that fit a width. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.cells import cell_len, set_cell_size

GAP = "  "
FIRST = ("loss", "accuracy", "margin", "reward", "eval")
LAST = ("KL", "constant", "length", "tokens/s", "staleness")
"""What `figures` calls those that are of no criterion, before and after those that are."""


def figures(metrics: Mapping[str, float], evaluation: Mapping[str, float]) -> dict[str, str]:
    """The figures that matter by their short names, in reading order; those a run does not have
    are left out. A criterion that is called as one of them is `reward/NAME`.

    `evaluation` holds the latest `eval/*` figures, which most steps have none of.
    """
    held_out = evaluated(evaluation)
    scores = criteria(metrics, beside=FIRST + LAST)
    shown = [
        ("loss", metrics.get("loss"), "{:.4f}"),  # of preference jobs
        ("accuracy", metrics.get("reward/accuracy"), "{:.3f}"),
        ("margin", metrics.get("reward/margin"), "{:.3f}"),
        ("reward", metrics.get("reward/mean"), "{:.3f}"),
        ("eval", None if held_out is None else held_out[1], "{:.3f}"),
        *((name, value, "{:.3f}") for name, value in scores.items()),
        ("KL", metrics.get("kl/reference"), "{:.4f}"),
        ("constant", metrics.get("groups/constant_fraction"), "{:.0%}"),
        ("length", metrics.get("completions/length_mean"), "{:.0f}"),
        ("tokens/s", metrics.get("throughput/tokens_per_s"), "{:,.0f}"),
        ("staleness", metrics.get("staleness/max"), "{:.0f}"),
    ]
    return {name: form.format(value) for name, value, form in shown if value is not None}


def criteria(
    metrics: Mapping[str, float], prefix: str = "", beside: Collection[str] = ("reward",)
) -> dict[str, float]:
    """The mean of each criterion, where there are several; of one it is the reward itself. One that
    is called as a figure `beside` them is `reward/NAME`."""
    begin, end = f"{prefix}reward/", "/mean"
    found = {
        name[len(begin) : -len(end)]: value
        for name, value in metrics.items()
        if name.startswith(begin) and name.endswith(end) and len(name) > len(begin) + len(end)
    }
    if len(found) < 2:
        return {}
    return {f"reward/{name}" if name in beside else name: x for name, x in found.items()}


HELD_OUT = {
    "eval/reward/accuracy": "accuracy",
    "eval/reward/mean": "reward",
    "eval/loss": "loss",
}
"""The figures that say how good a model is, the best first, and what people call each. A reward
model has all three, DPO has no mean reward, SFT the loss alone."""


def evaluated(evaluation: Mapping[str, float]) -> tuple[str, float] | None:
    """The first of `HELD_OUT` that an evaluation has: what people call it, and its value."""
    return next(
        ((said, evaluation[name]) for name, said in HELD_OUT.items() if name in evaluation), None
    )


FIRST_DROPPED = ("staleness", "tokens/s", "length", "constant", "margin", "KL")
"""What a line that is too long leaves out, the first first; then criteria, from the last."""


def fitted(shown: Mapping[str, str], width: int | None) -> str:
    """`name value` of as many figures as `width` columns hold; all of them without one."""
    left = dict(shown)
    droppable = [name for name in FIRST_DROPPED if name in left]
    droppable += [name for name in reversed(left) if name not in droppable]
    while width is not None and left and len(_said(left)) > width:
        del left[droppable.pop(0)]
    return _said(left)


def _said(shown: Mapping[str, str]) -> str:
    return GAP.join(f"{name} {value}" for name, value in shown.items())


def line(
    step: int,
    total: int,
    shown: Mapping[str, str],
    left: float | None,
    width: int | None = None,
) -> str:
    """One step as one plain line. The step and the time left are in it whatever the `width`."""
    begin = f"step {step}/{total}"
    end = f"{duration(left)} left" if left is not None and step < total else ""
    room = None if width is None else width - len(begin) - len(GAP) - (len(GAP + end) if end else 0)
    return GAP.join(part for part in (begin, fitted(shown, room), end) if part)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """Seconds since the start as a clock: 0:12, 1:02:03."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def seconds_left(step_seconds: Sequence[float], step: int, total: int) -> float | None:
    """Time for the steps after `step`, at the mean pace of the steps given; None without any."""
    if not step_seconds:
        return None
    return sum(step_seconds) / len(step_seconds) * (total - step)


def bar(step: int, total: int, width: int) -> str:
    """How far a run is, `width` columns wide."""
    done = min(width, width * step // total) if total else width
    return "━" * done + "─" * (width - done)


def waits(waiting: Mapping[str, str]) -> str:
    """Who is waited for, each with what it does if that is known."""
    return ", ".join(f"{who} ({does})" if does else who for who, does in waiting.items())


def cut(text: str, width: int) -> str:
    """`text` on one line of printable characters, at most `width` columns wide.

    A completion may hold anything, codes that move a terminal's cursor included.
    """
    plain = "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text)
    return plain if cell_len(plain) <= width else set_cell_size(plain, max(0, width - 1)) + "…"


def sample(row: Mapping[str, object], width: int, most: int = 2) -> list[str]:
    """A group of an evaluation in a few lines: its prompt, its best completion and its worst."""
    told = row.get("completions")
    completions = [c for c in told if isinstance(c, Mapping)] if isinstance(told, list) else []
    ranked = sorted(completions, key=lambda c: -_number(c.get("reward")))
    shown = ranked if len(ranked) <= most else [ranked[0], ranked[-1]]
    lines = [cut(f"  asked  {row.get('prompt')}", width)]
    for completion in shown:
        reward, text = completion.get("reward"), completion.get("text")
        score = f"{reward:.3f}" if isinstance(reward, int | float) else "no reward"
        said = "(its text is lost)" if text is None else f"{text}"
        lines.append(cut(f"  {score}  {said}", width))
    return lines


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("-inf")
