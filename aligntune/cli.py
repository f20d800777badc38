"""The command line: one short function per command; the work is elsewhere.

Exit codes: 0 done; 2 the input is wrong; 1 the run failed; 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aligntune.commands import jobs_cli, launch_cli
from aligntune.commands.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    from aligntune.online.trainer import OnlineTrainer
    from aligntune.preference.trainer import PreferenceTrainer

# What typer raises for a wrong option or argument; it exports this subclass of it only.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement learning for language models on Ray.",
)
app.add_typer(launch_cli.app, name="launch")

app.add_typer(jobs_cli.app, name="jobs")
app.command("submit")(jobs_cli.submit_run)


def _show_version(asked: bool) -> None:
    if asked:
        from aligntune import __version__

        typer.echo(f"aligntune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="show it and exit"),
    ] = False,
) -> None:
    """Reinforcement learning for language models on Ray."""


@app.command()
def quickstart(
    algorithm: Annotated[str, typer.Option(help="`aligntune algorithms` lists them")] = "grpo",
    out: Annotated[Path, typer.Option(help="a new folder; one left unfinished resumes")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="of the task, the model and the run")] = 0,
    task: Annotated[
        str, typer.Option(help="sum, or agent: sums by a tool over many turns")
    ] = "sum",
    overrides: Overrides = None,
) -> None:
    """Make a tiny model and task here, train it, and show accuracy before and after."""
    from aligntune.quickstart.run import run_quickstart

    result = run_quickstart(algorithm, out, seed, overrides or [], task)
    typer.echo(
        f"held-out accuracy {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f} "
        f"after {result['steps']} steps with {result['engine']}, {result['seconds']:.0f} s in all; "
        f"the run is in {out / 'run'}, its model in {out / 'run' / 'model'}"
    )


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [KEY.PATH=VALUE]...",
            help="a config file, and keys of it to set, as in train.steps=100",
        ),
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="`aligntune algorithms` lists them")] = None,
    model: Annotated[str | None, typer.Option(help="a local folder or a hub name")] = None,
    dataset: Annotated[str | None, typer.Option(help="a local file, folder or hub name")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="a registered name or module:function; may repeat")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="a reward model's folder or hub name")
    ] = None,
    tool: Annotated[
        list[str] | None, typer.Option(help="module:function that it may call; may repeat")
    ] = None,
    environment: Annotated[str | None, typer.Option(help="module:Class of the episodes")] = None,
    agent: Annotated[str | None, typer.Option(help="module:function that plays them")] = None,
    backend: Annotated[str | None, typer.Option(help="trl or unsloth")] = None,
    out: Annotated[Path | None, typer.Option(help="default runs/ALGORITHM")] = None,
    resume: Annotated[str, typer.Option(help="auto, never or a checkpoint folder")] = "auto",
    profile: Annotated[
        bool, typer.Option("--profile", help="write trace.json, a timeline of every remote call")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and print everything, start nothing")
    ] = False,
) -> None:
    """Train from a YAML file, from flags, or both; flags win over the file.

    Without a file, --algorithm, --model and --dataset are needed. KEY.PATH=VALUE sets a key of the
    config, as in train.steps=100, and wins over everything. An output folder that holds the same
    run is resumed from its newest checkpoint.
    """
    if profile:
        arguments = [*(arguments or []), "tracking.profile=true"]
    trainer = _trainer(
        arguments or [],
        algorithm=algorithm,
        model_name=model,
        dataset_name=dataset,
        reward_functions=reward or None,
        reward_model_name=reward_model,
        tools=tool or None,
        environment=environment,
        agent=agent,
        backend=backend,
        output_dir=str(out) if out else None,
    )
    if dry_run:
        from aligntune.config.tree import dump

        trainer.check(resume)
        trainer.settle(resume)
        typer.echo(dump(trainer.config))
        typer.echo(trainer.summary())
        return
    typer.echo(trainer.train(resume).describe())


def _trainer(arguments: list[str], **given: Any) -> OnlineTrainer | PreferenceTrainer:
    """The trainer of a file, overrides and flags."""
    from aligntune.errors import UserError
    from aligntune.trainers import create_rl_trainer

    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise UserError(f"one config file, not {len(files)}: {', '.join(files)}")
    if not files and None in (given[n] for n in ("algorithm", "model_name", "dataset_name")):
        raise UserError("give a config file, or --algorithm, --model and --dataset")
    return create_rl_trainer(
        config=files[0] if files else None,
        overrides=[a for a in arguments if "=" in a],
        **given,
    )


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Score the held-out data with the model that a run exported, or before training its start.

    Says first which model that is. A run that stands between the two is refused.
    """
    from aligntune.trainers import create_rl_trainer

    trainer = create_rl_trainer(config=config, overrides=overrides or [])
    scored = trainer.scored()
    jobs_cli.note(f"scoring {scored.model} ({scored.origin}, step {scored.step})")
    said = {"model": scored.model, "step": scored.step, "from": scored.origin}
    typer.echo(json.dumps({**said, **trainer.evaluate()}, indent=1))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="of a cluster that need not exist")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="of the described cluster")] = 0,
    gpu: Annotated[str | None, typer.Option(help="their type, such as h100-80gb")] = None,
    cpus_per_node: Annotated[
        float | None, typer.Option(help="default: 16 a GPU, and 16 at least")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the plan as JSON")] = False,
) -> None:
    """Show where a run's ranks go, the memory they take and what a step costs; start nothing.

    Without --nodes the plan is for the cluster that cluster.address or RAY_ADDRESS names, else for
    this machine. A run that does not fit is refused with what would make it fit.
    """
    from aligntune.commands.plan import plan_run

    made = plan_run(
        config,
        overrides or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        cpus_per_node=cpus_per_node,
    )
    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=1))
        return
    from cluster.plan.draw import draw

    draw(made)


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option(help="host:port or auto; default: RAY_ADDRESS, else no cluster")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object a finding")] = False,
) -> int:
    """Examine this machine, and every node of a cluster; exit code 1 if anything fails."""
    from aligntune.commands.doctor import examine
    from cluster.doctor.findings import exit_code, lines

    findings = []
    for finding in examine(address):
        findings.append(finding)
        shown = json.dumps(finding.as_dict()) if as_json else lines([finding])[0]
        typer.echo(shown)
    return exit_code(findings)


