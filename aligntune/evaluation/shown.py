"""Evaluations and comparisons as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from aligntune.evaluation.compare import Comparison
from aligntune.evaluation.statistics import Estimate
from aligntune.evaluation.store import Summary
from aligntune.tracking.lines import cut

SHOWN_CHARACTERS = 300  # of a text
INTERVALS = "Wilson's for pass@1 of one completion a prompt, bootstrap over prompts for all else"


def shown(summary: Summary) -> list[str]:
    """The figures of an evaluation, a column for each decoding."""
    ways = summary.decodings
    heads = [
        name if way.temperature == 0 else f"{name} ({way.completions} at {way.temperature:g})"
        for name, way in ways.items()
    ]
    names = list(dict.fromkeys(name for way in ways.values() for name in way.figures))
    table = [
        ["", *heads],
        *([name, *(estimated(way.figures.get(name)) for way in ways.values())] for name in names),
    ]
    failed = f", {summary.failed} groups failed" if summary.failed else ""
    return [
        f"{summary.name}: {described(summary)}, {summary.prompts} prompts{failed}; "
        f"a completion passes with {summary.success}",
        *columns(table),
        f"{summary.confidence:.0%} intervals: {INTERVALS}",
        *(
            [f"majorities count {summary.answers}"]
            if any(name.startswith("maj@") for name in names)
            else []
        ),
    ]


def described(summary: Summary) -> str:
    """Which model it was of."""
    step = "" if summary.step is None else f", step {summary.step}"
    return f"{summary.model} ({summary.origin}{step})"


def comparison_lines(found: Comparison) -> list[str]:
    """What B is against A, and where they differ most."""
    left_out = f", {found.left_out} left out without a score" if found.left_out else ""
    chance = "unlikely to be chance" if found.significant else "may be chance"
    lines = [
        f"A: {found.a}",
        f"B: {found.b}",
        f"{found.metric}, {found.decoding}, {found.prompts} prompts{left_out}",
        f"B better on {found.wins}, worse on {found.losses}, equal on {found.ties}",
        f"mean of A {found.mean_a:.4g}, of B {found.mean_b:.4g}; "
        f"difference {estimated(found.difference)} (95 % by bootstrap over prompts)",
        f"{found.test}, two-sided: p = {found.p:.3g}, which {chance} at 5 %",
    ]
    for pair in found.examples:
        lines += [
            "",
            f"row {pair.row}: A {pair.a.score:.4g}, B {pair.b.score:.4g}",
            f"  prompt: {cut(pair.prompt, SHOWN_CHARACTERS)}",
            f"  A: {_said(pair.a.text)}",
            f"  B: {_said(pair.b.text)}",
        ]
    return lines


def _said(text: str | None) -> str:
    return "(lost)" if text is None else cut(text, SHOWN_CHARACTERS) or "(empty)"


def estimated(found: Estimate | None) -> str:
    """A figure with its interval."""
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:.4g}"
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their cells below each other."""
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
