"""`aligntune rewards`: the commands; the work is in `rewards_shown`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="List the rewards, explain one, or try one on texts.", invoke_without_command=True
)


@app.callback()
def rewards(context: typer.Context) -> None:
    """List the rewards, explain one, or try one on texts."""
    if context.invoked_subcommand is None:
        list_rewards()


@app.command("list")
def list_rewards() -> None:
    """List the registered rewards: name, range of its scores, what it measures."""
    from aligntune.commands.rewards_shown import listing

    for line in listing():
        typer.echo(line)


@app.command()
def show(name: Annotated[str, typer.Argument(help="a registered reward")]) -> None:
    """Explain one reward: its formula, source and options."""
    from aligntune.commands.rewards_shown import describe

    for line in describe(name):
        typer.echo(line)


@app.command("try")
def try_one(
    reward: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE.py:FUNCTION|FOLDER|URL",
            help="a registered reward, a function of yours, a reward model, or a service",
        ),
    ],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="options of the reward")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="rows with completions, or a run's samples.jsonl")
    ] = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="of --data")] = 5,
    completions: Annotated[
        str, typer.Option(metavar="COLUMN", help="of --data, the one that holds the completions")
    ] = "completion",
    prompt: Annotated[str | None, typer.Option(help="without --data")] = None,
    completion: Annotated[
        list[str] | None, typer.Option(help="a text to score; may repeat")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="a data column, as in answer=42; may repeat"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for one row")] = 60.0,
) -> None:
    """Score texts as a run would: in the reward's own process, with its time limit and checks.

    For example: aligntune rewards try own.py:correct --completion "It is 4." --column answer=4
    """
    from aligntune.commands.rewards_shown import try_reward

    for line in try_reward(
        reward,
        options or [],
        data=data,
        rows=rows,
        prompt=prompt,
        completions=completion or [],
        columns=column or [],
        completion_column=completions,
        timeout_s=timeout,
    ):
        typer.echo(line)
