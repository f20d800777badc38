"""PreferenceTrainer: DPO, reward models and SFT as one Ray Train job, all checked before it
starts."""

from __future__ import annotations

import math
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.preference.relay import PreferenceJob
from aligntune import imports
from aligntune.config.preference import DPOSpec, PreferenceConfig, check_passes
from aligntune.config.warm_up import SFTSpec
from aligntune.data.row_tokens import RowTokens
from aligntune.errors import RunFailed, UserError
from aligntune.paths import located_model
from aligntune.preference.inputs import PairInputs
from aligntune.preference.job import Figures, PreferenceRun, Recorded
from aligntune.preference.storage import JobStorage, step_of
from aligntune.resources import role_request
from aligntune.runs.ended import (
    Scored,
    check_ends,
    how_it_ended,
    is_over,
    last_figures,
    model_to_score,
    said_by_roles,
    started_with,
    tell_over,
)
from aligntune.runs.hub import check_hub
from aligntune.runs.lifecycle import check_programs, claimed, ray_runs, recorded
from aligntune.runs.modes import as_usual
from aligntune.runs.publish import push, write_card_of
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind, NotFinite
from cluster.bundles import BadRequest, RoleRequest, bundle_sets, totals
from cluster.placement import DoesNotFit
from cluster.session import ClusterUnreachable, RayTooSlow, session

FILLED_IN = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
"""What the trainer tells DeepSpeed from the rest of the config; another value given is refused."""
_SCHEDULES = {"constant": "constant_with_warmup"}
"""The names of transformers' schedules where they are not ours: its `constant` has no warm-up."""


@dataclass(frozen=True)
class PreferenceResult:
    """What a finished job came to."""

    steps: int
    metrics: dict[str, float]  # of the last step, `eval/*` figures included
    seconds: float
    output_dir: Path
    model: Path  # save_pretrained folder
    backend: str  # what really ran, with versions
    already: bool = False  # it had ended before, and nothing was started

    def describe(self) -> str:
        """One line for a person."""
        names = {"eval/reward/accuracy": "accuracy", "eval/loss": "loss"}
        known = next((name for name in names if name in self.metrics), None)
        held_out = "" if known is None else f", held-out {names[known]} {self.metrics[known]:.3f}"
        ended = how_it_ended(self.already)
        return f"{ended}: {self.steps} steps{held_out}; the model is in {self.model}"


