"""`aligntune quickstart` and `aligntune train`, as typer commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aligntune.commands.arguments import Overrides

if TYPE_CHECKING:
    from aligntune.online.trainer import OnlineTrainer
    from aligntune.preference.trainer import PreferenceTrainer


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
    from aligntune.tracking.ending import what_next

    for line in what_next(out / "run", out / "run" / "model"):
        typer.echo(line)


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
    trainer = trainer_of(
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
    result = trainer.train(resume)
    from aligntune.tracking.ending import ending

    for line in [result.describe(), *ending(result.output_dir, result.model)]:
        typer.echo(line)


def trainer_of(arguments: list[str], **given: Any) -> OnlineTrainer | PreferenceTrainer:
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
