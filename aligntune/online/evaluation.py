"""Scores the held-out prompts beside training, through the same replicas.

Invariant: every completion of an evaluation is by the weights of one version. The controller brings
the next version's weights only when the evaluation of this one has ended; updates go on meanwhile.
An evaluation has ids of its own, so that no held-out prompt shares a training group's draws.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from actors import timeline
from actors.messages import GroupSampling, Prompt
from actors.supervise import RoleExhausted
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online.attempts import GroupFailed
from aligntune.online.figures import completion_metrics, episode_metrics, score_metrics
from aligntune.online.groups import ReadyGroup
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.rolling import Rolling
from aligntune.online.samples import sample_rows, texts_of
from aligntune.tracking.metrics import EventKind

T = TypeVar("T")


def evaluation_id(index: int) -> int:
    """The group id of held-out prompt `index`: negative, where those of training are not."""
    return -1 - index


@dataclass(frozen=True)
class Decoding:
    """How the completions of an evaluation are drawn; temperature 0 is greedy."""

    completions: int  # a prompt
    temperature: float


async def each_group(
    config: RunConfig,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    rolling: Rolling,
    event: Callable[..., None],
    take: Callable[[ReadyGroup], Awaitable[T]],
) -> list[T | GroupFailed]:
    """What `take` makes of the scored group of each prompt, in order, or why it has none.

    A group whose objects are lost while it is taken is made again.
    """
    rollout = config.rollout
    at_once = asyncio.Semaphore(rollout.replicas * rollout.max_concurrent_groups)

    async def one(index: int, prompt: Prompt) -> T | GroupFailed:
        def retried(reason: str) -> None:
            event(EventKind.GROUP_RETRIED, evaluation=index, reason=reason)

        sampling = GroupSampling(
            completions=decoding.completions,
            max_tokens=rollout.max_completion_length,
            temperature=decoding.temperature,
            seed=config.train.seed,
            group_id=evaluation_id(index),
        )

        async def made(company: int | None) -> T:
            return await take(await rolling.roll_and_score(prompt, sampling, company, retried))

        async with at_once:
            try:
                return await rolling.again(made, retried)
            except GroupFailed as failed:
                return failed

    return await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))


async def evaluate(
    config: RunConfig,
    prompts: Sequence[Prompt],
    version: int,
    rolling: Rolling,
    event: Callable[..., None],
) -> tuple[dict[str, float], list[ReadyGroup]]:
    """`eval/*` figures over `prompts`, and the groups they are of, by the weights of `version`.

    A prompt that keeps failing is counted in `eval/failed` and left out of the means. Raises
    RunFailed when none could be scored.
    """

    async def kept(group: ReadyGroup) -> ReadyGroup:
        return group

    decoding = Decoding(config.eval.completions, config.eval.temperature)
    results = await each_group(config, prompts, decoding, rolling, event, kept)
    groups = [result for result in results if isinstance(result, ReadyGroup)]
    if not groups:
        raise none_scored(results)
    made_by = {s.version for g in groups for spans in g.record.version_spans for s in spans}
    if made_by - {version}:
        raise RunFailed(
            f"the evaluation of version {version} has tokens of the versions {sorted(made_by)}. "
            "This is a defect of aligntune: please report it with events.jsonl"
        )
    scores = score_metrics(config, groups, prefix="eval/")
    if "eval/reward/mean" not in scores:
        raise RunFailed(f"every reward abstained from all of {len(groups)} evaluation prompts")
    figures = {
        **scores,
        **completion_metrics(groups, prefix="eval/"),
        **episode_metrics(groups, prefix="eval/"),
        "eval/prompts": float(len(groups)),
        "eval/failed": float(len(results) - len(groups)),
    }
    return figures, groups


def none_scored(results: Sequence[object]) -> RunFailed:
    """Why an evaluation has no figures."""
    return RunFailed(f"not one of {len(results)} evaluation prompts was scored: {results[0]}")


class Evaluation:
    """The evaluations of one run, one at a time, each a task beside training."""

    def __init__(
        self,
        config: RunConfig,
        total_steps: int,
        prompts: Sequence[Prompt],
        rolling: Rolling,
        recorder: OnlineRecorder,
    ) -> None:
        self._config = config
        self._total_steps = total_steps
        self._prompts = prompts
        self._rolling = rolling
        self._recorder = recorder
        self._task: asyncio.Task[None] | None = None
        self._version = 0

    def due(self, version: int) -> bool:
        """Whether `version` is to be evaluated, and no row says that it was. Where what evaluations
        are made by has changed, the first version since is as the start of a run."""
        spec, anew = self._config.eval, self._recorder.measured_anew
        wanted = (
            spec.at_start
            if version == 0
            else (anew and spec.at_start)
            or (spec.every_steps is not None and version % spec.every_steps == 0)
            or (version == self._total_steps and spec.at_end)
        )
        return wanted and bool(self._prompts) and self._recorder.last_evaluation < version

    def begin(self, version: int) -> None:
        """Evaluate `version`, which all replicas serve, where that is due."""
        if self.due(version):
            self._version = version
            self._task = asyncio.create_task(self._run(version), name=f"evaluation-{version}")

    async def _run(self, version: int) -> None:
        timeline.about.set(f"evaluation of version {version}")
        figures, groups = await evaluate(
            self._config, self._prompts, version, self._rolling, self._recorder.event
        )
        texts = await texts_of(groups[: self._config.tracking.samples_per_evaluation])
        self._recorder.eval_samples(version, sample_rows(self._config, groups, texts))
        self._recorder.evaluation(version, figures)

    @property
    def runs(self) -> bool:
        """Whether there is one to wait for."""
        return self._task is not None and not self._task.done()

    async def ended(self) -> None:
        """Wait for the one that runs, if any; it goes on where the wait is cancelled. Raises what
        it raised."""
        if (task := self._task) is not None:
            await asyncio.wait((task,))
            task.result()
            if self._task is task:  # else another who waited has been here
                self._task = None

    async def written(self, version: int) -> bool:
        """Wait for the evaluation of a version before `version`; whether none is lost. Nobody who
        goes on from a checkpoint of `version` could make it again."""
        task = self._task
        if task is None or self._version >= version:
            return True
        await asyncio.wait((task,))
        return not task.cancelled() and task.exception() is None

    async def cancel(self) -> None:
        """Drop the one that runs; whoever goes back to its version begins it again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def stop(self, version: int) -> None:
        """Before a run ends at `version`: an evaluation of it is made again when the run goes on,
        and is dropped; one of an earlier version could never be, and is finished. That it fails is
        told, and the run has stopped all the same."""
        if self._version < version:
            try:
                await self.ended()
            except (RunFailed, RoleExhausted) as failed:
                self._recorder.event(
                    EventKind.NOT_EVALUATED, step=self._version, reason=str(failed)
                )
        await self.cancel()
