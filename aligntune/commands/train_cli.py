"""`aligntune quickstart` and `aligntune train`, as typer commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aligntune.commands.arguments import Overrides
from cluster.jobs import secrets

if TYPE_CHECKING:
    from aligntune.online.trainer import OnlineTrainer
    from aligntune.preference.trainer import PreferenceTrainer

ALGORITHMS = "grpo, drgrpo, dapo, gspo, ppo, dpo, reward_model, sft, or module:Class"


def quickstart(
    algorithm: Annotated[
        str, typer.Option(metavar="NAME", help="grpo, drgrpo, dapo, gspo or ppo")
    ] = "grpo",
    out: Annotated[Path, typer.Option(help="a new folder; one left unfinished resumes")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="of the task, the model and the run")] = 0,
    task: Annotated[
        str, typer.Option(metavar="NAME", help="sum, or agent: sums by a tool over many turns")
    ] = "sum",
    overrides: Overrides = None,
) -> None:
    """Make a tiny model and task here, train it, and show accuracy before and after.

    Nothing is downloaded. It takes a few minutes on two cores.

    Examples:

        aligntune quickstart
        aligntune quickstart --algorithm dapo --out runs/dapo
        aligntune quickstart --task agent
    """
    from aligntune.quickstart.run import run_quickstart
    from aligntune.tracking.ending import what_next
    from aligntune.tracking.output import say

    result = run_quickstart(algorithm, out, seed, overrides or [], task, say)
    say(
        f"held-out accuracy {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f} "
        f"after {result['steps']} steps with {result['engine']}, {result['seconds']:.0f} s in all; "
        f"the run is in {out / 'run'}, its model in {out / 'run' / 'model'}",
        *what_next(out / "run", out / "run" / "model"),
    )


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [KEY.PATH=VALUE]...",
            help="a config file, and keys of it to set, as in train.steps=100",
        ),
    ] = None,
    algorithm: Annotated[str | None, typer.Option(metavar="NAME", help=ALGORITHMS)] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="a local folder or a hub name")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="a local file, folder or hub name")
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="of the data; default: prompt")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="held-out data, scored before and after; eval.every_steps=N in between too",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="`aligntune rewards` lists them; your own is module:function; may repeat",
        ),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="a reward model's folder or hub name")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="of the whole run")] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="learning rate; default: the algorithm's")
    ] = None,
    tool: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="module:function that it may call; may repeat"),
    ] = None,
    environment: Annotated[
        str | None, typer.Option(metavar="NAME", help="module:Class of the episodes")
    ] = None,
    agent: Annotated[
        str | None, typer.Option(metavar="NAME", help="module:function that plays them")
    ] = None,
    backend: Annotated[
        Literal["trl", "unsloth"] | None, typer.Option(help="what loads and steps the model")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="default runs/ALGORITHM")] = None,
    resume: Annotated[
        str, typer.Option(metavar="HOW", help="auto, never or a checkpoint folder")
    ] = "auto",
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

    Examples:

        aligntune train config.yaml --dry-run
        aligntune train config.yaml --steps 200 --lr 1e-6 train.max_staleness=1
        aligntune train --algorithm grpo --model Qwen/Qwen2.5-0.5B-Instruct \\
            --dataset tasks.jsonl --prompt-column question \\
            --reward my_reward:correct
    """
    from aligntune.config.tree import override

    with secrets_of_the_job():  # models and data may need them, and rewards that are tried here
        if profile:
            arguments = [*(arguments or []), "tracking.profile=true"]
        columns = {"data.prompt_column": prompt_column, "data.eval_path": held_out}
        trainer = trainer_of(
            [override(key, name) for key, name in columns.items() if name is not None]
            + (arguments or []),
            max_steps=steps,
            learning_rate=lr,
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
            summary = trainer.summary(resume)  # settles, and may yet refuse a reward
            typer.echo(dump(trainer.config))
            typer.echo(summary)
            return
        result = trainer.train(resume)
        from aligntune.tracking.ending import ending
        from aligntune.tracking.output import say

        say(result.describe(), *ending(result.output_dir, result.model))


def trainer_of(arguments: list[str], **given: Any) -> OnlineTrainer | PreferenceTrainer:
    """The trainer of a file, overrides and flags. What is a file is the config, also one whose path
    has a `=` in it."""
    from aligntune.errors import UserError
    from aligntune.trainers import create_rl_trainer

    files = [a for a in arguments if "=" not in a or os.path.isfile(a)]
    if len(files) > 1:
        raise UserError(f"one config file, not {len(files)}: {', '.join(files)}")
    if not files and None in (given[n] for n in ("algorithm", "model_name", "dataset_name")):
        raise UserError("give a config file, or --algorithm, --model and --dataset")
    return create_rl_trainer(
        config=files[0] if files else None,
        overrides=[a for a in arguments if a not in files],
        **given,
    )


@contextmanager
def secrets_of_the_job() -> Iterator[None]:
    """Set the secrets of the submitted job that this process runs, if it does; remove them from the
    head's store at the end, whatever that is. Raises UserError where they are not there."""
    if not secrets.of_a_job():
        yield
        return
    from ray.exceptions import RpcError

    from aligntune.errors import UserError

    try:
        secrets.take()
    except KeyError as gone:
        raise UserError(gone.args[0]) from gone
    except RpcError as error:
        raise UserError(
            f"the head gave no secrets of this job: {error}; submit it again"
        ) from error
    try:
        yield
    finally:
        try:
            secrets.forget()
        except RpcError as error:  # how the run ended matters more
            typer.echo(
                f"aligntune: secrets of this job may still lie in the head's store: {error}",
                err=True,
            )
