"""`aligntune report` and `aligntune samples`: a run to look at, from its directory alone."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]


def report(
    run: RunFolder,
    other: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="another one, to see both together")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the file; default: report.html in the first RUN")
    ] = None,
) -> None:
    """Write one HTML file with everything that there is to see of a run, or of two together.

    The run may be going on, at its end, or killed. Of two runs the curves are laid over each other,
    and the file is report-OTHER.html.
    """
    from aligntune.errors import UserError
    from aligntune.report.write import write_report

    runs = [run] if other is None else [run, other]
    if other is not None and out is None:
        out = run / f"report-{other.absolute().name}.html"
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    try:
        typer.echo(write_report(runs, out))
    except OSError as error:  # a run of somebody else's, or its disk, may be for reading alone
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"the report cannot be written: {error}; name a file elsewhere by --out"
        ) from error


def samples(
    run: RunFolder,
    step: Annotated[int | None, typer.Option(help="of this step; default: the last")] = None,
    worst: Annotated[bool, typer.Option("--worst", help="the lowest mean reward first")] = False,
    best: Annotated[bool, typer.Option("--best", help="the highest mean reward first")] = False,
    number: Annotated[int, typer.Option("-n", min=1, help="how many groups")] = 1,
    held_out: Annotated[
        bool, typer.Option("--eval", help="held-out prompts, in place of training's")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="leave out nothing of long texts")] = False,
) -> None:
    """Show what the model said: a group's completions side by side, with their scores.

    --worst and --best look at all steps unless --step names one.
    """
    from rich.console import Console

    from aligntune.errors import UserError
    from aligntune.report.terminal import shown
    from aligntune.runs.reading import EVAL_SAMPLES, SAMPLES, chosen, open_run

    if worst and best:
        raise UserError("--worst and --best exclude each other")
    found = open_run(run)
    name = EVAL_SAMPLES if held_out else SAMPLES
    order = "worst" if worst else "best" if best else ""
    if step is None and not order:
        groups = found.last_groups(name)[:number]
    else:
        groups = chosen(found.groups(name), step, order, number)
    if not groups:
        steps = {row["step"] for row in found.groups(name)}
        of = f"there are groups of the steps {min(steps)} to {max(steps)}" if steps else "none yet"
        why = "; a job over pairs samples nothing" if found.is_preference else f": {of}"
        raise UserError(f"no group to show in {run / name}{why}")
    console = Console()
    for group in groups:
        console.print(shown(group, console.width, full))
