"""RewardActor: decodes a group's completions and has every criterion score them.

Invariant: a group's scores are what the criteria returned, or the call raises `RewardFailed`; and
the next group finds every criterion usable. User code runs in child processes, one per criterion,
that are killed at the time limit and end with the actor. Reward models run in the actor itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.messages import GroupTensors, Messages, Prompt, Scores
from actors.scoring.model import ModelScorer, RewardModelCriterion
from actors.scoring.process import (
    HEADER_BYTES,
    Answer,
    RewardCriterion,
    RewardFailed,
    RewardFailure,
    frame,
    frame_length,
)
from actors.specs import ModelSpec
from actors.whereabouts import whereabouts

IMPORT_SECONDS = 300.0  # a new child's time to import the function, not counted against calls
EXIT_SECONDS = 2.0  # between a closed channel and the exit status that explains it

# sys.path comes first, as it is what `actors` itself is found on.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from actors.scoring.process import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


Criterion = RewardCriterion | RewardModelCriterion


class Scorer(Protocol):
    """One criterion at work: a function in a child process, or a model in this one."""

    name: str

    async def start(self) -> None:
        """Get ready. Raises `RewardFailed` when that cannot be."""

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[float]:
        """One finite number per completion. Raises `RewardFailed`."""

    async def close(self) -> None:
        """Let go of what it holds."""


@dataclass
class _Child:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, message: Any) -> Answer:
        self.writer.write(frame(message))
        await self.writer.drain()
        length = frame_length(await self.reader.readexactly(HEADER_BYTES))
        answer: Answer = pickle.loads(await self.reader.readexactly(length))
        return answer

    def kill(self) -> None:
        """End the child and what it started; the event loop reaps it."""
        self.writer.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class FunctionScorer:
    """A Python function in a child process of its own. Calls are served one after the other.

    The child starts with `start` or the next call, and again with the call after one that it did
    not survive. The time limit is that of the function: waiting for earlier calls and importing
    the function are not counted.
    """

    def __init__(self, criterion: RewardCriterion) -> None:
        self.name = criterion.name
        self._criterion = criterion
        self._child: _Child | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Start the child and import the function there.

        Raises:
            RewardFailed: the import failed, did not end, or ended the process.
        """
        async with self._turn:
            await self._ready()

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[float]:
        """One call of the function for one group. Raises `RewardFailed`, as `call`."""
        return await self.call(prompt.source, completions, prompt.columns)

    async def call(
        self, source: str | Messages, completions: Sequence[str], columns: Mapping[str, Any]
    ) -> list[float]:
        """One call of the function for completions of one prompt and its data columns.

        Raises:
            RewardFailed: whatever kept it from one finite number per completion.
        """
        async with self._turn:
            child = await self._ready()
            request = (source, list(completions), dict(columns))
            return await self._ask(child, request, self._criterion.timeout_s, "scoring a group")

    async def close(self) -> None:
        """End the child."""
        if self._child is not None:
            child, self._child = self._child, None
            child.kill()
            await child.process.wait()

    async def _ready(self) -> _Child:
        if self._child is None or self._child.process.returncode is not None:
            self._child = await _start_child(self._criterion)
            await self._ask(self._child, self._criterion, IMPORT_SECONDS, "importing the function")
        return self._child

    async def _ask(self, child: _Child, message: Any, limit_s: float, doing: str) -> list[float]:
        """The child's answer. A child that gave none, also because the caller left, is killed."""
        answer = asyncio.create_task(child.ask(message))
        # A process the user's code started can hold the channel open after the child has ended.
        ended = asyncio.create_task(child.process.wait())
        answered = False
        try:
            await asyncio.wait(
                {answer, ended}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done() and answer.exception() is None:
                values = answer.result()
                answered = not isinstance(values, RewardFailed) or (
                    values.reason is not RewardFailure.IMPORT
                )
                if isinstance(values, RewardFailed):
                    raise values
                return values
            if answer.done() or ended.done():
                status = await _exit_status(child.process)
                raise RewardFailed(self.name, RewardFailure.DIED, f"{status} while {doing}")
            raise RewardFailed(
                self.name, RewardFailure.TIMEOUT, f"no answer within {limit_s:g} s while {doing}"
            )
        finally:
            answer.cancel()
            ended.cancel()
            if not answered:
                child.kill()
                self._child = None


async def _start_child(criterion: RewardCriterion) -> _Child:
    here, there = socket.socketpair()
    path = list(dict.fromkeys((*criterion.search_path, *(entry or "." for entry in sys.path))))
    with there:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-u",  # what the user prints is in the log when the child is killed
            "-c",
            _BOOTSTRAP,
            json.dumps(path),
            str(there.fileno()),
            str(os.getpid()),
            stdin=subprocess.DEVNULL,
            pass_fds=(there.fileno(),),
            start_new_session=True,
        )
    reader, writer = await asyncio.open_connection(sock=here)
    return _Child(process, reader, writer)


