"""What the actors of a history do: as little as shows which weights and which groups they had.

The policy's weights are the steps that it has learned, each with its groups: whoever holds weights
can say what they were trained on."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError

from actors.disk import Sums
from actors.engines.base import Turn, Work, completion
from actors.fetching import ArraysLost
from actors.messages import (
    Completion,
    FinishReason,
    GroupRecord,
    GroupSampling,
    Prompt,
    Scores,
    UpdateResult,
    VersionSpan,
)

SERIAL = itertools.count(100)
Learned = dict[int, list[list[int]]]  # step -> (group, completion) of each row, ascending


class Wrong(AssertionError):
    """An actor was given what it never should be."""


def check(holds: bool, what: str) -> None:
    """Raises Wrong."""
    if not holds:
        raise Wrong(what)


def prompt_at(position: int) -> Prompt:
    """The prompts are numbered."""
    return Prompt(position, f"{position}", f"{position}", np.array([1]))


class Worker:
    """What every actor answers."""

    done = 0

    async def stacks(self) -> str:
        """Nowhere."""
        return ""

    def killed(self) -> None:
        """The process is gone."""


class Rollout(Worker):
    """A rollout replica: its tokens say which versions made them."""

    def __init__(self, name: str, meets: Callable[[int], Awaitable[None]]) -> None:
        """`meets(group)` is what a group does to the replica before it is made."""
        self.name = name
        self.version = 0
        self._meets = meets

    async def start(self) -> dict[str, Any]:
        """It is ready, with the starting model."""
        return {"engine": "stand-in", "max_concurrent_groups": 4}

    async def load_weights(self, weights: Any) -> float:
        """Take newer weights."""
        version, learned = weights.read()
        check(version == len(learned), f"weights of version {version} learned {learned}")
        self.version = version
        return 0.1

    async def generate(self, prompt: Prompt, sampling: GroupSampling) -> tuple[Any, ...]:
        """A group whose completions are by the weights that it has now."""
        group = sampling.group_id
        await self._meets(group)
        check(group < 0 or prompt.row == group, f"group {group} has the prompt {prompt.row}")
        spans = ((VersionSpan(self.version, 1),),) * sampling.completions
        ends = (FinishReason.STOP,) * sampling.completions
        ones = (1,) * sampling.completions
        record = GroupRecord(group, 1, ones, ends, spans, 0.1, self.name)
        rows = sampling.completions
        return record, {"group": group, "version": self.version, "rows": rows}

    async def sample(self, turns: Sequence[Turn]) -> list[Completion]:
        """Answers to turns of episodes, each a token that no other has."""
        for turn in turns:
            await self._meets(int(turn.key.split("/")[1]))
        spans = (VersionSpan(self.version, 1),)
        return [completion([next(SERIAL)], [-1.0], FinishReason.STOP, spans) for _ in turns]

    async def work(self) -> Work:
        """Nothing that anybody counts."""
        return Work()


class Reward(Worker):
    """A reward actor; `scores(group)` says what the completions are worth."""

    def __init__(self, name: str, scores: Callable[[int], tuple[float, ...]]) -> None:
        self.name = name
        self._scores = scores

    async def start(self) -> dict[str, Any]:
        """It is ready."""
        return {}

    async def score(self, prompt: Prompt, tensors: Any, *said: Any) -> tuple[Any, ...]:
        """Held-out completions are worth what their version is."""
        made = tensors.read()
        group = made["group"]
        for talks in said:
            of = {talk[0]["content"] for talk in talks.read().messages}
            check(of == {f"{prompt.row}"}, f"{group} has the conversations of {of}")
        values = (0.5 + made["version"] / 10,) if group < 0 else self._scores(group)
        texts = tuple(f"{group}{index}" for index in range(len(values)))
        return Scores(group, ("length",), tuple((value,) for value in values), 0.1), texts


class Reference(Worker):
    """A reference replica."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def start(self) -> dict[str, Any]:
        """It is ready."""
        return {}

    async def logprobs(self, tensors: Any, temperature: float) -> tuple[Any, ...]:
        """Nothing but the group that they are of."""
        return 0.1, tensors.read()["group"]


