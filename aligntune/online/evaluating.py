"""Evaluates a model that is not being trained, on actors of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from actors.messages import Prompt
from actors.reward import Criterion
from actors.supervise import ReplicaSet
from actors.transfer.specs import FullSpec
from actors.waiting import all_of
from aligntune.config.online import RunConfig
from aligntune.evaluation.summary import Row
from aligntune.online.attempts import GroupFailed
from aligntune.online.evaluation import Decoding, each_group, none_scored
from aligntune.online.export import export_checkpoint
from aligntune.online.groups import ReadyGroup
from aligntune.online.ignoring import ignore
from aligntune.online.roles import Roles
from aligntune.online.rolling import Rolling
from aligntune.online.samples import said_of, sample_rows
from aligntune.online.serving import Serving
from aligntune.plain import plain
from aligntune.runs.ended import Scored

T = TypeVar("T")

ROLES_OF_AN_EVALUATION = ("rollout", "reward", "environment")

TELL_SECONDS = 5.0  # between two words of how far an evaluation is

Heard = Callable[[str, int, int], None]  # (decoding, prompts that are scored, of how many)


def decodings(
    config: RunConfig, samples: int | None = None, temperature: float | None = None
) -> dict[str, Decoding]:
    """A greedy completion a prompt and, beside it, `samples` sampled ones.

    By default those that the eval section says: none where it is greedy and no `temperature` is
    given. The temperature is the section's, or where that is greedy the rollouts'.
    """
    own = config.eval
    if samples is None:
        samples = own.completions if own.temperature > 0 or temperature else 0
    heat = temperature if temperature is not None else own.temperature or config.rollout.temperature
    greedy = {"greedy": Decoding(1, 0.0)}
    return greedy | ({"sampled": Decoding(samples, heat)} if samples else {})


@asynccontextmanager
async def served(
    config: RunConfig,
    roles: Roles,
    criteria: Sequence[Criterion],
    said: Callable[[str, Mapping[str, Any]], None],
) -> AsyncIterator[Rolling]:
    """What rolls and scores with the config's own model; `said` hears what replicas say of
    themselves."""
    serving = Serving(config, roles, ignore, said, replica_set=ReplicaSet)
    try:
        played = [] if serving.environments is None else [serving.environments]
        sets = [serving.rollouts, serving.rewards, *played]
        await all_of(*(replicas.start() for replicas in sets))
        yield Rolling(config, serving.rollouts, serving.rewards, serving.environments, criteria)
    finally:
        await serving.close()


async def with_model(
    config: RunConfig,
    roles: Roles,
    criteria: Sequence[Criterion],
    scored: Scored,
    work: Callable[[Rolling], Awaitable[T]],
    stage: Callable[[str], None],
) -> T:
    """What `work` makes with a model served; of a checkpoint one is made first, and goes again."""

    def said(name: str, info: Mapping[str, Any]) -> None:
        if "engine" in info:
            stage(f"{name}: {info['engine']}")

    async def by(model: str) -> T:
        named = config.model.renamed(model).model_copy(update={"lora": None})
        rollout = config.rollout.model_copy(update={"weight_sync": FullSpec()})  # nobody sends any
        own = config.model_copy(update={"model": named, "rollout": rollout})
        async with served(own, roles.of_config(own), criteria, said) as rolling:
            stage("the model is loaded")
            return await work(rolling)

    if not scored.is_checkpoint:
        return await by(scored.model)
    # Beside the checkpoint, where every node of the run can read it; a run of somebody else's may
    # be for reading alone.
    run = Path(scored.model).parent.parent
    beside = run if os.access(run, os.W_OK) else None
    with TemporaryDirectory(dir=beside, prefix=".model-") as folder:
        target = Path(folder) / "model"
        await export_checkpoint(config, roles, Path(scored.model), target)
        stage(f"made a model of the checkpoint of step {scored.step}")
        return await by(str(target))


async def evaluation_rows(
    config: RunConfig,
    prompts: Sequence[Prompt],
    ways: Mapping[str, Decoding],
    rolling: Rolling,
    heard: Heard,
) -> list[Row]:
    """A row for each prompt under each decoding, with every completion and score, or why there is
    none. Raises RunFailed where no prompt could be scored."""
    rows: list[Row] = []
    for name, decoding in ways.items():
        rows += await _decoded(config, prompts, name, decoding, rolling, heard)
    return rows


async def _decoded(
    config: RunConfig,
    prompts: Sequence[Prompt],
    name: str,
    decoding: Decoding,
    rolling: Rolling,
    heard: Heard,
) -> list[Row]:
    done = 0

    async def row(group: ReadyGroup) -> Row:
        nonlocal done
        (made,) = sample_rows(config, [group], [await said_of(group)])
        done += 1
        return made

    async def tell() -> None:
        while True:
            heard(name, done, len(prompts))
            await asyncio.sleep(TELL_SECONDS)

    telling = asyncio.create_task(tell(), name="telling")
    try:
        results = await each_group(config, prompts, decoding, rolling, ignore, row)
    finally:
        telling.cancel()
    heard(name, done, len(prompts))
    if done == 0:
        raise none_scored(results)
    rows = []
    for prompt, result in zip(prompts, results, strict=True):
        if isinstance(result, GroupFailed):
            asked = {"row": prompt.row, "source": plain(prompt.source), "prompt": prompt.text}
            rows.append({"decoding": name, **asked, "failed": str(result)})
        else:
            rows.append({"decoding": name, **result})
    return rows
