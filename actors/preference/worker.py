"""The worker function of a preference job: TRL's DPOTrainer or RewardTrainer in a Ray Train worker.

What the worker gets is tokenised already, so that every worker trains on the same tokens and a
reward model on those it is asked about later. Invariant: the relay is told of a step before the
checkpoint of that step is written, and a checkpoint holds the figures of all steps up to it; so a
driver that follows the relay misses no step, whatever is killed. A checkpoint is on disk before it
counts, and none holds a step that has diverged.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from actors.preference.relay import PreferenceJob, RelaySilent, SignOfLife, answer_of
from actors.preference.trainers import backend_in_use, build_trainer, export_model
from actors.storage import to_disk

METRICS = {
    "loss": "loss",
    "grad_norm": "policy/grad_norm",
    "learning_rate": "policy/learning_rate",
    "epoch": "epoch",
    "num_tokens": "tokens",
    "entropy": "policy/entropy",
    "mean_token_accuracy": "policy/token_accuracy",
    "rewards/accuracies": "reward/accuracy",
    "rewards/margins": "reward/margin",
    "rewards/chosen": "reward/chosen",
    "rewards/rejected": "reward/rejected",
    "accuracy": "reward/accuracy",
    "margin": "reward/margin",
    "mean_reward": "reward/mean",
    "min_reward": "reward/min",
    "max_reward": "reward/max",
    "logps/chosen": "logprobs/chosen",
    "logps/rejected": "logprobs/rejected",
    "logits/chosen": "logits/chosen",
    "logits/rejected": "logits/rejected",
    "runtime": "time/eval",
}
"""What TRL and transformers call a figure, and what it is called here; others are left out."""


def renamed(logs: dict[str, Any]) -> dict[str, float]:
    """The figures of a log entry under the names of this project."""
    found = {}
    for name, value in logs.items():
        prefix = "eval/" if name.startswith("eval_") else ""
        known = METRICS.get(name.removeprefix("eval_"))
        if known is not None and isinstance(value, int | float):
            found[prefix + known] = float(value)
    return found


def history_of(entries: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The figures by step of a checkpoint's log."""
    steps: dict[int, dict[str, float]] = {}
    for entry in entries:
        if found := renamed(entry):
            steps.setdefault(int(entry["step"]), {}).update(found)
    return steps


def train_worker(config: dict[str, Any]) -> None:
    """One worker of a job. `config` has the job, the relay, and the tables of pairs.

    Raises whatever ends this worker; Ray Train then starts all of them again from the last
    checkpoint. What came before the first step would come again: it is told to the relay too.
    """
    import ray.train

    job: PreferenceJob = config["job"]
    relay: Any = config["relay"]
    if answer_of(relay.fatal.remote()):
        return
    context = ray.train.get_context()
    scratch = Path(tempfile.gettempdir()) / job.scratch
    alive = SignOfLife(relay)
    try:
        if job.backend == "unsloth":
            from actors.models.unsloth import import_unsloth

            import_unsloth()  # before transformers and TRL, which it patches
        from transformers import PrinterCallback

        _introduce(relay, backend_in_use(job))
        trainer = build_trainer(job, config["train"], config["eval"], scratch, alive)
        follower = _follower(job, relay, alive)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(follower)
    except RelaySilent:
        raise
    except Exception as error:
        relay.fail.remote(_reason(error))
        raise
    try:
        if job.steps == 0:
            answer_of(relay.tell.remote("started", step=0, history={}))
            trainer.evaluate()
            follower.flush()
            return
        _train(trainer, job, relay, follower)
        if not (follower.stopped or follower.diverged):
            export_model(trainer, job, scratch)
    finally:
        if context.get_local_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _introduce(relay: Any, backend: str) -> None:
    """Say who this worker is, before anything that takes long."""
    import ray
    import ray.train
    import torch

    context = ray.train.get_context()
    device = f"cuda:{context.get_local_rank()}" if torch.cuda.is_available() else "cpu"
    answer_of(
        relay.tell.remote(
            "role",
            role="trainer",
            rank=context.get_world_rank(),
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            device=device,
            backend=backend,
        )
    )


