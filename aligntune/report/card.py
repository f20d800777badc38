"""The model card: README.md in an exported model's folder, from the run directory alone.

It says what the model was made of and by what, what the run measured with intervals, and how to use
it. Nothing of it is written by hand, and it claims nothing that the run did not measure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from actors.models.caps import caps_in
from aligntune.data.folders import KINDS, kind_of
from aligntune.evaluation.shown import INTERVALS, estimated
from aligntune.evaluation.statistics import CONFIDENCE
from aligntune.evaluation.store import Summary, evaluations_of, read_summary
from aligntune.report.settings import settings
from aligntune.runs.disk import write_atomically
from aligntune.runs.ended import goes_back
from aligntune.runs.measure import comparable
from aligntune.runs.reading import RunOnDisk

NAME = "README.md"
METHODS = {
    "ppo": "PPO",
    "grpo": "GRPO",
    "drgrpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "dpo": "DPO",
    "reward_model": "a Bradley-Terry loss on preference pairs",
    "sft": "supervised fine-tuning",
}
OF_TABLES = (
    "eval/reward/accuracy",
    "eval/reward/margin",
    "eval/loss",
    "eval/policy/token_accuracy",
)
"""What a card tells of the evaluations of a job over a table, beside mean rewards."""
TOLD_ELSEWHERE = ("model.name", "data.", "output_dir", "algorithm.name", "hub.", "cluster.")
"""Settings that the card has no row for: another part says them, or they are of the machines."""


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
"""`owner/name`, as the hub lets one call a model or a data set."""


def write_card(run: RunOnDisk, folder: Path, step: int) -> Path:
    """Write the card of the model in `folder`, of `step`. Raises OSError."""
    write_atomically(folder / NAME, card(run, step, caps_in(folder)))
    return folder / NAME


def card(run: RunOnDisk, step: int, caps: bool = False) -> str:
    """The card of the run's model after `step`, as Markdown with a head of YAML. `caps`: the model
    caps its attention's scores, which is left out unless its attention is eager."""
    model, data = run.config.get("model") or {}, run.config.get("data") or {}
    base = str(model.get("name", "an unknown model"))
    public = [path for path, _ in _sources(run) if not _is_local(path)]
    rewards = run.algorithm == "reward_model"
    method = METHODS.get(run.algorithm, run.algorithm)
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if rewards else "text-generation",
        **({} if _is_local(base) else {"base_model": base}),
        **({"datasets": list(dict.fromkeys(public))} if public else {}),
        "tags": ["aligntune", run.algorithm.partition(":")[0]],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {run.name}",
        f"{_named(base)}, trained by {method} for {step} steps with aligntune.",
        "## How to use it",
        _usage(
            rewards,
            model.get("chat_template_kwargs") or {},
            data.get("system_prompt"),
            data.get("apply_chat_template", True),
            ', attn_implementation="eager"' if caps else "",
        ),
        "## What it was trained on",
        "\n".join(_data(run)),
        "## Results",
        "\n\n".join(_results(run, step)) or "The run evaluated nothing, so nothing is claimed.",
        "## Settings",
        _settings(run),
        "## Versions",
        "\n".join(f"- {version}" for version in run.versions) or "The run did not write any down.",
    ]
    return "\n\n".join(parts) + "\n"


def _usage(
    rewards: bool,
    variables: Mapping[str, Any],
    system: str | None = None,
    template: bool = True,
    attention: str = "",
) -> str:
    """How to ask the model as the run asked it; `attention` is an argument more of its loading."""
    if rewards:
        return (
            "Score texts with it in another run by `rewards: [{model: FOLDER}]`, or load it with\n"
            f"`AutoModelForSequenceClassification.from_pretrained(FOLDER{attention})`;\n"
            "its one label is the score."
        )
    more = "".join(f", {name}={value!r}" for name, value in variables.items())
    first = "" if system is None else f'{{"role": "system", "content": {system!r}}}, '
    asked = (
        f"""question = [{first}{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True{more}
)"""
        if template
        else 'inputs = tokenizer("...", return_tensors="pt")'
    )
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER"{attention})
{asked}
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

