"""PreferenceTrainer: DPO and reward models as one Ray Train job, followed to its last step.

The job's workers tell a relay what happens; this side writes it down. Invariant: `metrics.jsonl`
has every step once, whatever was killed: on a restart the steps after the checkpoint are forgotten,
and those before it that were not written come from the checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from actors.loading import ModelError, check_causal_lm, load_tokenizer
from actors.preference import PreferenceJob, Relay, filesystem_of, train_worker
from aligntune.controller import Interrupted
from aligntune.data.pairtokens import PairTokens, pair_tokens
from aligntune.data.sources import load_rows
from aligntune.errors import RunFailed, UserError
from aligntune.preference_config import DPOSpec, PreferenceConfig
from aligntune.rundir import RunDir
from aligntune.tracking.metrics import EventKind, EventsFile, MetricsFile, NotFinite, read_lines
from aligntune.tracking.progress import Progress
from aligntune.tracking.trackers import TrackerMissing, check_trackers, open_trackers
from cluster.placement import DoesNotFit, RoleRequest, shortfall
from cluster.session import ClusterUnreachable, session

POLL_SECONDS = 0.2
STOP_SECONDS = 120.0  # for the workers to save and end after a signal


@dataclass(frozen=True)
class PreferenceResult:
    """What a finished job came to."""

    steps: int
    metrics: dict[str, float]  # of the last step, `eval/*` figures included
    seconds: float
    output_dir: Path
    model: Path  # save_pretrained folder
    backend: str  # what really ran, with versions

    def describe(self) -> str:
        """One line for a person."""
        accuracy = self.metrics.get("eval/reward/accuracy")
        held_out = "" if accuracy is None else f", held-out accuracy {accuracy:.3f}"
        return f"done: {self.steps} steps{held_out}; the model is in {self.model}"


class PreferenceTrainer:
    """DPO and reward models."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    @property
    def _rundir(self) -> RunDir:
        return RunDir(Path(self.config.output_dir))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises UserError."""
        try:
            if self.config.algorithm_name == "dpo":
                check_causal_lm(self.config.model)
            return load_tokenizer(self.config.model)
        except ModelError as error:
            raise UserError(f"model.name: {error}") from error

    @cached_property
    def pairs(self) -> PairTokens:
        """The training pairs, all checked. Raises DataError, a UserError."""
        data = self.config.data
        return self._tokens(data.path, data.split, data.max_samples, hub=True)

    @cached_property
    def eval_pairs(self) -> PairTokens | None:
        """The held-out pairs, if the config names any. Raises DataError, a UserError."""
        data = self.config.data
        if not data.evaluates:
            return None
        path = data.eval_path or data.path
        return self._tokens(path, data.eval_split, data.eval_samples, hub=data.eval_path is None)

    def _tokens(self, path: str, split: str | None, rows: int | None, hub: bool) -> PairTokens:
        data = self.config.data
        return pair_tokens(
            load_rows(
                path,
                name=data.name if hub else None,
                revision=data.revision if hub else None,
                split=split,
                max_rows=rows,
            ),
            self.tokenizer,
            self.config.algorithm.name,
            prompt_column=data.prompt_column,
            chosen_column=data.chosen_column,
            rejected_column=data.rejected_column,
            bad_pairs=data.bad_pairs,
            max_length=data.max_length,
            long_pairs=data.long_pairs,
            apply_chat_template=data.apply_chat_template,
            system_prompt=data.system_prompt,
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole job."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        passes = math.ceil(len(self.pairs) / train.pairs_per_worker / train.workers)
        return math.ceil((train.epochs or 1.0) * math.ceil(passes / train.accumulation_steps))

    def check(self, resume: str = "auto") -> RunDir:
        """Everything that can be checked without starting Ray. Raises UserError."""
        if resume not in ("auto", "never"):
            raise UserError("--resume: a preference job goes on from its last checkpoint (auto)")
        rundir = self._rundir
        rundir.check(self.config, resume)
        try:
            check_trackers(self.config.tracking.trackers)
        except TrackerMissing as error:
            raise UserError(str(error)) from error
        _ = self.tokenizer, self.pairs, self.eval_pairs
        return rundir

    def summary(self) -> str:
        """What a job would do, for --dry-run."""
        train, pairs = self.config.train, self.pairs
        held_out = len(self.eval_pairs) if self.eval_pairs else 0
        return "\n".join(
            (
                f"{self.config.algorithm_name}: {self.total_steps} steps of "
                f"{train.pairs_per_step} pairs with {self.config.backend}",
                f"data: {len(pairs)} of {pairs.rows} pairs, {len(pairs.bad)} bad, {pairs.long} "
                f"over data.max_length; longest {pairs.longest} tokens; {held_out} held out",
                f"trainer: {train.workers} x {train.resources.cpus:g} CPU, "
                f"{train.resources.gpus:g} GPU",
            )
        )

    def train(self, resume: str = "auto") -> PreferenceResult:
        """Train to the last step, from the newest checkpoint if there is one.

        Args:
            resume: auto or never.

        Raises:
            UserError: the input is wrong; nothing was started.
            RunFailed: the job cannot go on; what was trained is in its last checkpoint.
            Interrupted: SIGINT or SIGTERM; what was trained is in a checkpoint.
        """
        started = time.monotonic()
        rundir = self.check(resume)
        changed = rundir.check(self.config, resume)
        rundir.claim(self.config)
        try:
            with _Recorder(self.config, rundir, self.total_steps) as recorder:
                recorder.event(EventKind.RUN_STARTED, changed={k: v[1] for k, v in changed.items()})
                if self.pairs.bad:
                    recorder.left_out(self.pairs)
                try:
                    job = self._job(self.total_steps, export=self._export(rundir))
                    with self._session():
                        _Run(self.config, job, self._storage(rundir), recorder).follow(
                            self.pairs, self.eval_pairs
                        )
                except Interrupted as stopped:
                    recorder.event(EventKind.RUN_STOPPED, reason=str(stopped))
                    raise
                except (RunFailed, NotFinite) as failed:
                    recorder.event(EventKind.RUN_STOPPED, reason=str(failed))
                    raise RunFailed(str(failed)) from failed
                _fetch(job.export, rundir.model)
                recorder.event(EventKind.RUN_FINISHED, step=self.total_steps)
                return PreferenceResult(
                    steps=self.total_steps,
                    metrics=recorder.last,
                    seconds=time.monotonic() - started,
                    output_dir=rundir.path,
                    model=rundir.model,
                    backend=recorder.backend,
                )
        finally:
            rundir.release()

    def evaluate(self) -> dict[str, float]:
        """`eval/*` figures of the trained model in `output_dir`, or of the starting model before.

        Raises UserError where the config names no held-out pairs.
        """
        if self.eval_pairs is None:
            raise UserError("nothing to evaluate on; set data.eval_path or data.eval_split")
        trained = self._rundir.model
        job = self._job(0, export="", trained=str(trained.absolute()) if trained.is_dir() else None)
        figures = _Figures()
        name = f"aligntune-evaluation-{uuid.uuid4().hex}"
        with self._session():
            import tempfile

            with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
                _Run(self.config, job, (folder, name), figures).follow(self.pairs, self.eval_pairs)
        return figures.last

    def save_model(self, path: str | Path) -> Path:
        """Copy the trained model (safetensors, tokenizer) to a new folder."""
        trained, target = self._rundir.model, Path(path)
        if not trained.is_dir():
            raise UserError(f"no trained model in {trained.parent}; call train() first")
        if target.exists():
            raise UserError(f"{target} exists; name a new folder")
        shutil.copytree(trained, target)
        return target

    @contextmanager
    def _session(self) -> Iterator[None]:
        """A Ray that can hold the job. Raises UserError where it never can."""
        train, cluster = self.config.train, self.config.cluster
        ask = RoleRequest("trainer", train.workers, train.resources.cpus, train.resources.gpus)
        try:
            with session(cluster, cpus=ask.cpus * ask.replicas, gpus=ask.gpus * ask.replicas):
                import ray

                nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
                if reason := shortfall([ask], nodes):
                    raise DoesNotFit(f"{reason}; ask for less or add nodes")
                yield
        except (DoesNotFit, ClusterUnreachable) as error:
            raise UserError(str(error)) from error

    def _storage(self, rundir: RunDir) -> tuple[str, str]:
        """Where Ray Train keeps the checkpoints: its storage path, and the folder in it."""
        return self.config.checkpoint.storage or str(rundir.path.absolute()), "checkpoints"

    def _export(self, rundir: RunDir) -> str:
        """Where the workers leave the model: beside its place, or in the storage they share."""
        storage = self.config.checkpoint.storage
        return f"{storage}/model" if storage else str(rundir.file("model.partial").absolute())

    def _job(self, steps: int, export: str, trained: str | None = None) -> PreferenceJob:
        config, evaluation = self.config, self.config.eval
        held_out = self.eval_pairs is not None
        return PreferenceJob(
            kind=config.algorithm.name,
            backend=config.backend,
            model=config.model,
            seed=config.train.seed,
            steps=steps,
            arguments=_arguments(config),
            scratch=f"aligntune-{uuid.uuid4().hex}",
            export=export,
            reference_free=isinstance(config.algorithm, DPOSpec)
            and config.algorithm.reference_free,
            trained=trained,
            eval_every=evaluation.every_steps if held_out else None,
            eval_at_start=evaluation.at_start and held_out,
            eval_at_end=evaluation.at_end and held_out,
            save_every=config.checkpoint.every_steps,
            save_at_end=config.checkpoint.at_end,
        )


def _arguments(config: PreferenceConfig) -> dict[str, Any]:
    """The keyword arguments of TRL's DPOConfig or RewardConfig that the config stands for."""
    train, algorithm = config.train, config.algorithm
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": train.pairs_per_worker,
        "per_device_eval_batch_size": config.eval.pairs_per_worker,
        "gradient_accumulation_steps": train.accumulation_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_betas[0],
        "adam_beta2": train.adam_betas[1],
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "deepspeed": train.deepspeed,
        "max_length": None,
    }
    if not isinstance(algorithm, DPOSpec):
        return {**arguments, "center_rewards_coefficient": algorithm.center_coefficient}
    cut = config.data.long_pairs in ("keep_start", "keep_end")
    return {
        **arguments,
        "beta": algorithm.beta,
        "loss_type": algorithm.losses,
        "loss_weights": algorithm.loss_weights,
        "label_smoothing": algorithm.label_smoothing,
        "f_divergence_type": algorithm.f_divergence,
        "use_weighting": algorithm.weighting,
        "precompute_ref_log_probs": algorithm.precompute_reference or algorithm.reference_free,
        **({"max_length": config.data.max_length} if cut else {}),
        **({"truncation_mode": config.data.long_pairs} if cut else {}),
    }


