"""`aligntune export` and `aligntune chat`: the model of a run, to use and to talk to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from aligntune.commands.arguments import Overrides, note
from aligntune.commands.look_cli import RunFolder

SHOWN_CHARACTERS = 200  # of what the model is told first


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="the folder to make")],
    overrides: Overrides = None,
    step: Annotated[
        str | None,
        typer.Option(metavar="STEP|best", help="which checkpoint; default: the newest"),
    ] = None,
) -> None:
    """Make a model of a checkpoint: safetensors, tokenizer and generation config in one folder.

    The run may be going on, or have ended before its last step. The best one is there where
    checkpoint.best was set.

    Examples:

        aligntune export runs/grpo --step 40 --out models/grpo-40

        aligntune export runs/grpo --out models/grpo cluster.address=local
    """
    note(f"the model of step {exported(run, out, step, overrides or [])} is in {out}")


def exported(run: Path, out: Path, which: str | None, overrides: Sequence[str] = ()) -> int:
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

    own = override("output_dir", str(run.absolute()))
    trainer = create_rl_trainer(config=run / "config.yaml", overrides=[own, *overrides])
    assert isinstance(trainer, OnlineTrainer)
    return trainer.export(out, which)


def chat(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="a run directory, or a model's folder")
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="newest|best|STEP", help="of a run, in place of its exported model"),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="what the model is told first; default: what the run told it"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 is greedy: the likeliest token each time")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer")] = 256,
) -> None:
    """Talk to a trained model on this machine, a line a turn; an empty line starts anew.

    A run's own model is asked as the run asked it: with its data.system_prompt, and by the chat
    template unless data.apply_chat_template is false. Keys are for making a model of a checkpoint.

    Examples:

        aligntune chat runs/quickstart/run

        aligntune chat runs/grpo --checkpoint best cluster.address=local
    """
    from aligntune.chat import Conversation, TooLong, asked_by_run, model_folder
    from aligntune.errors import UserError
    from aligntune.report.terminal import visible
    from aligntune.runs.reading import open_run
    from aligntune.tracking.lines import cut

    if checkpoint is None and overrides:
        raise UserError(f"{overrides[0]} would do nothing without --checkpoint; leave it out")
    asking = asked_by_run(model)
    with ExitStack() as kept:
        if checkpoint is None:
            folder = model_folder(model)
        else:
            # Beside the checkpoint, where every node of the run can write it; a run of somebody
            # else's may be for reading alone.
            run = open_run(model).path
            beside = TemporaryDirectory(
                dir=run if os.access(run, os.W_OK) else None, prefix=".model-"
            )
            folder = Path(kept.enter_context(beside)) / "model"
            which = None if checkpoint == "newest" else checkpoint
            step = exported(model, folder, which, overrides or [])
            note(f"made a model of the checkpoint of step {step}")
        note(f"loading {folder}")
        conversation = Conversation(folder, asking.told(system), temperature, max_tokens)
    if system is None and asking.system is not None:
        note(f"told first, as in the run: {cut(asking.system, SHOWN_CHARACTERS)}")
    if not asking.template:
        note("without the chat template, as in the run: a line is text for the model to go on with")
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
        try:
            conversation.answer(line, lambda piece: typer.echo(visible(piece), nl=False))
        except TooLong as full:
            note(str(full))
        typer.echo()
