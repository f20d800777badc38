"""The report as one HTML file. Pure: from what was read to text.

Invariant: nothing that a model wrote can run, and the page reaches no network. Texts of samples
are data that scripts show as text; what the template writes is escaped; and the policy in the
page's head lets only the one script run whose hash it names, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from aligntune.errors import UserError
from aligntune.report import curves, figures
from aligntune.report.settings import settings
from aligntune.report.summary import duration, summary
from aligntune.runs.reading import POINTS, RunOnDisk
from aligntune.tracking.metrics import WENT_WRONG

SCRIPTS = ("base.js", "charts.js", "diff.js", "samples.js", "page.js")
STYLES = ("page.css",)

SAMPLE_BYTES = 16 * 2**20  # of the samples of all runs of a page, as they stand in their files
EVENTS = 2000  # that a page shows; of more, the newest
STARTS = ("role_started", "settled", "run_started")
"""Kinds of events that are there in every run."""


def page(runs: Sequence[RunOnDisk]) -> str:
    """The report of one run, or of several beside each other."""
    script = f"/*\n{_asset('uPlot.LICENSE')}*/\n{_library('uPlot.iife.js')}\n"
    script += "".join(f"{_asset(name)}\n" for name in SCRIPTS)
    style = _library("uPlot.min.css") + "".join(f"{_asset(name)}\n" for name in STYLES)
    drawn = curves.parts({name for run in runs for name in _metrics(run)})
    names = named(runs)
    data, more = _data(runs, names, drawn)
    template = _environment().from_string(_asset("page.html"))
    text = template.render(
        runs=[_told(*pair) for pair in zip(runs, names, strict=True)],
        title=" and ".join(names),
        parts=drawn,
        lengths=data["lengths"] is not None,
        settings=settings(runs),
        knows_defaults=runs[0].defaults is not None,
        samples=more,
        events=[_events(*pair) for pair in zip(runs, names, strict=True)],
        data=Markup(embedded(data)),
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
        made=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )
    return text.encode(errors="replace").decode()  # half a character, as tools may give it


def embedded(data: Any) -> str:
    """JSON that may stand in a `script` element: no `<`, so that no text can end it; text of no
    character set's own as escapes."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def named(runs: Sequence[RunOnDisk]) -> list[str]:
    """What a page calls each run: the shortest end of its path by which they differ. Runs of the
    quickstart all lie in a folder `run`."""
    parts = [run.path.absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        ends = [str(Path(*each[-length:])) for each in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [run.name for run in runs]  # one run, twice


def _metrics(run: RunOnDisk) -> set[str]:
    return figures.names(figures.of_few_replicas(run.drawn)) | figures.names(run.evals)


def _data(
    runs: Sequence[RunOnDisk], names: Sequence[str], drawn: Sequence[curves.Part]
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the scripts need, and how many groups of samples are shown and there."""
    shown = in_all = 0
    each, lengths = [], {}
    for run, name in zip(runs, names, strict=True):
        budget = SAMPLE_BYTES // len(runs) // 4
        samples, there = run.samples(budget * 3)
        held_out, held_out_there = run.eval_samples(budget)
        shown += len(samples) + len(held_out)
        in_all += there + held_out_there
        first, last = figures.quarters(samples)
        prefix = f"{name}: " if len(runs) > 1 else ""
        if len(runs) == 1 and first != last:
            lengths["first quarter"] = first
        lengths[f"{prefix}last quarter"] = last
        metrics = figures.of_few_replicas(run.drawn)
        each.append(
            {
                "name": name,
                "every": max(1, -(-len(run.metrics) // POINTS)),
                "steps": figures.columns(metrics),
                "evals": figures.columns(figures.thinned(run.evals)),
                "samples": samples,
                "evalSamples": held_out,
            }
        )
    charts = [_chart(chart) for part in drawn for chart in part.charts]
    data = {"runs": each, "charts": charts, "lengths": figures.histogram(lengths)}
    return data, {"shown": shown, "in_all": in_all}


def _chart(chart: curves.Chart) -> dict[str, Any]:
    return {
        "id": chart.id,
        "title": chart.title,
        "unit": chart.unit,
        "share": chart.share,
        "curves": [{"metric": c.metric, "label": c.label, "of": c.part_of} for c in chart.curves],
    }


def _told(run: RunOnDisk, name: str) -> dict[str, Any]:
    told = summary(run)
    model = run.config.get("model")
    return {
        "name": name,
        "algorithm": run.algorithm,
        "model": model.get("name", "") if isinstance(model, Mapping) else "",
        "path": str(run.path),
        "versions": run.versions,
        "books": run.books,
        "summary": told,
        "stages": [
            {"name": s.name, "share": s.share, "seconds": duration(s.seconds)} for s in told.stages
        ],
        "problems": run.problems,
    }


def _events(run: RunOnDisk, name: str) -> dict[str, Any]:
    """Those that a page shows: with the time since the run's first one."""
    begun = run.events[0]["time"] if run.events else 0.0
    rows = [
        {
            "after": duration(event["time"] - begun),
            "at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])),
            "kind": event["kind"],
            "usual": event["kind"] in STARTS,
            "odd": event["kind"] in WENT_WRONG,
            "fields": [
                (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                for key, value in event.items()
                if key not in ("time", "kind")
            ],
        }
        for event in run.events[-EVENTS:]
    ]
    return {"name": name, "rows": rows, "left_out": max(0, len(run.events) - EVENTS)}


def _environment() -> Environment:
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _asset(name: str) -> str:
    return (resources.files("aligntune.report") / "assets" / name).read_text(encoding="utf-8")


def _library(name: str) -> str:
    """A file of the library that draws the curves. Its Python package ships it; that package is not
    imported, since all it adds is a way to show one chart."""
    spec = find_spec("uplot")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("a report needs the package uplot-python: pip install uplot-python")
    return (Path(spec.submodule_search_locations[0]) / "static" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