class _Figures:
    """Keeps the last figures; what an evaluation needs of a recorder."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.backend = ""

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Nothing is written."""

    def role(self, info: Mapping[str, Any]) -> None:
        """What a worker said of itself."""
        self.backend = str(info["backend"])

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step."""
        self.last = dict(metrics)

    def restart(self, step: int, history: Mapping[int, Mapping[str, float]]) -> None:
        """Steps after `step` come again."""


class _Recorder(_Figures, AbstractContextManager["_Recorder"]):
    """The run's files are open while this is entered."""

    def __init__(self, config: PreferenceConfig, rundir: RunDir, total_steps: int) -> None:
        super().__init__()
        self._pairs_per_step = config.train.pairs_per_step
        self._metrics = MetricsFile(rundir.file("metrics.jsonl"))
        self._events = EventsFile(rundir.file("events.jsonl"))
        self._step = max((line["step"] for line in read_lines(self._metrics.path)), default=-1)
        self._trackers = open_trackers(
            config.tracking.trackers,
            rundir.path,
            config.tracking.project,
            config.model_dump(mode="json"),
            max(self._step, 0),
        )
        self._progress = Progress(total_steps)
        self._starts = 0

    def __exit__(self, *exc: object) -> None:
        self._progress.close()
        for tracker in self._trackers:
            tracker.close()
        self._metrics.close()
        self._events.close()

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Write an event."""
        self._events.append(kind, **fields)

    def role(self, info: Mapping[str, Any]) -> None:
        """What a worker said of itself when it started."""
        super().role(info)
        self.event(EventKind.ROLE_STARTED, **info)

    def left_out(self, pairs: PairTokens) -> None:
        """Show which rows are not trained on, and why."""
        row, why = next(iter(pairs.bad.items()))
        self._progress.note(f"{len(pairs.bad)} pairs left out, the first in row {row}: {why}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step. Raises NotFinite for a figure that is none."""
        if step <= self._step:
            return
        seconds = metrics.get("time/step")
        speed = {"throughput/samples_per_s": self._pairs_per_step / seconds} if seconds else {}
        figures = {**metrics, **speed}
        self._metrics.append(step, figures)
        self._step = step
        for tracker in self._trackers:
            tracker.log(step, figures)
        super().step(step, figures)
        self._progress.evaluation(figures)
        if step:
            self._progress.step(step, figures)

    def restart(self, step: int, history: Mapping[int, Mapping[str, float]]) -> None:
        """The workers start at `step`: later figures are forgotten, missing ones written."""
        self._starts += 1
        if step:
            self.event(EventKind.RESUMED, step=step)
            self._progress.note(f"resumed: step {step}")
        elif self._starts > 1:
            self.event(EventKind.REPLICA_RESTARTED, role="trainer", step=0)
        first = step if step else -1
        self._metrics.truncate_after(first)
        for tracker in self._trackers:
            tracker.truncate_after(first)
        self._step = min(self._step, first)
        for known in sorted(history):
            if known <= step:
                self.step(known, history[known])
        self.last = dict(history.get(step, {})) or self.last


