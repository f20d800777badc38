"""The command line: a table of commands, and what becomes of their errors.

A command is a function or a typer app in `commands/`, light to import, and one line of `COMMANDS`.

Exit codes: 0 done; 2 the input is wrong; 1 the run failed; 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from aligntune import cycles
from aligntune.commands import (
    audit_cli,
    cluster_cli,
    data_cli,
    evaluate_cli,
    jobs_cli,
    launch_cli,
    lists_cli,
    look_cli,
    model_cli,
    rewards_cli,
    train_cli,
    usage,
)

# What typer raises for a wrong option or argument; it exports this subclass of it only.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

TRAIN, LOOK, LISTS, CLUSTERS = "Train", "Look at a run", "What there is", "Machines and clusters"

COMMANDS: tuple[tuple[str, Callable[..., Any] | typer.Typer, str], ...] = (
    ("quickstart", train_cli.quickstart, TRAIN),
    ("train", train_cli.train, TRAIN),
    ("data", data_cli.data, TRAIN),
    ("report", look_cli.report, LOOK),
    ("samples", look_cli.samples, LOOK),
    ("chat", model_cli.chat, LOOK),
    ("export", model_cli.export, LOOK),
    ("evaluate", evaluate_cli.evaluate, LOOK),
    ("compare", evaluate_cli.compare, LOOK),
    ("audit", audit_cli.audit, LOOK),
    ("algorithms", lists_cli.algorithms, LISTS),
    ("rewards", rewards_cli.app, LISTS),
    ("plan", cluster_cli.plan, CLUSTERS),
    ("doctor", cluster_cli.doctor, CLUSTERS),
    ("submit", jobs_cli.submit_run, CLUSTERS),
    ("jobs", jobs_cli.app, CLUSTERS),
    ("launch", launch_cli.app, CLUSTERS),
)
"""Name, what answers it, and the heading that the help shows it under."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with `aligntune quickstart`; `aligntune COMMAND -h` has examples. Every option "
    "is in docs/configuration.md of the repository, every reward in docs/rewards.md.",
)
for _name, _command, _heading in COMMANDS:
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name, rich_help_panel=_heading)
    else:
        app.command(_name, rich_help_panel=_heading)(_command)


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


def main(argv: list[str] | None = None) -> None:
    """Run the command line; every expected error is one line on standard error."""
    from aligntune.errors import Interrupted, RunFailed, UserError

    # DeepSpeed warns whoever imports it on a machine without a GPU, and accelerate imports it.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting acc" not in record.getMessage()
    )
    arguments = sys.argv[1:] if argv is None else argv
    try:
        here = os.getcwd()
    except FileNotFoundError:
        _fail(2, "the working directory has been deleted; change to one that is there")
    if here not in sys.path:
        sys.path.append(here)  # rewards and algorithms of the user's own lie there
    try:
        code: Any = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        _fail(2, str(error))
    except UsageError as error:
        if not str(error):  # no command was named, and the help has been shown
            sys.exit(2)
        _fail(2, usage.told(error))
    except RunFailed as error:
        _fail(1, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")
    except OSError as error:  # of a disk that is full or gone; what else there is, is a defect
        _fail(1, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")
    except (typer.Abort, KeyboardInterrupt):
        _fail(130, "stopped; no run had begun")
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:  # what Ray has the signal raise, from when it is there on
            _fail(128 + signal.SIGTERM, "stopped; no run had begun")
        raise
    except Interrupted as error:
        _fail(128 + error.signal, f"{error}\nresume with: {shlex.join(['aligntune', *arguments])}")


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(f"aligntune: {message}", err=True)
    sys.exit(code)


def console() -> None:
    """`main` as the process: it ends at once, also while a storage or tracker has not answered."""
    cycles.seldom()
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        out.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        main()
    finally:
        from aligntune.runs.deadline import hangs
        from aligntune.tracking.output import held_up, let_go

        if not (held := held_up()):
            let_go()
        if held or hangs():  # its client would keep the interpreter from ending, or crash it
            end = sys.exc_info()[1]
            if not held:
                sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 1)
        cycles.no_more()


if __name__ == "__main__":
    console()
