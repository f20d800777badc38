"""What several commands take and say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG.yaml",
        exists=True,
        dir_okay=False,
        readable=True,
        help="such as a run's own config.yaml",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="keys to set, as in train.steps=100"),
]


def note(text: str) -> None:
    """Say something beside the output."""
    typer.echo(text, err=True)
