"""OnlineTrainer: everything is checked before anything starts, then the controller runs."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from actors.messages import Prompt
from actors.models.loading import ModelError
from actors.models.values import check_critic_model
from actors.reward import Criterion
from actors.scoring.criteria import RewardFailed
from actors.supervise import ReplicaLost, RoleExhausted
from aligntune.config.backends import check_installed
from aligntune.config.online import RunConfig
from aligntune.data.prompts import PromptSource
from aligntune.errors import Interrupted, RunFailed, UserError
from aligntune.online.assemble import assemble
from aligntune.online.controller import Controller
from aligntune.online.evaluation import evaluate_model
from aligntune.online.inputs import RunInputs
from aligntune.online.learner import PolicyLost
from aligntune.online.ledger import Books, adopt, is_lost
from aligntune.online.role_requests import role_requests
from aligntune.online.roles import Roles
from aligntune.paths import located_storage
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.mirror import Mirror
from aligntune.runs.recorder import Recorder
from aligntune.runs.rundir import RunDir, changes
from aligntune.tracking.metrics import EventKind, NotFinite
from aligntune.tracking.trackers import TrackerMissing, check_trackers
from cluster.bundles import BadRequest, bundle_sets, totals
from cluster.placement import DoesNotFit
from cluster.reservation import reserve
from cluster.session import ClusterUnreachable, resolve_address, session

T = TypeVar("T")

FAILURES = (
    RunFailed,
    RoleExhausted,
    ReplicaLost,
    PolicyLost,
    ModelError,
    RewardFailed,
    NotFinite,
    ArithmeticError,
)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to."""

    steps: int
    metrics: dict[str, float]  # of the last step
    books: Books
    seconds: float
    output_dir: Path
    model: Path  # save_pretrained folder
    engine: str  # the rollout engine that really ran
    backend: str  # what really loaded and stepped the policy, with versions

    def describe(self) -> str:
        """One line for a person."""
        books = self.books
        return (
            f"done: {self.steps} steps, {books.trained} groups trained, {books.filtered} filtered, "
            f"{books.quarantined} quarantined; the model is in {self.model}"
        )


