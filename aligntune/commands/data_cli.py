"""`aligntune data`: what the model will see of a config's data. No run starts, and no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from aligntune.commands.arguments import ConfigFile, Overrides, note

if TYPE_CHECKING:
    from actors.reward import Criterion
    from aligntune.online.inputs import RunInputs
    from aligntune.preference.inputs import PairInputs


def data(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="shown with their tokens")] = 2,
) -> None:
    """Show what the model will see: rows as tokens, lengths, what is dropped, columns for rewards.

    No run starts; where rewards form the pairs, they are called in processes of their own.

    Examples:

        aligntune data config.yaml
        aligntune data config.yaml -n 5 rollout.max_prompt_length=256
    """
    from aligntune.config.load import load_config
    from aligntune.config.online import RunConfig

    read = load_config(config, overrides or [])
    if isinstance(read, RunConfig):
        from aligntune.online.inputs import RunInputs

        lines = _prompts(RunInputs(read, {}), rows)
    else:
        from aligntune.preference.inputs import PairInputs

        lines = _pairs(PairInputs(read, {}), rows)
    for line in lines:
        typer.echo(line)


def _prompts(inputs: RunInputs, rows: int) -> Iterator[str]:
    from aligntune.data.shown import Bound, prompts_shown

    source, config = inputs.prompts, inputs.config
    longest = config.rollout.max_prompt_length
    assert longest is not None, "settled with the prompts"
    bound = Bound("rollout.max_prompt_length", longest, config.data.long_rows)
    reads = {criterion.name: _read(criterion) for criterion in inputs.criteria}
    if config.plays:
        note("not shown: what tools, environment or agent write into a prompt as an episode begins")
    return prompts_shown(source, inputs.tokenizer, bound, rows, reads)


def _pairs(inputs: PairInputs, rows: int) -> Iterator[str]:
    from aligntune.config.warm_up import SFTSpec
    from aligntune.data.shown import Bound, pairs_shown, taught_shown

    pairs = inputs.pairs
    bound = Bound("data.max_length", inputs.max_length, inputs.config.data.long_rows)
    if isinstance(inputs.config.algorithm, SFTSpec):
        packs = len(inputs.table) if inputs.config.algorithm.packing else None
        tokenizer = inputs.tokenizer
        return taught_shown(inputs.rows, pairs, packs, tokenizer, bound, rows, inputs.dropped)
    reads = {criterion.name: _read(criterion) for criterion in inputs.criteria}
    return pairs_shown(inputs.rows, pairs, inputs.tokenizer, bound, rows, inputs.dropped, reads)


def _read(criterion: Criterion) -> str:
    """What a reward gets of a row's columns, in words."""
    from actors.scoring.criteria import RewardCriterion
    from aligntune.rewards.registry import columns_named, takes_every_column

    if not isinstance(criterion, RewardCriterion):
        return "no column"  # a model that reads texts, or what an episode says itself
    if takes_every_column(criterion):
        return "every column"
    named = columns_named(criterion)
    words = [name if required else f"{name} (optional)" for name, required in named.items()]
    return ", ".join(words) or "no column"
