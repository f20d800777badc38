"""`aligntune algorithms`: what there is, by name."""

from __future__ import annotations

import typer


def algorithms() -> None:
    """List the algorithms."""
    from aligntune.algorithms import registry
    from aligntune.config.preference import ALGORITHMS

    titles = {name: registry.get(name).title for name in registry.names()}
    titles |= {name: algorithm.title for name, algorithm in ALGORITHMS.items()}
    for name, title in titles.items():
        typer.echo(f"{name:12} {title}")