def _train(trainer: Any, job: PreferenceJob, relay: Any, follower: Any) -> None:
    """Train from the last checkpoint, or from the beginning; a checkpoint that has all the steps is
    only loaded. One that a stop left without its evaluation is evaluated first.

    Raises RuntimeError, with the checkpoint, where the run cannot go on from it.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.args.eval_on_start = job.eval_at_start
        trainer.train()
        return
    try:
        with checkpoint.as_directory() as folder:
            state = json.loads((Path(folder) / "trainer_state.json").read_bytes())
            trainer.args.eval_on_start = owes_evaluation(job, state)
            trainer.train(resume_from_checkpoint=folder)
    except RelaySilent:
        raise
    except Exception as error:
        if follower.went_on:
            raise
        relay.leave_unread.remote(Path(checkpoint.path).name)
        reason = f"the run cannot go on from {checkpoint.path}: {_reason(error)}"
        raise RuntimeError(reason) from error


def owes_evaluation(job: PreferenceJob, state: Mapping[str, Any]) -> bool:
    """Whether the step of a checkpoint is due for an evaluation that its `state`, the trainer's,
    has no figures of."""
    step = state["global_step"]
    rows = [row for row in state["log_history"] if row["step"] == step]
    return _evaluates(job, step) and not any("eval_loss" in row for row in rows)


class After(NamedTuple):
    """What follows a step."""

    evaluates: bool
    saves: bool
    stops: bool  # before the job's last step


def after_step(job: PreferenceJob, step: int, asked: str) -> After:
    """What follows `step`, where `Relay.stop` was called as `asked` says, or "" where it was not. A
    stop that comes with the last step changes nothing."""
    last = step >= job.steps
    if asked and not last:
        return After(evaluates=False, saves=asked == "save", stops=True)
    saves = _due(step, job.save_every) or (last and job.save_at_end)
    return After(_evaluates(job, step), saves, stops=False)


def _evaluates(job: PreferenceJob, step: int) -> bool:
    return _due(step, job.eval_every) or (step >= job.steps and job.eval_at_end)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _reason(error: BaseException) -> str:
    """The error in one line, and where in this project or TRL it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(str(error).split())
    return f"{type(error).__name__}: {what} ({Path(where.filename).name}:{where.lineno})"


def _follower(job: PreferenceJob, relay: Any, alive: SignOfLife) -> Any:
    """The callback that says when to evaluate, save and stop, and tells the relay."""
    import ray.train
    import torch
    from ray.train.collective import barrier
    from transformers import TrainerCallback

    context = ray.train.get_context()
    leads = context.get_world_rank() == 0
    tell: Callable[..., str] = lambda kind, **fields: answer_of(relay.tell.remote(kind, **fields))  # noqa: E731

    def agreed(word: str) -> str:
        """What rank 0 has, on every rank."""
        if context.get_world_size() == 1:
            return word
        words = [word]
        torch.distributed.broadcast_object_list(words, src=0)
        return words[0]

    class Follower(TrainerCallback):
        def __init__(self) -> None:
            self.stopped = False  # before its last step
            self.diverged = False
            self.went_on = False  # to a step, with all that a checkpoint has
            self._asked = ""
            self._began = 0.0
            self._pending: tuple[int, dict[str, float]] | None = None

        def flush(self) -> None:
            """Tell the figures of the last step, once."""
            pending, self._pending = self._pending, None
            if pending is not None and leads:
                self._asked = tell("step", step=pending[0], metrics=pending[1])

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if leads:
                history = history_of(state.log_history) if state.global_step else {}
                tell("started", step=state.global_step, history=history)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.flush()
            if leads and not self.went_on:
                tell("training")
            self.went_on = True
            self._began = time.monotonic()

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            alive()

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            alive()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if leads:  # the step that runs while a stop is asked for is the last
                self._asked = tell("alive") or self._asked
            self._asked = agreed(self._asked)
            after = after_step(job, state.global_step, self._asked)
            self.stopped = after.stops
            control.should_log = True
            control.should_evaluate, control.should_save = after.evaluates, after.saves
            if after.stops:
                control.should_training_stop = True

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if not logs or "train_runtime" in logs:
                return
            figures = renamed(logs)
            if "loss" in figures and self._began:
                figures["time/step"] = seconds = time.monotonic() - self._began
                figures["throughput/samples_per_s"] = logs["rows"] / seconds
            step, known = self._pending or (state.global_step, {})
            self._pending = (step, {**known, **figures})
            # All of them are of all ranks, which so agree without a word.
            self.diverged = self.diverged or not all(map(math.isfinite, figures.values()))
            if self.diverged:  # the driver ends the job when it hears of it
                control.should_evaluate = control.should_save = False
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.flush()
            barrier()  # every rank's part is in the folder
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            name = f"step-{state.global_step:06d}"
            holds = context.get_local_rank() == 0 and folder.is_dir()
            checkpoint = ray.train.Checkpoint.from_directory(folder) if holds else None
            ray.train.report(
                {"step": state.global_step},
                checkpoint=checkpoint,
                checkpoint_dir_name=name,
                checkpoint_upload_fn=_put_on_disk,
            )
            if holds:
                shutil.rmtree(folder)
            barrier()  # without a deadline; a rank in torch's next collective has torch's

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.flush()

    return Follower()


def _put_on_disk(checkpoint: Any, name: str) -> Any:
    """Where Ray Train keeps `checkpoint` from now on: copied there as it does itself, and forced to
    disk, for it lists the checkpoint next and may remove the one before."""
    import ray.train

    kept = ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)
    to_disk(kept.filesystem, kept.path)
    return kept
