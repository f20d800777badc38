"""`aligntune evaluate` and `aligntune compare`, as typer commands."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from aligntune.commands.arguments import Overrides, note

Checkpoint = Annotated[
    str,
    typer.Option(
        metavar="newest|best|export|start|STEP",
        help="which model of a run; newest is the export of a run that has ended",
    ),
]


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG.yaml|MODEL",
            help="a run directory, its config, or with --config a model's folder or hub name",
        ),
    ],
    overrides: Overrides = None,
    checkpoint: Checkpoint = "newest",
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="data and rewards for a MODEL, or a DPO or SFT run",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="sampled completions a prompt, beside the greedy one; default: eval.completions "
            "with a temperature, else none",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="of the sampled ones; default: the run's")
    ] = None,
    success: Annotated[
        str | None,
        typer.Option(metavar="[NAME=]X", help="a completion passes with this score or more"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the folder for it; default: evaluations/ of the run")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json")] = False,
) -> None:
    """Score the held-out data with a model, and keep every prompt, completion and score.

    Says first which model that is. Reports pass@1, pass@k, maj@k and the mean of each reward, all
    with confidence intervals; see docs/evaluation.md.

    Examples:

        aligntune evaluate runs/grpo --samples 8

        aligntune evaluate runs/grpo --checkpoint best

        aligntune evaluate Qwen/Qwen3-0.6B --config runs/grpo/config.yaml

        aligntune evaluate runs/dpo --config runs/grpo/config.yaml
    """
    from aligntune.errors import UserError

    if config is None and not Path(target).exists():
        raise UserError(
            f"{target!r} does not exist; name a run directory or a config, or with --config a model"
        )
    from aligntune.commands.evaluations import Target, evaluated, target_of
    from aligntune.evaluation.shown import shown
    from aligntune.evaluation.store import write_evaluation

    found: Target = target_of(target, config, overrides or [])
    from aligntune.preference.trainer import PreferenceTrainer

    if isinstance(found.trainer, PreferenceTrainer):
        given: dict[str, object] = {
            "--samples": samples,
            "--temperature": temperature,
            "--success": success,
        }
        given |= {"--out": out, "--checkpoint": None if checkpoint == "newest" else checkpoint}
        if odd := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"{odd[0]} is of runs that sample, and this job samples nothing; "
                "--config CONFIG.yaml with prompts and rewards scores what a DPO or SFT model says"
            )
        scored = found.trainer.scored()
        why = scored.why and f": {scored.why}"
        note(f"scoring {scored.model} ({scored.origin}, step {scored.step}{why})")
        said = {"model": scored.model, "step": scored.step, "from": scored.origin}
        typer.echo(json.dumps({**said, **found.trainer.evaluate()}, indent=1))
        return
    told = Told()
    summary, rows, place = evaluated(found, checkpoint, samples, temperature, success, out, told)
    folder, lost = place, None
    try:
        folder = write_evaluation(place, summary, rows)
        summary = summary.model_copy(update={"name": folder.name})
    except OSError as error:  # what has been measured is told all the same
        lost = error
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
    else:
        typer.echo("\n".join(shown(summary)))
    if lost is not None:
        raise UserError(
            f"the completions could not be written to {place}: {lost}; the figures above are all "
            "that is kept. Make room, or name another folder by --out"
        )
    note(f"every completion and score is in {folder}")


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="an evaluation's folder, or a run")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another one, of the same prompts")],
    metric: Annotated[
        str, typer.Option(help="reward, a reward's name, or passed for pass and fail")
    ] = "reward",
    decoding: Annotated[
        str | None, typer.Option(help="greedy or sampled; default: greedy where both have it")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="prompts to show")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Say on which prompts B is better than A, and whether that could be chance.

    Of a run it is the newest evaluation in its folder, or else the last one of its training.

    Example:

        aligntune compare runs/grpo/evaluations/start-000000 runs/grpo/evaluations/export-000200
    """
    from aligntune.evaluation.compare import compared
    from aligntune.evaluation.read import both
    from aligntune.evaluation.shown import comparison_lines

    first, second, way = both(a, b, decoding, metric)
    names, rows = (first.name, second.name), (first.rows(way), second.rows(way))
    found = compared(names, rows, metric, way, examples, first.seed)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        typer.echo("\n".join(comparison_lines(found)))


class Told:
    """Says how far an evaluation is."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last: tuple[str, int] | None = None

    def stage(self, text: str) -> None:
        """Something of the start is done."""
        note(f"[{self._elapsed()}] {text}")

    def heard(self, decoding: str, done: int, total: int) -> None:
        """`done` of `total` prompts have their completions and scores."""
        if self._last != (decoding, done) or 0 < done < total:
            note(f"[{self._elapsed()}] {decoding}: {done} of {total} prompts generated and scored")
        self._last = (decoding, done)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 60}:{seconds % 60:02d}"