class _Run:
    """One Ray Train job, from its start to its end."""

    def __init__(
        self,
        config: PreferenceConfig,
        job: PreferenceJob,
        storage: tuple[str, str],
        recorder: _Figures,
    ) -> None:
        self._config = config
        self._job = job
        self._storage = storage
        self._recorder = recorder
        self._signal = 0
        self._error: BaseException | None = None

    def follow(self, train: PairTokens, evaluation: PairTokens | None) -> None:
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
            with self._signals():
                self._listen(relay, thread)
            self._write(ray.get(relay.take.remote()))
            if fatal := ray.get(relay.fatal.remote()):
                raise RunFailed(f"the trainer's worker could not start: {fatal}")
            if self._error is not None:
                raise RunFailed(_lines(self._error)) from self._error
            if self._signal:
                raise Interrupted(self._signal)
        finally:
            ray.kill(relay)

    def _fit(self, relay: Any, train: PairTokens, evaluation: PairTokens | None) -> None:
        import pyarrow
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        spec = self._config.train
        resources = {"CPU": spec.resources.cpus}
        if spec.resources.gpus:
            resources["GPU"] = spec.resources.gpus
        storage, name = self._storage
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
                scaling_config=ScalingConfig(
                    num_workers=spec.workers,
                    use_gpu=spec.resources.gpus > 0,
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    name=name,
                    storage_path=storage,
                    failure_config=FailureConfig(max_failures=spec.max_failures),
                    checkpoint_config=CheckpointConfig(
                        num_to_keep=self._config.checkpoint.keep_last
                    ),
                ),
            ).fit()
        except Exception as error:  # noqa: BLE001  # it is the job's end, told by `follow`
            self._error = error

    def _listen(self, relay: Any, thread: threading.Thread) -> None:
        import ray

        heard, stopping = time.monotonic(), False
        limit, waiting_for = self._config.train.start_timeout_s, "train.start_timeout_s"
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            try:
                news = ray.get(relay.take.remote(), timeout=60)
                self._write(news)
            except NotFinite:
                relay.stop.remote("drop")
                thread.join(STOP_SECONDS)
                raise
            now = time.monotonic()
            if news:
                heard = now
                if any(kind in ("started", "step") for kind, _ in news):
                    limit = self._config.train.step_timeout_s
                    waiting_for = "train.step_timeout_s"
            if self._signal and not stopping:
                stopping, heard, limit = True, now, STOP_SECONDS
                waiting_for = "the time a stopped job has"
                relay.stop.remote("save")
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
                case "role":
                    self._recorder.role(fields)
                case "started":
                    self._recorder.restart(fields["step"], fields["history"])
                case "step":
                    self._recorder.step(fields["step"], fields["metrics"])
                case "checkpoint":
                    self._recorder.event(EventKind.CHECKPOINT_SAVED, step=fields["step"])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the job to save and end; only the main thread gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: object) -> None:
            self._signal = number

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _lines(error: BaseException) -> str:
    """What ended a Ray Train job: its last line, where the worker's own error stands."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"the training job failed: {lines[-1].strip() if lines else type(error).__name__}"


def _fetch(left: str, target: Path) -> None:
    """Put the model that a worker left in place, in one rename. Raises RunFailed."""
    from pyarrow.fs import FileType, LocalFileSystem, copy_files

    filesystem, path = filesystem_of(left)
    if filesystem.get_file_info(path).type != FileType.Directory:
        raise RunFailed(
            f"the workers left no model at {left}: on several nodes output_dir must be a folder "
            "that all of them see, or set checkpoint.storage"
        )
    staged = target.with_name(target.name + ".partial")
    if not isinstance(filesystem, LocalFileSystem) or Path(path) != staged.absolute():
        copy_files(path, str(staged), source_filesystem=filesystem)
    if target.exists():
        shutil.rmtree(target)
    os.rename(staged, target)