class OnlineTrainer:
    """PPO-family training through the controller."""

    def __init__(
        self, config: RunConfig, functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        """`functions` are reward callables by criterion name, for those without an import path."""
        self.inputs = RunInputs(config, functions or {})

    @property
    def config(self) -> RunConfig:
        """The config, as it was given until something is read, and settled from then on."""
        return self.inputs.config

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """The rewards as the reward actors get them. Raises UserError."""
        return self.inputs.criteria

    @property
    def prompts(self) -> PromptSource:
        """The training prompts, all checked. Raises DataError, a UserError."""
        return self.inputs.prompts

    @cached_property
    def eval_prompts(self) -> list[Prompt]:
        """The held-out prompts, in order. Raises DataError, a UserError."""
        held_out = self.inputs.held_out
        return list(held_out.epoch()) if held_out else []

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        prompts = self.prompts.positions_in(train.epochs or 1.0)
        return max(1, math.ceil(prompts / train.groups_per_step))

    def check(self, resume: str = "auto") -> RunDir:
        """Everything that can be checked without starting Ray. Raises UserError."""
        self.inputs.settle(resume)
        rundir = RunDir(Path(self.config.output_dir).absolute())
        rundir.check(self.config, resume)
        try:
            bundle_sets(role_requests(self.config), self.config.cluster.colocate)
        except BadRequest as error:
            raise UserError(str(error)) from error
        if resolve_address(self.config.cluster) == "local":
            check_installed(self.config.backend)
        try:
            check_trackers(self.config.tracking.trackers)
        except TrackerMissing as error:
            raise UserError(str(error)) from error
        if self.config.algorithm.needs.critic:
            try:
                check_critic_model(self.config.model, self.config.critic)
            except ModelError as error:
                raise UserError(f"critic.model: {error}") from error
        _ = self.criteria, self.prompts, self.eval_prompts
        return rundir

    def settle(self, resume: str = "auto") -> None:
        """Decide what the config leaves open of what the roles take, by the machines that there
        are; connects to the cluster that the config names, if it names one. Raises UserError."""
        mirror = self._mirror(RunDir(Path(self.config.output_dir).absolute()))
        self.inputs.settle_resources(resume, mirror.config() if mirror else None)

    def summary(self) -> str:
        """What a run would do, for --dry-run: data, steps and what the roles ask for."""
        source, train = self.prompts, self.config.train
        requests = role_requests(self.config)
        asked = totals(requests)
        lines = [
            f"{self.config.algorithm_name}: {self.total_steps} steps of {train.groups_per_step} "
            f"groups x {train.completions_per_group} completions",
            f"data: {len(source)} prompts, longest {source.longest} tokens",
            *self.inputs.told(),
            *(f"{r.role}: {r.replicas} x {r.cpus:g} CPU, {r.gpus:g} GPU" for r in requests),
            f"together: {asked['CPU']:g} CPU, {asked['GPU']:g} GPU",
        ]
        return "\n".join(lines)

    def train(self, resume: str = "auto") -> TrainResult:
        """Train to the last step, from the newest checkpoint in `output_dir` if there is one.

        Args:
            resume: auto, never, or a checkpoint folder.

        Raises:
            UserError: the input is wrong; nothing was started.
            RunFailed: the run cannot go on; what was trained is in its last checkpoint.
            Interrupted: SIGINT or SIGTERM; what was trained is in a checkpoint.
        """
        started = time.monotonic()
        rundir = self.check(resume)
        self.settle(resume)
        changed = rundir.check(self.config, resume)
        rundir.claim()
        try:
            checkpoints = Checkpoints(rundir.file("checkpoints"), self.config.checkpoint.keep_last)
            mirror = self._mirror(rundir)
            if mirror is not None and mirror.is_ahead_of(checkpoints, resume):
                changed = changes(mirror.config(), self.config, f"checkpoint.storage {mirror.uri}")
                mirror.fetch()
            damaged = checkpoints.damaged()
            checkpoint = rundir.start_from(checkpoints, resume)
            if checkpoint and checkpoint.state["prompts"] != self.prompts.fingerprint:
                raise UserError(
                    f"the prompts, their columns, order or rendering have changed since the "
                    f"checkpoint of step {checkpoint.step}, so the run cannot go on where it was; "
                    "restore the data, or name another output_dir"
                )
            ledger = rundir.file("ledger.jsonl")
            if checkpoint and (checkpoints.is_from_elsewhere(checkpoint) or is_lost(ledger)):
                adopt(ledger, checkpoint.state["ledger"], checkpoint.step)
            if checkpoint and resume != "auto":
                checkpoint = checkpoints.adopt(checkpoint)
            rundir.describe(self.config)
            after = checkpoint.step if checkpoint else 0
            with Recorder(self.config, rundir, self.total_steps, after) as recorder:
                recorder.event(EventKind.RUN_STARTED, changed={k: v[1] for k, v in changed.items()})
                for kind, fields in self.inputs.events():
                    recorder.event(kind, **fields)
                for line in self.inputs.told():
                    recorder.note(line)
                for name in damaged:
                    recorder.event(EventKind.CHECKPOINT_DAMAGED, path=name)
                try:
                    with self._roles() as roles:
                        controller = assemble(
                            self.config,
                            roles,
                            self.total_steps,
                            self.prompts,
                            self.eval_prompts,
                            rundir,
                            checkpoints,
                            recorder,
                            mirror,
                        )
                        metrics = asyncio.run(_with_signals(controller, controller.run(checkpoint)))
                except Interrupted as stopped:
                    recorder.event(EventKind.RUN_STOPPED, reason=str(stopped))
                    raise
                except FAILURES as failed:
                    recorder.event(EventKind.RUN_STOPPED, reason=str(failed))
                    raise RunFailed(str(failed)) from failed
                except Exception as unforeseen:
                    reason = " ".join(f"{type(unforeseen).__name__}: {unforeseen}".split())
                    trace = "".join(traceback.format_exception(unforeseen))
                    recorder.event(EventKind.RUN_STOPPED, reason=reason, traceback=trace)
                    if isinstance(unforeseen, UserError):
                        raise
                    raise RunFailed(
                        f"{reason} (the traceback is in {rundir.file('events.jsonl')})"
                    ) from unforeseen
                recorder.event(EventKind.RUN_FINISHED, step=self.total_steps)
                return TrainResult(
                    steps=self.total_steps,
                    metrics=metrics,
                    books=controller.books,
                    seconds=time.monotonic() - started,
                    output_dir=rundir.path,
                    model=rundir.model,
                    engine=recorder.engine,
                    backend=recorder.backend,
                )
        finally:
            rundir.release()

    def _mirror(self, rundir: RunDir) -> Mirror | None:
        checkpoint = self.config.checkpoint
        if checkpoint.storage is None:
            return None
        longest = checkpoint.copy_timeout_s
        storage = located_storage(checkpoint.storage)
        return Mirror(storage, rundir.path, checkpoint.keep_last, longest)

    @contextmanager
    def _roles(self) -> Iterator[Roles]:
        """A Ray session with every role's place reserved."""
        requests = role_requests(self.config)
        asked = totals(requests)
        cluster = self.config.cluster
        try:
            with (
                session(cluster, cpus=asked["CPU"], gpus=asked["GPU"]),
                reserve(
                    requests,
                    cluster.placement_timeout_s,
                    cluster.colocate,
                    Path(self.config.output_dir).name,
                ) as reservation,
            ):
                yield Roles(self.config, reservation, self.criteria, self.total_steps)
        except (DoesNotFit, ClusterUnreachable) as error:
            raise UserError(str(error)) from error

    def evaluate(self) -> dict[str, float]:
        """`eval/*` figures of the trained model in `output_dir`, or of the starting model before.

        Raises UserError where the config names no held-out prompts.
        """
        if not self.eval_prompts:
            raise UserError("nothing to evaluate on; set data.eval_path or data.eval_split")
        self.settle()
        trained = RunDir(Path(self.config.output_dir)).model
        name = str(trained) if trained.is_dir() else self.config.model.name
        model = self.config.model.model_copy(update={"name": name, "lora": None})
        config = self.config.model_copy(update={"model": model})
        trainer = OnlineTrainer(config, self.inputs.functions)
        with trainer._roles() as roles:
            return asyncio.run(evaluate_model(config, roles, self.eval_prompts))

    def save_model(self, path: str | Path) -> Path:
        """Copy the trained model (safetensors, tokenizer, generation config) to a new folder."""
        return RunDir(Path(self.config.output_dir)).copy_model(Path(path))


async def _with_signals(controller: Controller, run: Coroutine[Any, Any, T]) -> T:
    """Await the run with SIGINT and SIGTERM asking it to stop."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        return await run  # only the main thread gets signals
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, controller.stop, int(number))
    try:
        return await run
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
