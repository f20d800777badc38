"""Everything a run writes for people and programs: figures, samples, events, trackers, progress."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from actors.supervise import ObjectsLost, ReplicaLost, answer
from aligntune.config.online import RunConfig
from aligntune.online.pipeline import ReadyGroup, total_reward
from aligntune.runs.jsonl import read_lines
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind, EventsFile, MetricsFile, SamplesFile
from aligntune.tracking.progress import Progress
from aligntune.tracking.trackers import open_trackers

TEXTS_SECONDS = 60.0  # for the texts of a group that a reward actor's node still holds

SHOWN = {
    EventKind.RESUMED,
    EventKind.GROUP_QUARANTINED,
    EventKind.REPLICA_LOST,
    EventKind.REPLICA_JOINED,
    EventKind.POLICY_REBUILT,
    EventKind.CHECKPOINT_DAMAGED,
    EventKind.NOT_COPIED,
}


class Recorder(AbstractContextManager["Recorder"]):
    """The run's files are open while this is entered."""

    def __init__(
        self, config: RunConfig, rundir: RunDir, total_steps: int, after_step: int
    ) -> None:
        """`after_step` is the step of the checkpoint the run starts from, 0 at the beginning."""
        self._rundir = rundir
        self._samples_per_step = config.tracking.samples_per_step
        self._config = config
        self._metrics = MetricsFile(rundir.file("metrics.jsonl"))
        self._samples = SamplesFile(rundir.file("samples.jsonl"))
        self._events = EventsFile(rundir.file("events.jsonl"))
        self._trackers = open_trackers(
            config.tracking.trackers,
            rundir.path,
            config.tracking.project,
            config.model_dump(mode="json"),
            after_step,
        )
        self._progress = Progress(total_steps)
        self._logged = 0
        self.ran: dict[str, str] = {}  # the rollout `engine` and `backend` that really run

    def __exit__(self, *exc: object) -> None:
        self._progress.close()
        for tracker in self._trackers:
            tracker.close()
        for file in (self._metrics, self._samples, self._events):
            file.close()

    def event(self, kind: EventKind | str, **fields: Any) -> None:
        """Write an event; those a person should see at once are shown too."""
        self._events.append(kind, **fields)
        if kind in SHOWN:
            self._progress.note(f"{kind}: " + ", ".join(f"{k} {v}" for k, v in fields.items()))

    def note(self, text: str) -> None:
        """Show something to the person who watches."""
        self._progress.note(text)

    def role(self, name: str, info: Mapping[str, Any]) -> None:
        """What an actor said of itself when it started."""
        self._events.append(EventKind.ROLE_STARTED, role=name, **info)
        said = {key: str(info[key]) for key in ("engine", "backend") if key in info}
        if not said.items() <= self.ran.items():
            self.ran |= said
            self._rundir.describe(self._config, self.ran)
            self._progress.note(f"{name}: " + ", ".join(f"{k} {v}" for k, v in said.items()))

    @property
    def engine(self) -> str:
        """The rollout engine that really runs."""
        return self.ran.get("engine", "")

    @property
    def backend(self) -> str:
        """What really loads and steps the policy, with versions."""
        return self.ran.get("backend", "")

    @property
    def last_step(self) -> int:
        """The last step whose figures are written; -1 where there is none."""
        rows = read_lines(self._metrics.path)
        return int(rows[-1]["step"]) if rows else -1

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last step written."""
        rows = read_lines(self._metrics.path)
        return {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step. Raises NotFinite for a figure that is none."""
        self._metrics.append(step, metrics)
        self._logged = step
        for tracker in self._trackers:
            tracker.log(step, metrics)
        if step:
            self._progress.step(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show an evaluation at once; its figures are written with those of its step."""
        self._progress.evaluation(metrics)
        reward = metrics["eval/reward/mean"]
        self._progress.note(f"evaluation after step {step}: reward {reward:.3f}")

    async def samples(self, step: int, batch: Sequence[int], groups: Sequence[ReadyGroup]) -> None:
        """The first completion of the step's first groups, null where its text was lost."""
        written = list(zip(batch, groups, strict=True))[: self._samples_per_step]
        texts = await asyncio.gather(*(_texts(group) for _, group in written))
        self._samples.append(
            step,
            [
                {
                    "group": group_id,
                    "prompt": group.prompt.text,
                    "completion": completions[0] if completions else None,
                    "reward": total_reward(self._config, group.scores.values[0]),
                    "scores": dict(zip(group.scores.criteria, group.scores.values[0], strict=True)),
                    "finish_reason": group.record.finish_reasons[0].value,
                    "tokens": group.record.sampled_lengths[0],
                }
                for (group_id, group), completions in zip(written, texts, strict=True)
            ],
        )

    def truncate_after(self, step: int) -> None:
        """Forget what was written of later steps, which will come again."""
        self._metrics.truncate_after(step)
        self._samples.truncate_after(step)
        if self._logged > step:  # trackers were opened without what an earlier process logged
            for tracker in self._trackers:
                tracker.truncate_after(step)


async def _texts(group: ReadyGroup) -> tuple[str, ...] | None:
    """The group's decoded completions, or None where they are gone with their node."""
    try:
        texts: tuple[str, ...] = await answer(group.texts, "reward", "score", TEXTS_SECONDS)
    except (ObjectsLost, ReplicaLost):
        return None
    return texts
