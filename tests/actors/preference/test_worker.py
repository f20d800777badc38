"""What a worker of a preference job does from its start to its end, in this process; a folder plays
Ray Train's storage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.preference import worker
from actors.preference.relay import Relay
from actors.preference.worker import After, after_step, owes_evaluation, train_worker
from tests.actors.preference.test_trainers import PAIRS, columns_of, job_of, table

Happens = Callable[[Any, Relay], None]
"""Something that befalls the model and the relay."""


class Work:
    """Runs the worker of a job that saves each step, as often as it is called: again it goes on."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.kept = folder / "checkpoints"
        self.news: list[tuple[str, dict[str, Any]]] = []
        self.told: list[str] = []  # to Ray Train and to the disk, in order
        self.relay = Relay()
        self.happens: dict[tuple[str, int], Happens] = {}

    def __call__(self, steps: int, *overrides: str, **changes: Any) -> None:
        kind, self.relay = "reward_model", Relay()
        job = job_of(self.model, self.folder, overrides, kind=kind, steps=steps, held_out=2)
        job = replace(job, scratch="scratch", **{"save_every": 1, **changes})
        rows = table(columns=columns_of(kind))
        given = {"job": job, "train": rows, "eval": rows.slice(0, 2)}
        try:
            train_worker({**given, "relay": _remote(self.relay)})
        finally:
            self.news = self.relay.take()
            self.happens.clear()

    @property
    def saved(self) -> list[str]:
        """The checkpoints that there are."""
        return sorted(folder.name for folder in self.kept.glob("*"))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """News of one kind."""
        return [fields for told, fields in self.news if told == kind]

    # What stands for Ray Train

    def get_world_rank(self) -> int:
        return 0

    get_local_rank = get_world_rank

    def get_world_size(self) -> int:
        return 1

    def get_storage(self) -> Any:
        return self

    def persist_current_checkpoint(self, checkpoint: Any, name: str) -> Any:
        from ray.train import Checkpoint

        return Checkpoint.from_directory(shutil.copytree(checkpoint.path, self.kept / name))

    def report(
        self,
        metrics: Mapping[str, int],
        checkpoint: Any,
        checkpoint_dir_name: str,
        checkpoint_upload_fn: Callable[[Any, str], Any],
    ) -> None:
        checkpoint_upload_fn(checkpoint, checkpoint_dir_name)
        self.told.append("report")

    def get_checkpoint(self) -> Any:
        from ray.train import Checkpoint

        return Checkpoint.from_directory(self.kept / self.saved[-1]) if self.saved else None


def _remote(relay: Relay) -> Any:
    """`relay` as a handle whose calls are answered at once."""
    names = ("tell", "take", "stop", "fail", "fatal", "leave_unread", "unread")
    return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(relay, name)) for name in names})


