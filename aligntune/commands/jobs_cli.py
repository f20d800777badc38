"""`aligntune submit` and `aligntune jobs`, as typer commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aligntune.commands.arguments import ConfigFile, Overrides, note

app = typer.Typer(no_args_is_help=True, help="The Ray jobs of a cluster.")

JobsAddress = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_API_SERVER_ADDRESS", help="the Jobs server's, as in HEAD:8265"
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID")]


def submit_run(
    config: ConfigFile,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="the Jobs server's, as in HEAD:8265"),
    ] = None,
    overrides: Overrides = None,
    working_dir: Annotated[
        Path, typer.Option(help="goes with the job, but for what .gitignore names")
    ] = Path("."),
    env: Annotated[
        list[str] | None, typer.Option(help="a variable to pass on, by its name; may repeat")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="a file that travels though it looks like a secret; may repeat"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the job")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check, list what travels, send nothing")
    ] = False,
) -> int:
    """Train on a cluster as a Ray job, and follow it; its exit code is this one.

    Everything is checked here first. Submitting the same output_dir again resumes the run.

    Examples:

        aligntune submit config.yaml --dry-run
        aligntune submit config.yaml --address HEAD:8265 --env WANDB_API_KEY --detach
    """
    from aligntune.commands.submit import list_travelling, submit

    what = (config, overrides or [])
    if dry_run:
        return list_travelling(*what, working_dir, env or [], allow or [], typer.echo)
    if address is None:
        raise typer.BadParameter("missing option --address, the Jobs server's, as in HEAD:8265")
    return submit(*what, address, working_dir, env or [], allow or [], detach, note, passed_on)


@app.command("list")
def jobs_list(address: JobsAddress) -> None:
    """List the submitted jobs, oldest first."""
    from aligntune.commands.submit import connected, table

    with connected(address) as jobs:
        found = jobs.all()
        for line in table(found):
            typer.echo(line)
        if not found:
            note(f"no job was submitted to {address} yet")


@app.command("status")
def jobs_status(job_id: JobId, address: JobsAddress) -> None:
    """Show what is known of a job."""
    from aligntune.commands.submit import connected, describe

    with connected(address) as jobs:
        for line in describe(jobs.get(job_id)):
            typer.echo(line)


@app.command("logs")
def jobs_logs(
    job_id: JobId,
    address: JobsAddress,
    follow: Annotated[bool, typer.Option("--follow", help="until it ends")] = False,
) -> int:
    """Print what a job has printed; with --follow until it ends, with its exit code."""
    from aligntune.commands.submit import connected
    from aligntune.commands.submit import follow as follow_job

    with connected(address) as jobs:
        if follow:
            jobs.get(job_id)
            return follow_job(jobs, job_id, note, passed_on)
        passed_on(jobs.logs(job_id))
        return 0


@app.command("stop")
def jobs_stop(job_id: JobId, address: JobsAddress) -> None:
    """Stop a job after it has written its checkpoint, and say where that is."""
    from aligntune.commands.submit import connected, stop

    with connected(address) as jobs:
        stop(jobs, job_id, note)


def passed_on(text: str) -> None:
    """Print what a job printed, as it is."""
    typer.echo(text, nl=False)