Or talk to it: `aligntune chat FOLDER`. FOLDER is this one, or the model's name on the hub. A
tokenizer without a chat template takes plain text."""


def _is_local(name: str) -> bool:
    """Whether a model or data set is not one of the hub's `owner/name`, as far as one can tell: a
    glob is none, nor what is called as a file of data."""
    if HUB_NAME.fullmatch(name) is None or name.startswith("."):
        return True
    return kind_of(Path(name)) in KINDS or Path(name).exists()


def _named(name: str) -> str:
    return f"`{name}`" if _is_local(name) else f"[{name}](https://huggingface.co/{name})"


def _sources(run: RunOnDisk) -> list[tuple[str, str]]:
    """The path and the split of each source of the training data; no split where none is known."""
    data = run.config.get("data")
    data = data if isinstance(data, Mapping) else {}
    more = data.get("train")
    sources = [data, *more] if isinstance(more, list) else [data]
    return [
        (str(source["path"]), str(source.get("split") or ""))
        for source in sources
        if isinstance(source, Mapping) and source.get("path")
    ]


def _data(run: RunOnDisk) -> Iterator[str]:
    for path, split in _sources(run):
        yield f"- data: {_named(path)}" + (f", split `{split}`" if split else "")
    for reward in run.config.get("rewards") or []:
        if isinstance(reward, Mapping):
            what = reward.get("function") or reward.get("model") or reward.get("url")
            yield f"- reward: `{what}`, weight {reward.get('weight', 1)}"


def _results(run: RunOnDisk, step: int) -> Iterator[str]:
    """Those of `aligntune evaluate` of this step, and the run's own first and last."""
    for folder in evaluations_of(run.path):
        summary = read_summary(folder)
        if summary.step == step and not _outdated(run, summary.time, step):
            yield _evaluated(summary)
    own = comparable([row for row in run.evals if row["step"] <= step])
    if own:
        first, last = own[0], own[-1]
        names = [n for n in last if n.startswith("eval/") and n.endswith("/mean")]
        names += [name for name in OF_TABLES if name in last]
        rows = [(name.removeprefix("eval/"), _own(first, name), _own(last, name)) for name in names]
        of = {"sft": "rows", "dpo": "pairs", "reward_model": "pairs"}.get(run.algorithm, "prompts")
        told = f"On held-out {of}, during training"
        table = _table([told, f"step {first['step']}", f"step {last['step']}"], rows)
        has_interval = any(_half_width(row, name) for row in (first, last) for name in names)
        why = "Intervals are 95 % of the mean reward over prompts, by its standard deviation."
        yield f"{table}\n\n{why}" if has_interval else table


def _outdated(run: RunOnDisk, time: str, step: int) -> bool:
    """Whether the run has trained up to `step` again since an evaluation of it at `time`, which is
    in whole seconds: the weights that were evaluated are gone."""
    ended = (datetime.fromisoformat(time) + timedelta(seconds=1)).timestamp()
    return any(event["time"] >= ended and goes_back(event, step) for event in run.events)


def _evaluated(summary: Summary) -> str:
    ways = summary.decodings
    heads = [
        f"{summary.data}, {summary.prompts} prompts",
        *(
            name if way.temperature == 0 else f"{way.completions} sampled at {way.temperature:g}"
            for name, way in ways.items()
        ),
    ]
    names = list(dict.fromkeys(name for way in ways.values() for name in way.figures))
    rows = [(n, *(estimated(way.figures.get(n)) for way in ways.values())) for n in names]
    return (
        f"{_table(heads, rows)}\n\nA completion passes with {summary.success}. Intervals are at "
        f"{summary.confidence:.0%}: {INTERVALS}."
    )


def _own(row: Mapping[str, Any], name: str) -> str:
    """A figure of a run's own evaluation, with its interval where it has one."""
    value, half = row.get(name), _half_width(row, name)
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4g} [{value - half:.4g}, {value + half:.4g}]" if half else f"{value:.4g}"


def _half_width(row: Mapping[str, Any], name: str) -> float | None:
    """Half the normal interval of a run's mean reward, from the spread of single completions over
    the number of prompts; too narrow where prompts are few. None of any other figure, and where
    that is not known."""
    spread, prompts = row.get("eval/reward/std"), row.get("eval/prompts")
    if name != "eval/reward/mean" or not spread or not prompts:
        return None
    return float(NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * spread / math.sqrt(prompts))


def _settings(run: RunOnDisk) -> str:
    rows = [
        (f"`{each.path}`", f"`{each.values[0]}`", f"`{each.default}`")
        for each in settings([run])
        if each.default is not None and not each.path.startswith(TOLD_ELSEWHERE)
    ]
    if not rows:
        return "All are aligntune's defaults."
    told = _table(["key", "value", "default"], rows)
    return f"Those that differ from aligntune's defaults:\n\n{told}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
