"""What a preference job is told, and the relay through which its workers and its driver talk."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.specs import ModelSpec

Kind = Literal["dpo", "reward_model", "sft"]

ANSWER_SECONDS = 60.0  # for the relay, which only ever keeps a list
ALIVE_SECONDS = 10.0  # between signs of life


@dataclass(frozen=True)
class PreferenceJob:
    """What every worker of a job does. Data only."""

    kind: Kind
    backend: Literal["trl", "unsloth"]
    model: ModelSpec
    seed: int
    steps: int  # 0 evaluates the model and ends
    arguments: dict[str, Any]  # of TRL's config for the kind
    scratch: str  # name of the folder that the workers of a node write their checkpoints in
    export: str  # folder or fsspec URI where the trained model is left
    max_length: int  # tokens of the longest text
    reference_free: bool = False
    trained: str | None = None  # evaluate this model; `model` stays the reference
    eval_every: int | None = None  # steps
    eval_at_start: bool = False
    eval_at_end: bool = False
    save_every: int = 50  # steps
    save_at_end: bool = True


@dataclass
class Relay:
    """Between the workers and the driver, which asks for news; to be wrapped by `ray.remote`.

    News are (kind, fields) in the order they happened: `role`, `started`, `training` as the first
    step since then begins, `step`, `checkpoint`, and `alive` from what has no figures yet.
    """

    _news: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _stop: Literal["", "save", "drop"] = ""
    _fatal: str = ""
    _started: bool = False
    _unread: str = ""

    def tell(self, kind: str, **fields: Any) -> str:
        """Leave news for the driver; returns what `stop` was called with."""
        self._news.append((kind, fields))
        if kind == "started":
            self._started, self._unread = True, ""
        return self._stop

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """The news since the last call."""
        news, self._news = self._news, []
        return news

    def stop(self, how: Literal["save", "drop"]) -> None:
        """Ask the workers to end after the step they are in, with or without a checkpoint."""
        self._stop = how

    def fail(self, reason: str) -> None:
        """Why a worker could not be built. No restart can mend that, unless workers of this job
        have started before: then what they need is there, and may be short for a while."""
        if not self._started:
            self._fatal = self._fatal or reason

    def fatal(self) -> str:
        """The first reason given to `fail` that no restart can mend, or nothing."""
        return self._fatal

    def leave_unread(self, checkpoint: str) -> None:
        """The workers could not go on from the checkpoint of this name."""
        self._unread = checkpoint

    def unread(self) -> str:
        """The name of the checkpoint that the last workers could not go on from, or nothing."""
        return self._unread


class RelaySilent(RuntimeError):
    """The relay gave no answer in time, or is gone."""


def answer_of(call: Any) -> Any:
    """What a remote call of the relay returns. Raises RelaySilent after ANSWER_SECONDS."""
    import ray
    from ray.exceptions import GetTimeoutError

    from actors.answers import DEATHS

    try:
        return ray.get(call, timeout=ANSWER_SECONDS)
    except GetTimeoutError as error:
        raise RelaySilent(
            f"the relay between driver and workers gave no answer within {ANSWER_SECONDS:g} s; its "
            "node may be overloaded, or cut off"
        ) from error
    except DEATHS as error:
        raise RelaySilent(
            "the relay between driver and workers is gone, with the driver or its node"
        ) from error


class SignOfLife:
    """Tells the relay that a worker is alive, at most every ALIVE_SECONDS, waiting for nothing."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._told = -math.inf

    def __call__(self) -> None:
        """To be called often from what takes long."""
        now = time.monotonic()
        if now - self._told >= ALIVE_SECONDS:
            self._told = now
            self._relay.tell.remote("alive")


def announcer(relay: Any) -> Any:
    """The Ray Train callback that tells the relay of a checkpoint once a restart would find it,
    which is later than the worker that wrote it can say."""
    from ray.train import UserCallback

    class Announcer(UserCallback):
        def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
            if checkpoint is not None:
                relay.tell.remote("checkpoint", step=metrics[0]["step"])

    return Announcer()
