"""Arguments that several commands take."""

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
