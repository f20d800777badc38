"""A preference job as the driver sees it: starts Ray Train, follows the relay, writes it all down.

Invariant: `metrics.jsonl` has every step once, whatever was killed: on a restart the steps after
the checkpoint are forgotten, and those before it that were not written come from the checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from actors.preference.relay import PreferenceJob, Relay, RelaySilent, announcer, answer_of
from actors.preference.worker import train_worker
from aligntune.config.preference import PreferenceConfig
from aligntune.data.row_tokens import RowTokens
from aligntune.errors import Interrupted, RunFailed
from aligntune.imports import variables_of
from aligntune.loops import STOPPING, stop_signals
from aligntune.runs.deadline import asked
from aligntune.tracking.lines import evaluated
from aligntune.tracking.metrics import EventKind, NotFinite

if TYPE_CHECKING:
    from aligntune.runs.recorder import Recorder

POLL_SECONDS = 0.2
MORE_MEMORY = (
    "set model.gradient_checkpointing=true, eval.pairs_per_worker lower where it was evaluating, "
    "or in a new output_dir train.pairs_per_worker or data.max_length lower"
)
STOP_SECONDS = 120.0  # for the workers to end after a signal, where they train no step


class Figures:
    """Keeps the last figures; what an evaluation needs of a recorder."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.backend = ""

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Nothing is written."""

    def stopping(self, text: str) -> None:
        """Nothing is shown."""

    def role(self, info: Mapping[str, Any]) -> None:
        """What a worker said of itself."""
        self.backend = str(info["backend"])

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step."""
        self.last = _halved_ties(metrics)

    def restart(self, step: int, history: Mapping[int, Mapping[str, float]]) -> None:
        """Steps after `step` come again."""


