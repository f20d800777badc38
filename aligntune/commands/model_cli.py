"""`aligntune export` and `aligntune chat`: the model of a run, to use and to talk to."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from aligntune.commands.arguments import note
from aligntune.commands.look_cli import RunFolder


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="the folder to make")],
    step: Annotated[
        str | None,
        typer.Option(metavar="STEP|best", help="which checkpoint; default: the newest"),
    ] = None,
) -> None:
    """Make a model of a checkpoint: safetensors, tokenizer and generation config in one folder.

    The run may be going on, or have ended before its last step. The best one is there where
    checkpoint.best was set.

    Example:

        aligntune export runs/grpo --step 40 --out models/grpo-40
    """
    note(f"the model of step {exported(run, out, step)} is in {out}")


def exported(run: Path, out: Path, which: str | None) -> int:
    """Make a model of a checkpoint of `run` in the folder `out`; its step. Raises UserError."""
    from aligntune.config.tree import override
    from aligntune.errors import UserError
    from aligntune.runs.reading import open_run

    found = open_run(run)
    if found.is_preference:
        raise UserError(
            f"{run} is a job over pairs: its checkpoints are the trainer's own, and its model is "
            f"in {run / 'model'} when it has ended"
        )
    from aligntune.online.trainer import OnlineTrainer
    from aligntune.trainers import create_rl_trainer

    trainer = create_rl_trainer(
        config=run / "config.yaml", overrides=[override("output_dir", str(run.absolute()))]
    )
    assert isinstance(trainer, OnlineTrainer)
    return trainer.export(out, which)


def chat(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="a run directory, or a model's folder")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="newest|best|STEP", help="of a run, in place of its exported model"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="what the model is told first")] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 is greedy: the likeliest token each time")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer")] = 256,
) -> None:
    """Talk to a trained model on this machine, a line a turn; an empty line starts anew.

    Example:

        aligntune chat runs/quickstart/run
    """
    from aligntune.chat import Conversation, model_folder, variables_of_run

    with ExitStack() as kept:
        if checkpoint is None:
            folder = model_folder(model)
        else:
            folder = Path(kept.enter_context(TemporaryDirectory())) / "model"
            which = None if checkpoint == "newest" else checkpoint
            note(f"made a model of the checkpoint of step {exported(model, folder, which)}")
        note(f"loading {folder}")
        variables = variables_of_run(model)
        conversation = Conversation(folder, system, temperature, max_tokens, variables)
    note("type a line and Enter; an empty line starts anew, Ctrl-D ends")
    while True:
        try:
            line = input("> ")
        except EOFError:
            typer.echo()
            return
        if not line.strip():
            conversation.forget()
            note("(a new conversation)")
            continue
        conversation.answer(line, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