async def _exit_status(process: asyncio.subprocess.Process) -> str:
    """How `process` ended, in words."""
    try:
        code = await asyncio.wait_for(process.wait(), EXIT_SECONDS)
    except TimeoutError:
        return "its process closed the channel"
    if code < 0:
        return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"its process ended with exit status {code}"


class RewardActor:
    """Scores groups, several at a time; to be wrapped by `ray.remote`."""

    def __init__(self, criteria: tuple[Criterion, ...], tokenizer_spec: ModelSpec) -> None:
        self._tokenizer_spec = tokenizer_spec
        self._tokenizer: Any = None
        self._scorers: tuple[Scorer, ...] = tuple(
            FunctionScorer(c) if isinstance(c, RewardCriterion) else ModelScorer(c)
            for c in criteria
        )

    async def start(self) -> dict[str, Any]:
        """Load the tokenizer and start every criterion. Returns the criteria and the process id.

        Raises:
            RewardFailed: a function could not be imported here.
            ModelError: the tokenizer or a reward model cannot be loaded.
        """
        from actors.models.loading import (
            load_tokenizer,  # transformers: seconds, and only needed here
        )

        self._tokenizer = await asyncio.to_thread(load_tokenizer, self._tokenizer_spec)
        await _all(scorer.start() for scorer in self._scorers)
        return {"criteria": tuple(scorer.name for scorer in self._scorers), **whereabouts()}

    async def score(self, prompt: Prompt, tensors: GroupTensors) -> tuple[Scores, tuple[str, ...]]:
        """The scores of one group, [G][K], criteria in the order they were given, and its texts.

        Called with `num_returns=2`: the driver waits for the scores, and fetches the decoded texts
        [G] of the groups that it writes to the samples file, and no others.

        Raises:
            RewardFailed: the first criterion in that order that had no scores. The others are
                waited for, each within its own limit, so that no child is left amid a call.
        """
        if self._tokenizer is None:
            raise RuntimeError("RewardActor.score was called before RewardActor.start returned")
        began = time.monotonic()
        texts = [
            self._tokenizer.decode(
                tensors.token_ids[tensors.completion(index)].tolist(), skip_special_tokens=True
            )
            for index in range(len(tensors.lengths))
        ]
        by_criterion = await _all(scorer.score(prompt, texts) for scorer in self._scorers)
        scores = Scores(
            group_id=tensors.group_id,
            criteria=tuple(scorer.name for scorer in self._scorers),
            values=tuple(
                tuple(values[index] for values in by_criterion) for index in range(len(texts))
            ),
            seconds=time.monotonic() - began,
        )
        return scores, tuple(texts)

    async def ping(self) -> None:
        """Answers while the actor's event loop turns."""

    async def close(self) -> None:
        """End every child process."""
        await _all(scorer.close() for scorer in self._scorers)


async def _all(calls: Any) -> list[Any]:
    """The results of `calls`, run together; when all are done, the first exception is raised."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