class Recorded(Figures):
    """What workers tell, in a run's files: every step once, whatever they tell again."""

    def __init__(
        self,
        recorder: Recorder,
        known: int,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        """`known` is the last step in metrics.jsonl, -1 where there is none; `saved` is called
        beside the job when there is a new checkpoint."""
        super().__init__()
        self._recorder = recorder
        self._saved = saved
        self._saving: Future[None] | None = None
        self._step = known
        self._starts = 0

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Write an event."""
        self._recorder.event(kind, **fields)
        idle = self._saving is None or self._saving.done()
        if kind is EventKind.CHECKPOINT_SAVED and idle:  # else the disk or service is slow
            self._saving = asked(self._saved)
            self._saving.add_done_callback(self._told)

    def _told(self, saving: Future[None]) -> None:
        if (error := saving.exception()) is not None:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._recorder.event(
                EventKind.NOT_COPIED, path="the list of checkpoints", reason=reason
            )

    def stopping(self, text: str) -> None:
        """Show that the job was asked to stop."""
        self._recorder.stopping(text)

    def role(self, info: Mapping[str, Any]) -> None:
        """What a worker said of itself when it started; config.yaml says what really runs."""
        super().role(info)
        self._recorder.role("trainer", {k: v for k, v in info.items() if k != "role"})

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step. Raises NotFinite for a figure that is none.

        Those of an evaluation alone are of a step that a stop left without it: they join its row.
        """
        if step == self._step and "loss" not in metrics:
            metrics = {**self._recorder.written(step), **metrics}
            self._recorder.truncate_after(step - 1)
        elif step <= self._step:
            return
        figures = _halved_ties(metrics)
        self._recorder.step(step, figures)
        self._step = step
        super().step(step, figures)

    def restart(self, step: int, history: Mapping[int, Mapping[str, float]]) -> None:
        """The workers start at `step`: later figures are forgotten, missing ones written."""
        self._starts += 1
        if step:
            self.event(EventKind.RESUMED, step=step)
        elif self._starts > 1:
            self.event(EventKind.REPLICA_RESTARTED, role="trainer", step=0)
        first = step if step else -1
        self._recorder.truncate_after(first)
        self._step = min(self._step, first)
        for known in sorted(history):
            if self._step < known <= step:
                self.step(known, history[known])
        held_out = [row for n, row in sorted(history.items()) if n <= step and evaluated(row)]
        self._recorder.last_evaluated(_halved_ties(held_out[-1]) if held_out else {})
        # With the times, which no checkpoint holds.
        self.last = self._recorder.written(step) or self.last


class PreferenceRun:
    """One Ray Train job, from its start to its end."""

    def __init__(
        self,
        config: PreferenceConfig,
        job: PreferenceJob,
        storage: Mapping[str, Any],
        recorder: Figures,
        before: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        """`storage` is where Ray Train keeps its checkpoints, as its RunConfig takes it; `before`
        gives the folder of the checkpoint before the one of that name."""
        self._config = config
        self._job = job
        self._storage = storage
        self._recorder = recorder
        self._before = before
        self._training = False  # the workers are at a step, which they can save
        self._signal = 0
        self._error: BaseException | None = None

    def follow(self, train: RowTokens, evaluation: RowTokens | None) -> None:
        """Run the job and write down what happens. Raises RunFailed, NotFinite or Interrupted."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        near = NodeAffinitySchedulingStrategy(here, soft=False)
        relay = ray.remote(Relay).options(num_cpus=0, scheduling_strategy=near).remote()
        try:
            thread = threading.Thread(
                target=self._fit, args=(relay, train, evaluation), name="ray-train", daemon=True
            )
            thread.start()
            with stop_signals(self._stop):
                self._listen(relay, thread)
            self._write(_answer(relay.take.remote()))
            if fatal := _answer(relay.fatal.remote()):
                raise RunFailed(f"the trainer's worker could not start: {fatal}")
            if self._error is not None:
                raise self._failed(self._error, _answer(relay.unread.remote())) from self._error
            if self._signal:
                raise Interrupted(self._signal)
        finally:
            ray.kill(relay)

    def _fit(self, relay: Any, train: RowTokens, evaluation: RowTokens | None) -> None:
        import pyarrow
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from actors.preference.meeting import RoutedTorchConfig

        spec = self._config.train
        resources = {"CPU": spec.resources.cpus}
        if spec.resources.gpus:
            resources["GPU"] = spec.resources.gpus
        if spec.resources.memory_gib:
            resources["memory"] = spec.resources.memory_gib * 2**30
        unsloth = self._config.backend == "unsloth"
        threads, gpus = spec.resources.threads, spec.resources.gpus
        variables = variables_of(threads, gpus, by_itself=unsloth)
        tables = [
            None if pairs is None else pyarrow.table(pairs.columns) for pairs in (train, evaluation)
        ]
        try:
            TorchTrainer(
                train_worker,
                train_loop_config={
                    "job": self._job,
                    "relay": relay,
                    "train": tables[0],
                    "eval": tables[1],
                },
                torch_config=RoutedTorchConfig(),
                scaling_config=ScalingConfig(
                    num_workers=spec.workers,
                    use_gpu=spec.resources.gpus > 0,
                    resources_per_worker=resources,
                    placement_strategy=spec.resources.placement,
                ),
                run_config=RunConfig(
                    **self._storage,
                    worker_runtime_env={"env_vars": variables} if variables else {},
                    callbacks=[announcer(relay)],
                    failure_config=FailureConfig(max_failures=spec.max_failures),
                    checkpoint_config=CheckpointConfig(
                        num_to_keep=self._config.checkpoint.keep_last
                    ),
                ),
            ).fit()
        except Exception as error:  # noqa: BLE001  # it is the job's end, told by `follow`
            self._error = error

    def _listen(self, relay: Any, thread: threading.Thread) -> None:
        heard, stopping = time.monotonic(), False
        limit, waiting_for = self._config.train.start_timeout_s, "train.start_timeout_s"
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            try:
                news = _answer(relay.take.remote())
                self._write(news)
            except NotFinite:
                relay.stop.remote("drop")
                thread.join(STOP_SECONDS)
                raise
            now = time.monotonic()
            if news and not stopping:  # whatever it says, a worker has started
                heard, limit = now, self._config.train.step_timeout_s
                waiting_for = "train.step_timeout_s"
            elif any(self._training or kind != "alive" for kind, _ in news):  # nearer to its end
                heard = now
            if self._signal and not stopping:
                stopping, heard = True, now
                self._recorder.stopping(STOPPING)
                relay.stop.remote("save")
            if stopping:
                limit = self._config.train.step_timeout_s if self._training else STOP_SECONDS
            if now - heard > limit:
                relay.stop.remote("drop")
                if stopping:
                    raise Interrupted(self._signal)
                raise RunFailed(
                    f"the workers gave no sign of life for {limit:g} s ({waiting_for}); the "
                    "cluster may be full, or a worker hangs"
                )

    def _write(self, news: list[tuple[str, dict[str, Any]]]) -> None:
        for kind, fields in news:
            match kind:
                case "role":  # of a worker that is being built
                    self._training = False
                    self._recorder.role(fields)
                case "started":
                    self._recorder.restart(fields["step"], fields["history"])
                case "training":
                    self._training = True
                case "step":
                    self._recorder.step(fields["step"], fields["metrics"])
                case "checkpoint":
                    self._recorder.event(EventKind.CHECKPOINT_SAVED, step=fields["step"])
                case "alive":
                    pass

    def _failed(self, error: BaseException, unread: str) -> RunFailed:
        """What a person is told of a job that `error` ended, after the checkpoint `unread` if its
        workers could not go on from one."""
        older = self._before(unread) if unread else None
        return RunFailed(_lines(error) + (f"; to go back: --resume {older}" if older else ""))

    def _stop(self, number: int) -> None:
        self._signal = number


def _halved_ties(metrics: Mapping[str, float]) -> dict[str, float]:
    """Figures in which pairs that are all ties, as before the first update, are right by half.

    TRL counts a tie as wrong. An accuracy of 0 with a mean margin of 0 leaves nothing but ties.
    """
    halved = {
        f"{prefix}reward/accuracy": 0.5
        for prefix in ("", "eval/")
        if metrics.get(f"{prefix}reward/accuracy") == metrics.get(f"{prefix}reward/margin") == 0.0
    }
    return {**metrics, **halved}


def _answer(call: Any) -> Any:
    """What a remote call of the relay returns. Raises RunFailed where it does not in time."""
    try:
        return answer_of(call)
    except RelaySilent as error:
        raise RunFailed(str(error)) from error


def _lines(error: BaseException) -> str:
    """What ended a Ray Train job: its last line, where the worker's own error stands, and what
    helps where that is a GPU's memory."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    return f"the training job failed: {last}" + f"; {MORE_MEMORY}" * ("CUDA out of memory" in last)
