"""Keeps figures of runs that were really made, and draws their curves for the algorithms' pages.

    .venv/bin/python scripts/doc_runs.py NAME RUN    # figures of RUN to docs/runs/NAME.jsonl
    .venv/bin/python scripts/doc_runs.py             # to docs/runs/NAME.svg, and the pages

The second fills `<!-- run: NAME -->` of pages, from the files in docs/runs/ alone; a test fails
while a page or a curve is not what it would write.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
RUNS = DOCS / "runs"
PLACE = re.compile(r"(<!-- run: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 40, 12, 30, 28
TRAINING, HELD_OUT = "#ef6c00", "#00897b"


@dataclass(frozen=True)
class Line:
    """One curve: a figure of metrics.jsonl or evals.jsonl."""

    key: str
    label: str
    colour: str = TRAINING


@dataclass(frozen=True)
class Panel:
    """Curves over one axis."""

    title: str
    lines: tuple[Line, ...]


def _learning(training: str = "reward/mean") -> Panel:
    held_out = Line("eval/reward/exact_match/mean", "held-out, greedy", HELD_OUT)
    return Panel("share of right answers", (Line(training, "training, sampled"), held_out))


ACCURACY = Panel(
    "share of pairs ranked rightly",
    (
        Line("reward/accuracy", "training"),
        Line("eval/reward/accuracy", "held-out", HELD_OUT),
    ),
)
LOSS = Panel("loss", (Line("loss", "training"), Line("eval/loss", "held-out", HELD_OUT)))
TOKENS = Panel(
    "share of tokens that are the likeliest",
    (
        Line("policy/token_accuracy", "training"),
        Line("eval/policy/token_accuracy", "held-out", HELD_OUT),
    ),
)
ENTROPY = Panel("entropy, nats per token", (Line("policy/entropy", "entropy"),))
PANELS: dict[str, tuple[Panel, Panel]] = {
    "grpo": (_learning(), ENTROPY),
    "drgrpo": (_learning(), ENTROPY),
    "dapo": (
        _learning(),
        Panel("groups drawn for one that is kept", (Line("dapo/draws_per_kept_group", "draws"),)),
    ),
    "gspo": (
        _learning(),
        Panel(
            "share of answers that are clipped",
            (Line("gspo/sequence_clip_fraction", "clipped"),),
        ),
    ),
    "ppo": (
        _learning("reward/exact_match/mean"),
        Panel("explained variance of the critic", (Line("ppo/explained_variance", "critic"),)),
    ),
    "dpo": (ACCURACY, LOSS),
    "sft": (LOSS, TOKENS),
    "reward_model": (ACCURACY, LOSS),
}


def keep(name: str, run: Path) -> None:
    """Write docs/runs/NAME.jsonl: the figures that are drawn, by step."""
    keys = {line.key for panel in PANELS[name] for line in panel.lines}
    rows: list[dict[str, Any]] = []
    for file in ("metrics.jsonl", "evals.jsonl"):
        path = run / file
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = json.loads(text)
            kept = {key: round(row[key], 5) for key in sorted(keys & row.keys())}
            if kept:
                rows.append({"step": row["step"], **kept})
    lines = [json.dumps(row) for row in rows]
    (RUNS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(name: str) -> list[dict[str, float]]:
    """The rows of a run that was kept."""
    texts = (RUNS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in texts]


def curve(rows: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """Steps and values of a figure."""
    return sorted((row["step"], row[key]) for row in rows if key in row)


def text_of(name: str) -> str:
    """What stands in the page: the picture, and the ends of its curves in words."""
    rows = read(name)
    panel = PANELS[name][0]
    said = []
    for line in panel.lines:
        points = curve(rows, line.key)
        if points:
            (_, begins), (step, ends) = points[0], points[-1]
            before = f"{begins:.3f} to " if len(points) > 1 else ""
            at = "" if before else f" at step {step}"
            said.append(f"{line.label} {before}{ends:.3f}{at}")
    steps = int(max(row["step"] for row in rows))
    about = f"{panel.title}: {', '.join(said)}"
    return (
        f"![Curves of the run by step. {about[0].upper()}{about[1:]}.](runs/{name}.svg)\n\n"
        f"The run has {steps} steps. {about[0].upper()}{about[1:]}.\n"
    )


def drawing(name: str) -> str:
    """The curves as an SVG."""
    rows = read(name)
    panels = [_panel(panel, rows, index * (WIDTH + 20)) for index, panel in enumerate(PANELS[name])]
    width = len(panels) * (WIDTH + 20) - 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 24}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">\n'
        "<style>svg{color:#1a1a1a}@media(prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>\n"
        + "".join(panels)
        + "</svg>\n"
    )


def _panel(panel: Panel, rows: list[dict[str, float]], left: int) -> str:
    found = [(line, points) for line in panel.lines if (points := curve(rows, line.key))]
    values = [value for _, points in found for _, value in points]
    last = max(step for _, points in found for step, _ in points)
    low, high = min(0.0, *values), max(values)
    high = 1.0 if 0.5 < high <= 1 else high * 1.05

    def at(step: float, value: float) -> str:
        x = left + LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)
        return f"{x:.1f} {y:.1f}"

    drawn = [f'<text x="{left + LEFT}" y="16" font-weight="600">{panel.title}</text>\n']
    for value in (low, (low + high) / 2, high):
        drawn.append(
            f'<path d="M{at(0, value)}L{at(last, value)}" stroke="currentColor" '
            'stroke-opacity="0.2"/>\n'
            f'<text x="{left + LEFT - 6}" y="{float(at(0, value).split()[1]) + 4:.1f}" '
            f'text-anchor="end">{value:.3g}</text>\n'
        )
    for step, anchor in ((0, "start"), (last, "end")):
        x = at(step, low).split()[0]
        said = f"step {step:g}" if step else "0"
        drawn.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="{anchor}">{said}</text>\n')
    for index, (line, points) in enumerate(found):
        path = "L".join(at(*point) for point in points)
        dots = ' stroke-dasharray="6 4"' if len(points) < 4 else ""
        drawn.append(
            f'<path d="M{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dots}/>\n'
        )
        if len(points) < 15:
            for point in points:
                x, y = at(*point).split()
                drawn.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{line.colour}"/>\n')
        x = left + LEFT + index * 150
        drawn.append(
            f'<rect x="{x}" y="{HEIGHT + 6}" width="14" height="4" fill="{line.colour}"/>\n'
            f'<text x="{x + 20}" y="{HEIGHT + 12}">{line.label}</text>\n'
        )
    return "".join(drawn)


def rendered(text: str) -> str:
    """A page with what is said of its runs as it is now."""
    return PLACE.sub(lambda m: f"{m[1]}{text_of(m['name'])}{m[3]}", text)


def main() -> None:
    """Keep one run, or draw all and fill the pages."""
    if sys.argv[1:]:
        name, run = sys.argv[1:]
        keep(name, Path(run))
        return
    for path in sorted(RUNS.glob("*.jsonl")):
        path.with_suffix(".svg").write_text(drawing(path.stem), encoding="utf-8")
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        now = rendered(text)
        if now != text:
            path.write_text(now, encoding="utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
