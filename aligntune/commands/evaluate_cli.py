"""`aligntune evaluate`, as a typer command."""

from __future__ import annotations

import json

import typer

from aligntune.commands.arguments import ConfigFile, Overrides, note


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Score the held-out data with the model that a run exported, or before training its start.

    Says first which model that is. A run that stands between the two is refused.

    Example:

        aligntune evaluate runs/grpo/config.yaml
    """
    from aligntune.trainers import create_rl_trainer

    trainer = create_rl_trainer(config=config, overrides=overrides or [])
    scored = trainer.scored()
    note(f"scoring {scored.model} ({scored.origin}, step {scored.step})")
    said = {"model": scored.model, "step": scored.step, "from": scored.origin}
    typer.echo(json.dumps({**said, **trainer.evaluate()}, indent=1))
