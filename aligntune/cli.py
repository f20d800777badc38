"""The command line: one short function per command; the work is elsewhere.

Exit codes: 0 done; 2 the input is wrong; 1 the run failed; 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aligntune.preference_trainer import PreferenceTrainer
    from aligntune.trainers import OnlineTrainer

# What typer raises for a wrong option or argument; it exports this subclass of it only.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reinforcement learning for language models on Ray.",
)


@app.command()
def quickstart(
    algorithm: Annotated[str, typer.Option(help="`aligntune algorithms` lists them")] = "grpo",
    out: Annotated[Path, typer.Option(help="a new folder; one left unfinished resumes")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="of the task, the model and the run")] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...")] = None,
) -> None:
    """Make a tiny model and task here, train it, and show accuracy before and after."""
    from aligntune.quickstart_run import run_quickstart

    result = run_quickstart(algorithm, out, seed, overrides or [])
    typer.echo(
        f"held-out accuracy {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f} "
        f"after {result['steps']} steps with {result['engine']}, {result['seconds']:.0f} s in all; "
        f"see {out / 'result.json'}"
    )


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [KEY.PATH=VALUE]...")
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
    backend: Annotated[str | None, typer.Option(help="trl or unsloth")] = None,
    out: Annotated[Path | None, typer.Option(help="default runs/ALGORITHM")] = None,
    resume: Annotated[str, typer.Option(help="auto, never or a checkpoint folder")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and print everything, start nothing")
    ] = False,
) -> None:
    """Train from a YAML file, from flags, or both; flags win over the file.

    Without a file, --algorithm, --model and --dataset are needed. KEY.PATH=VALUE sets a key of the
    config, as in train.steps=100, and wins over everything. An output folder that holds the same
    run is resumed from its newest checkpoint.
    """
    trainer = _trainer(
        arguments or [], algorithm, model, dataset, reward, reward_model, backend, out
    )
    if dry_run:
        from aligntune.config import dump

        trainer.check(resume)
        typer.echo(dump(trainer.config))
        typer.echo(trainer.summary())
        return
    typer.echo(trainer.train(resume).describe())


def _trainer(
    arguments: list[str],
    algorithm: str | None,
    model: str | None,
    dataset: str | None,
    rewards: list[str] | None,
    reward_model: str | None,
    backend: str | None,
    out: Path | None,
) -> OnlineTrainer | PreferenceTrainer:
    from aligntune.errors import UserError
    from aligntune.trainers import create_rl_trainer

    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise UserError(f"one config file, not {len(files)}: {', '.join(files)}")
    if not files and (algorithm is None or model is None or dataset is None):
        raise UserError("give a config file, or --algorithm, --model and --dataset")
    return create_rl_trainer(
        config=files[0] if files else None,
        algorithm=algorithm,
        model_name=model,
        dataset_name=dataset,
        reward_functions=rewards or None,
        reward_model_name=reward_model,
        backend=backend,
        output_dir=str(out) if out else None,
        overrides=[a for a in arguments if "=" in a],
    )


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...")] = None,
) -> None:
    """Score the held-out prompts with the trained model of a run (before training: its start)."""
    from aligntune.trainers import create_rl_trainer

    trainer = create_rl_trainer(config=config, overrides=overrides or [])
    typer.echo(json.dumps(trainer.evaluate(), indent=1))


@app.command()
def audit(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> None:
    """Replay a run's ledger and show that its books balance."""
    from aligntune.errors import RunFailed, UserError
    from aligntune.ledger import LedgerError
    from aligntune.ledger import audit as audit_log

    path = run_dir / "ledger.jsonl"
    if not path.is_file():
        raise UserError(f"no ledger at {path}; name a run directory")
    try:
        books = audit_log(path)
    except LedgerError as error:
        raise RunFailed(f"the books do not balance: {error}") from error
    typer.echo(
        f"{books.admitted} admitted = {books.trained} trained + {books.filtered} filtered + "
        f"{books.quarantined} quarantined + {books.open} open"
    )


@app.command()
def algorithms() -> None:
    """List the algorithms."""
    from aligntune.algorithms import registry
    from aligntune.preference_config import ALGORITHMS

    titles = {name: registry.get(name).title for name in registry.names()}
    titles |= {name: algorithm.title for name, algorithm in ALGORITHMS.items()}
    for name, title in titles.items():
        typer.echo(f"{name:12} {title}")


@app.command()
def rewards() -> None:
    """List the registered rewards."""
    from aligntune.rewards.registry import descriptions

    for name, description in descriptions().items():
        typer.echo(f"{name:14} {description}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; every expected error is one line on standard error."""
    from aligntune.errors import RunFailed, UserError

    arguments = sys.argv[1:] if argv is None else argv
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # rewards and algorithms of the user's own lie there
    try:
        code: Any = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        _fail(2, str(error))
    except UsageError as error:
        _fail(2, f"{error}; see `aligntune --help`")
    except RunFailed as error:
        _fail(1, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")
    except (typer.Abort, KeyboardInterrupt):
        _fail(130, "stopped before the run began")
    except RuntimeError as error:
        number = getattr(error, "signal", None)
        if number is None:
            raise
        _fail(128 + number, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")


def _fail(code: int, message: str) -> None:
    typer.echo(f"aligntune: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