class PreferenceTrainer:
    """DPO, reward models and supervised warm-up."""

    def __init__(
        self, config: PreferenceConfig, objects: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        """`objects` is the rewards that were given as Python objects, by place in the config."""
        self.inputs = PairInputs(config, objects or {})
        self._settled = False

    @property
    def config(self) -> PreferenceConfig:
        """The config, as it was given until something is read, and settled from then on."""
        return self.inputs.config

    @property
    def _rundir(self) -> RunDir:
        return RunDir(Path(self.config.output_dir).absolute())

    @property
    def pairs(self) -> RowTokens:
        """The training pairs, all checked. Raises DataError, a UserError."""
        return self.inputs.pairs

    @property
    def eval_pairs(self) -> RowTokens | None:
        """The held-out pairs, if the config names any. Raises DataError, a UserError."""
        return self.inputs.eval_pairs

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole job."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        passes = math.ceil(len(self.inputs.table) / train.pairs_per_worker / train.workers)
        return math.ceil((train.epochs or 1.0) * math.ceil(passes / train.accumulation_steps))

    def check(self, resume: str = "auto") -> RunDir:
        """Everything that can be checked without starting Ray, and before the machines decide what
        is left to them. Raises UserError."""
        rundir = self._rundir
        rundir.check_place()
        self.inputs.check_places()
        if not rundir.trained:  # one that goes on has its rows already
            self.inputs.data.check_apart()
        self.inputs.settle()
        rundir.check(self.config, resume)
        config = self.config
        try:
            bundle_sets(self._requests, config.cluster.colocate)
        except BadRequest as error:
            raise UserError(str(error)) from error
        check_programs(config.backend, config.tracking, config.cluster)
        check_hub(config.hub)
        storage = self._storage(rundir)
        storage.check(self.config, resume, fresh=not rundir.trained)
        reached = self._reached(resume)
        _ = self.pairs
        check_passes(config, self.eval_pairs is not None)
        if resume in ("auto", "never") and "checkpoint.storage" in rundir.changed:
            before, _ = rundir.changed["checkpoint.storage"]
            JobStorage(before, rundir.path).check_left(reached)
        if self.config.train.steps is not None:
            self._check_steps(reached, rundir)
        if reached:
            storage.check_rows(self.inputs.digest, reached, fresh=not rundir.trained)
        return rundir

    def _reached(self, resume: str) -> int:
        """The step of the checkpoint that `train(resume)` goes on from; 0 without one."""
        storage = self._storage(self._rundir)
        if resume in ("auto", "never"):
            return storage.newest_step()
        return step_of(storage.named(resume))

    def _check_steps(self, reached: int, rundir: RunDir) -> None:
        """Whether the run ends after step `reached`, or at it with no other settings of training.
        Steps of epochs are those of the batch, so the job is settled first. Raises UserError."""
        check_ends(self.config.train.steps, self.total_steps, reached, rundir.changed)

    def settle(self) -> None:
        """Decide, the first time, what the config leaves open of what the workers take, by the
        machines that there are; connects to the cluster that the config names, if it names one.
        Raises UserError."""
        if self._settled:
            return
        self.inputs.settle_workers(self._storage(self._rundir).config())
        self._settled = True

    def summary(self, resume: str = "auto") -> str:
        """What `train(resume)` would do: steps, data, what was decided and what workers ask for.

        It settles first, and starts nothing. Raises UserError.
        """
        self.settle()
        rundir = self._rundir
        rundir.check(self.config, resume)
        self._check_steps(self._reached(resume), rundir)
        pairs, train = self.pairs, self.config.train
        held_out = len(self.eval_pairs) if self.eval_pairs else 0
        things, table = self.inputs.things, self.inputs.table
        unit = things if table is pairs else "sequences"
        packs = "" if table is pairs else f", packed into {len(table)} sequences"
        return "\n".join(
            (
                f"{self.config.algorithm_name}: {self.total_steps} steps of "
                f"{train.pairs_per_step} {unit} with {self.config.backend}",
                f"data: {len(pairs)} of {pairs.dropped.rows} {things}{packs}, longest "
                f"{pairs.longest} tokens; {held_out} held out",
                *self.inputs.told(),
                f"trainer: {train.workers} x {train.resources.cpus:g} CPU, "
                f"{train.resources.gpus:g} GPU",
            )
        )

    def train(self, resume: str = "auto") -> PreferenceResult:
        """Train to the last step, from the newest checkpoint if there is one.

        Args:
            resume: auto, never, or a checkpoint folder of this run.

        Raises:
            UserError: the input is wrong; nothing was started.
            RunFailed: the job cannot go on; what was trained is in its last checkpoint.
            Interrupted: SIGINT or SIGTERM; what was trained is in a checkpoint.
        """
        from aligntune.runs.recorder import Recorder, last_step

        started = time.monotonic()
        rundir = self.check(resume)
        self.settle()
        rundir.check(self.config, resume)
        storage = self._storage(rundir)
        if not rundir.trained:  # then it may go on from its storage
            rundir.changed = storage.check(self.config, resume, fresh=True) or rundir.changed
        self._check_steps(self._reached(resume), rundir)
        if resume == "auto" and is_over(rundir, self.total_steps):
            tell_over(rundir, self.total_steps)
            return PreferenceResult(
                steps=self.total_steps,
                metrics=last_figures(rundir),
                seconds=0.0,
                output_dir=rundir.path,
                model=rundir.model,
                backend=said_by_roles(rundir, "backend"),
                already=True,
            )
        with claimed(rundir):
            rundir.describe(self.config)
            storage.describe(self.config, self.inputs.digest)
            known = last_step(rundir.file("metrics.jsonl"))
            files = Recorder(
                self.config, self.config.tracking, rundir, self.total_steps, max(known, 0), started
            )
            with recorded(files, rundir, self.total_steps, (NotFinite,)) as recorder:
                told = Recorded(recorder, known, storage.keep_list)
                for kind, fields in self.inputs.events():
                    recorder.event(kind, **fields)
                for line in [*rundir.told(), *self.inputs.told()]:
                    recorder.note(line)
                if (damaged := storage.mend()) is not None:
                    recorder.event(EventKind.CHECKPOINT_DAMAGED, path=damaged)
                job = self._job(self.total_steps, export=storage.export)
                with self._session(recorder.stage):
                    recorder.starting({"trainer": (1, "the model is loading")})
                    if resume not in ("auto", "never"):
                        storage.rewind(storage.named(resume))
                    place = storage.ray_arguments()
                    PreferenceRun(self.config, job, place, told, storage.before).follow(
                        self.inputs.table, self.inputs.eval_table
                    )
                storage.fetch(rundir.model)
                as_usual(rundir.model)
                write_card_of(rundir, self.total_steps, recorder)
                push(rundir, self.config.hub, recorder)
                return PreferenceResult(
                    steps=self.total_steps,
                    metrics=told.last,
                    seconds=time.monotonic() - started,
                    output_dir=rundir.path,
                    model=rundir.model,
                    backend=told.backend,
                )

    def scored(self) -> Scored:
        """The model that `evaluate` scores. Raises UserError where the run has none of its own."""
        decided = self.inputs.settle_model()
        return started_with(model_to_score(self._rundir, self.config.model.name), decided)

    def evaluate(self) -> dict[str, float]:
        """`eval/*` figures of the trained model in `output_dir`, or of the starting model before.

        Raises UserError where the config names no held-out pairs, or the run is not at its end.
        """
        scored = self.scored()
        if self.eval_pairs is None:
            raise UserError("nothing to evaluate on; set data.eval_path or data.eval_split")
        self.settle()
        trained = scored.model if scored.origin == "export" else None
        job = self._job(0, export="", trained=trained)
        figures = Figures()
        name = f"aligntune-evaluation-{uuid.uuid4().hex}"
        with self._session(), tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            place = {"storage_path": folder, "name": name}
            run = PreferenceRun(self.config, job, place, figures)
            run.follow(self.inputs.table, self.inputs.eval_table)
        return figures.last

    def save_model(self, path: str | Path) -> Path:
        """Copy the trained model (safetensors, tokenizer) to a new folder."""
        return self._rundir.copy_model(Path(path))

    @property
    def _requests(self) -> list[RoleRequest]:
        train = self.config.train
        return [role_request("trainer", train.workers, train.resources)]

    @contextmanager
    def _session(self, stage: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """A Ray that can hold the job; `stage` hears of it. Raises UserError where none can."""
        from cluster.reservation import ensure_possible

        cluster, asked = self.config.cluster, totals(self._requests)
        try:
            sets = bundle_sets(self._requests, cluster.colocate)
            with session(
                cluster,
                cpus=asked["CPU"],
                imports=imports.of_preference(self.config),
            ) as address:
                stage(ray_runs(address))
                ensure_possible(sets)
                yield
        except RayTooSlow as error:
            raise RunFailed(str(error)) from error
        except (BadRequest, DoesNotFit, ClusterUnreachable) as error:
            raise UserError(str(error)) from error

    def _storage(self, rundir: RunDir) -> JobStorage:
        return JobStorage(self.config.checkpoint.storage, rundir.path)

    def _job(self, steps: int, export: str, trained: str | None = None) -> PreferenceJob:
        config, evaluation = self.config, self.config.eval
        held_out = self.eval_pairs is not None
        return PreferenceJob(
            kind=config.algorithm.name,
            backend=config.backend,
            model=located_model(config.model),  # Ray Train's workers change the folder
            seed=config.train.seed,
            steps=steps,
            arguments=_arguments(config),
            scratch=f"aligntune-{uuid.uuid4().hex}",
            export=export,
            max_length=self.inputs.max_length,
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
    """The keyword arguments of TRL's DPOConfig, RewardConfig or SFTConfig that the config stands
    for."""
    train, algorithm = config.train, config.algorithm
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": train.pairs_per_worker,
        "per_device_eval_batch_size": config.eval.pairs_per_worker,
        "gradient_accumulation_steps": train.accumulation_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": _SCHEDULES.get(train.scheduler, train.scheduler),
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_betas[0],
        "adam_beta2": train.adam_betas[1],
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "deepspeed": None if train.deepspeed is None else _deepspeed(train.deepspeed),
        "max_length": None,
    }
    if isinstance(algorithm, SFTSpec):
        return {
            **arguments,
            "loss_type": "nll",
            "padding_free": algorithm.packing,
            # Or a mixture's own share of the loss would count once a forward pass and worker.
            "router_aux_loss_coef": 0.0,
            "dataset_kwargs": {"skip_prepare_dataset": True},  # the rows are tokens and labels
        }
    arguments["disable_dropout"] = False  # LoRA's, too; the model's own is off where it is loaded
    if not isinstance(algorithm, DPOSpec):
        return {**arguments, "center_rewards_coefficient": algorithm.center_coefficient}
    cut = config.data.long_rows in ("keep_start", "keep_end")
    return {
        **arguments,
        "beta": algorithm.beta,
        "loss_type": algorithm.losses,
        "loss_weights": algorithm.loss_weights,
        "label_smoothing": algorithm.label_smoothing,
        "f_divergence_type": algorithm.f_divergence,
        "use_weighting": algorithm.weighting,
        "router_aux_loss_coef": 0.0,
        "precompute_ref_log_probs": algorithm.precompute_reference or algorithm.reference_free,
        **({"max_length": config.data.max_length} if cut else {}),
        **({"truncation_mode": config.data.long_rows} if cut else {}),
    }


def _deepspeed(given: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config with what the trainer tells it filled in; ZeRO-3 can give the whole model
    back then, for the export."""
    zero = given.get("zero_optimization") or {}
    whole = {"stage3_gather_16bit_weights_on_model_save": True} if zero.get("stage") == 3 else {}
    return {**FILLED_IN, **given, "zero_optimization": {**whole, **zero}}