@pytest.fixture
def work(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    import ray.train
    from ray.train import collective
    from transformers import TrainerCallback

    made = Work(tiny_model, tmp_path)

    class At(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.happen("before", state.global_step + 1, given["model"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.happen("amid", state.global_step + 1, given["model"])

        def happen(self, when: str, step: int, model: Any) -> None:
            made.happens.get((when, step), lambda *_: None)(model, made.relay)

    real = worker.build_trainer

    def build(*args: Any) -> Any:
        trainer = real(*args)
        trainer.add_callback(At())
        return trainer

    monkeypatch.setattr(worker, "build_trainer", build)
    monkeypatch.setattr(worker, "_introduce", lambda relay, backend: None)
    monkeypatch.setattr(worker, "answer_of", lambda answer: answer)
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ray.train, "get_context", lambda: made)
    monkeypatch.setattr(ray.train, "report", made.report)
    monkeypatch.setattr(ray.train, "get_checkpoint", made.get_checkpoint)
    monkeypatch.setattr(collective, "barrier", lambda: made.told.append("barrier"))
    threads, before = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


def diverge(model: Any, relay: Relay) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def stop(model: Any, relay: Relay) -> None:
    relay.stop("save")


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 3])
def test_a_step_that_has_diverged_is_in_no_checkpoint_and_in_no_model(
    work: Work, last: int
) -> None:
    work.happens["before", 2] = diverge
    work(last, eval_at_end=True)
    assert work.saved == ["step-000001"]
    assert [fields["step"] for fields in work.of("step")] == [1, 2]
    assert work.of("step")[1]["metrics"]["loss"] != work.of("step")[1]["metrics"]["loss"]
    assert not (work.folder / "model").exists()


@pytest.mark.slow
def test_a_checkpoint_is_on_disk_before_it_counts_and_all_ranks_wait_for_it(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        work.told.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    work(1)
    first, *synced, report, last = work.told[: work.told.index("report") + 2]
    assert (first, report, last) == ("barrier", "report", "barrier")
    files = {str(path) for path in work.kept.rglob("*")}
    assert len(files) > 5
    assert {*synced} == files | {str(work.kept)}
    model = work.folder / "model"
    exported = {str(path) for path in [model, *model.rglob("*"), work.folder]}
    assert {*work.told[len(synced) + 3 :]} == exported


@pytest.mark.slow
def test_the_step_that_runs_as_a_stop_comes_is_the_last_and_its_evaluation_is_made_up_for(
    work: Work,
) -> None:
    evaluated = {"eval_every": 2, "save_every": 9}
    work.happens["amid", 2] = stop
    work(4, **evaluated)
    assert work.saved == ["step-000002"]
    assert not any("eval/loss" in fields["metrics"] for fields in work.of("step"))
    assert [kind for kind, _ in work.news].count("training") == 1

    work.happens["amid", 4] = stop  # which ends as it would
    work(4, **evaluated)
    told = {fields["step"]: fields["metrics"] for fields in work.of("step")}
    assert [*told] == [2, 3, 4]
    assert "loss" not in told[2], "which was told before"
    assert [step for step in told if "eval/loss" in told[step]] == [2, 4]
    kinds = [kind for kind, _ in work.news if kind in ("started", "step", "training")]
    assert kinds[:3] == ["started", "step", "training"]
    assert (work.folder / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_samples_a_second_are_of_the_rows_that_a_step_really_had(work: Work) -> None:
    work(3, f"train.pairs_per_worker={PAIRS - 2}")
    rows = [
        fields["metrics"]["throughput/samples_per_s"] * fields["metrics"]["time/step"]
        for fields in work.of("step")
    ]
    assert rows == pytest.approx([PAIRS - 2, 2, PAIRS - 2])


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_gone_on_from_is_named(work: Work) -> None:
    work(1)
    torn = work.kept / "step-000001" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"cannot go on from .*/step-000001: .*Error: ") as said:
        work(2)
    assert "\n" not in str(said.value)
    assert work.relay.unread() == "step-000001"
    assert work.relay.fatal() == "", "the next try may read it"


@pytest.mark.parametrize(
    ("step", "rows", "owes"),
    [
        (4, [{"step": 4, "loss": 1.0}], True),
        (4, [{"step": 4, "loss": 1.0}, {"step": 4, "eval_loss": 1.0}], False),
        (4, [{"step": 2, "eval_loss": 1.0}], True),
        (3, [{"step": 2, "eval_loss": 1.0}], False),
        (9, [{"step": 9, "loss": 1.0}], True),
        (9, [{"step": 9, "eval_loss": 1.0}], False),
    ],
)
def test_what_was_not_evaluated_when_it_was_due_is_owed(
    tmp_path: Path, step: int, rows: list[dict[str, Any]], owes: bool
) -> None:
    job = replace(job_of(tmp_path, tmp_path, steps=9), eval_every=2, eval_at_end=True)
    assert owes_evaluation(job, {"global_step": step, "log_history": rows}) is owes


@pytest.mark.parametrize(
    ("step", "asked", "after"),
    [
        (1, "", After(evaluates=False, saves=False, stops=False)),
        (2, "", After(evaluates=True, saves=False, stops=False)),
        (3, "", After(evaluates=False, saves=True, stops=False)),
        (1, "save", After(evaluates=False, saves=True, stops=True)),
        (6, "save", After(evaluates=False, saves=True, stops=True)),
        (6, "drop", After(evaluates=False, saves=False, stops=True)),
        (7, "", After(evaluates=True, saves=True, stops=False)),
        (7, "drop", After(evaluates=True, saves=True, stops=False)),
    ],
)
def test_a_stop_takes_the_place_of_what_is_due_but_after_the_last_step(
    tmp_path: Path, step: int, asked: str, after: After
) -> None:
    job = replace(job_of(tmp_path, tmp_path, steps=7), eval_every=2, eval_at_end=True, save_every=3)
    assert after_step(job, step, asked) == after