class Meeting:
    """Where the ranks of a model tell each other something; whoever dies never comes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._said: set[int] = set()
        self._came = 0
        self._all = asyncio.Event()

    async def union(self, own: Iterable[int]) -> list[int]:
        """What all ranks say, together."""
        said, everybody = self._said, self._all
        said |= set(own)
        self._came += 1
        if self._came == self._size:
            self._said, self._came, self._all = set(), 0, asyncio.Event()
            everybody.set()
        await everybody.wait()
        return sorted(said)


class Rank(Worker):
    """A rank of policy or critic, which knows what it was trained on."""

    def __init__(self, name: str, staleness: int, meeting: Meeting) -> None:
        self.name = name
        self._meeting = meeting
        self._staleness = staleness
        self.learned: Learned = {}
        self.kept: Learned = {}  # a snapshot

    async def address(self) -> tuple[str, int]:
        """Where the ranks meet."""
        return "here", 7000

    async def start(self, host: str, port: int) -> dict[str, Any]:
        """It is ready, with the starting model."""
        return {"node_id": "n"}

    async def sees(self, path: str) -> tuple[bool, str]:
        """The run directory is there."""
        return os.path.exists(path), "n"  # noqa: ASYNC240 - nothing else waits

    async def values(self, tensors: Any) -> Any:
        """A critic's values."""
        given = [ref.read()["group"] for ref in tensors]
        return (0.1, *given) if given else 0.1

    async def prepare(self, job: Any) -> Any:
        """Targets of whole groups."""
        groups = await self._groups(job)
        return ({"kl/mean": 0.0}, *groups) if groups else {"kl/mean": 0.0}

    async def _groups(self, job: Any) -> list[int]:
        """The job's groups. Raises ArraysLost on all ranks where one lacks arrays."""
        lost, groups = [], []
        for work in job.groups:
            try:
                made = work.tensors.read()
                if work.reference is not None:
                    check(work.reference.read() == work.group_id, "another group's reference")
            except ObjectLostError:
                lost.append(work.group_id)
                continue
            check(made["group"] == work.group_id, f"{work.group_id} is {made}")
            check(made["rows"] == len(work.lengths), f"{made} has the rows {work.lengths}")
            age = job.step - 1 - made["version"]
            check(0 <= age <= self._staleness, f"step {job.step}: {made} is {age} versions old")
            groups.append(work.group_id)
        if lost := await self._meeting.union(lost):
            raise ArraysLost(tuple(lost))
        return groups

    async def update(self, job: Any) -> UpdateResult:
        """Learn a step."""
        groups = await self._groups(job)
        check(job.step == len(self.learned) + 1, f"step {job.step} after {sorted(self.learned)}")
        rows = [[groups[row.work], row.completion] for part in job.minibatches for row in part]
        self.learned = {**self.learned, job.step: sorted(rows)}
        return UpdateResult(metrics={"loss/policy": float(job.step)}, seconds=0.1)

    async def export_weights(self, version: int, as_checkpoint: bool) -> tuple[Any, ...]:
        """Its size, and the weights with what they have learned."""
        check(version == len(self.learned), f"version {version} is {sorted(self.learned)}")
        return 1, (version, self.learned)

    async def snapshot(self) -> int:
        """Keep what it has learned."""
        self.kept = dict(self.learned)
        return 1

    async def write(self, folder: str) -> Sums:
        """Write what it keeps."""
        content = json.dumps(self.kept).encode()
        os.makedirs(folder, exist_ok=True)
        (Path(folder) / self.name).write_bytes(content)
        return {self.name: (len(content), zlib.crc32(content))}

    async def load(self, folder: str) -> None:
        """Take what was written."""
        text = (Path(folder) / self.name).read_text(encoding="utf-8")
        self.learned = {int(step): groups for step, groups in json.loads(text).items()}

    async def save_model(self, folder: str) -> None:
        """The trained model is what it has learned."""
        await self.snapshot()
        await self.write(folder)