@app.command()
def audit(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> None:
    """Replay a run's ledger and show that its books balance."""
    from aligntune.errors import UserError
    from aligntune.online.ledger import LedgerError
    from aligntune.online.ledger import audit as audit_log

    path = run_dir / "ledger.jsonl"
    try:
        if not path.is_file():
            raise UserError(f"no ledger at {path}; name a run directory")
        books = audit_log(path)
    except LedgerError as error:
        _fail(1, f"the books do not balance: {error}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    typer.echo(
        f"{books.admitted} admitted = {books.trained} trained + {books.filtered} filtered + "
        f"{books.quarantined} quarantined + {books.open} open"
    )


@app.command()
def algorithms() -> None:
    """List the algorithms."""
    from aligntune.algorithms import registry
    from aligntune.config.preference import ALGORITHMS

    titles = {name: registry.get(name).title for name in registry.names()}
    titles |= {name: algorithm.title for name, algorithm in ALGORITHMS.items()}
    for name, title in titles.items():
        typer.echo(f"{name:12} {title}")


@app.command()
def rewards() -> None:
    """List the registered rewards."""
    from aligntune.rewards.registry import descriptions

    for name, description in descriptions().items():
        typer.echo(f"{name:20} {description}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; every expected error is one line on standard error."""
    from aligntune.errors import Interrupted, RunFailed, UserError

    arguments = sys.argv[1:] if argv is None else argv
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # rewards and algorithms of the user's own lie there
    try:
        code: Any = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        _fail(2, str(error))
    except UsageError as error:
        if not str(error):  # no command was named, and the help has been shown
            sys.exit(2)
        _fail(2, f"{str(error).rstrip('.')}; see `aligntune --help`")
    except RunFailed as error:
        _fail(1, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")
    except OSError as error:  # of a disk that is full or gone; what else there is, is a defect
        _fail(1, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")
    except (typer.Abort, KeyboardInterrupt):
        _fail(130, "stopped; no run had begun")
    except Interrupted as error:
        _fail(128 + error.signal, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(f"aligntune: {message}", err=True)
    sys.exit(code)


def console() -> None:
    """`main` as the process: it ends at once, also while a storage or tracker has not answered."""
    try:
        main()
    finally:
        from aligntune.runs.deadline import hangs

        if hangs():  # its client would keep the interpreter from ending, or crash it
            end = sys.exc_info()[1]
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 1)


if __name__ == "__main__":
    console()
