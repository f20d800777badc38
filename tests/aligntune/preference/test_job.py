"""A driver that follows a preference job: how long it waits for what, on a clock of the test."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from actors.preference import relay
from actors.preference.relay import ALIVE_SECONDS, RelaySilent, SignOfLife, answer_of
from aligntune.errors import Interrupted, RunFailed
from aligntune.loops import STOPPING
from aligntune.preference import job as preference_job
from aligntune.preference.job import STOP_SECONDS, Figures, PreferenceRun, Recorded
from tests.aligntune.config.test_preference import config

Follow = Callable[..., PreferenceRun]
ROLE = ("role", {"role": "trainer", "backend": "trl"})
ALIVE = ("alive", {})
TRAINING = ("training", {})


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Follows a job whose relay has `news` at each look, `seconds` apart; then the job ends."""

    def make(*news: list[Any], seconds: float = 100.0, signal: int = 0) -> PreferenceRun:
        clock = SimpleNamespace(now=0.0)
        looks = iter(news)

        def answer(call: Any, timeout: float) -> Any:
            assert timeout < 600, "no wait is without a deadline"
            return call

        def join(_: float) -> None:
            clock.now += seconds

        thread = SimpleNamespace(join=join, left=len(news))

        def is_alive() -> bool:
            thread.left -= 1
            return bool(thread.left >= 0)

        thread.is_alive = is_alive
        relay = SimpleNamespace(
            take=SimpleNamespace(remote=lambda: next(looks)),
            stop=SimpleNamespace(remote=lambda how: None),
        )
        monkeypatch.setattr(ray, "get", answer)
        monkeypatch.setattr(preference_job.time, "monotonic", lambda: clock.now)
        run = PreferenceRun(
            config("train.start_timeout_s=150", "train.step_timeout_s=1000"),
            None,  # type: ignore[arg-type]  # what it starts, and this does not
            {},
            Figures(),
        )
        run._signal = signal
        run._listen(relay, thread)  # type: ignore[arg-type]
        return run

    return make


def test_workers_that_never_start_end_the_wait_for_their_start(follow: Follow) -> None:
    with pytest.raises(RunFailed, match=r"sign of life for 150 s \(train\.start_timeout_s\)"):
        follow([], [], [])


def test_a_worker_that_has_spoken_has_started_however_long_it_builds(follow: Follow) -> None:
    follow([ROLE], *[[]] * 9)
    with pytest.raises(RunFailed, match=r"sign of life for 1000 s \(train\.step_timeout_s\)"):
        follow([ROLE], *[[]] * 11)


def test_what_takes_long_and_says_so_goes_on(follow: Follow) -> None:
    follow([ROLE], *[[ALIVE]] * 50, seconds=900)
    with pytest.raises(RunFailed, match=r"train\.step_timeout_s"):
        follow([ROLE], *[[ALIVE]] * 50, [], [], seconds=900)


def test_a_stopped_job_is_not_kept_by_signs_of_life(follow: Follow) -> None:
    with pytest.raises(Interrupted):
        follow([ROLE], *[[ALIVE]] * 9, seconds=STOP_SECONDS / 2, signal=15)
    step = ("step", {"step": 1, "metrics": {}})
    follow([ROLE], [step], [step], [step], seconds=STOP_SECONDS / 2 + 1, signal=15)


def test_a_job_that_is_stopped_amid_a_step_has_the_time_of_one_to_save_it(follow: Follow) -> None:
    begun = [ROLE], [("started", {"step": 0, "history": {}})], [TRAINING]
    follow(*begun, *[[]] * 9, signal=15)
    follow(*begun, *[[ALIVE], []] * 9, seconds=900, signal=15)  # a long evaluation
    with pytest.raises(Interrupted):
        follow(*begun, *[[]] * 11, signal=15)
    with pytest.raises(Interrupted):  # a worker has died, and what it held
        follow(*begun, [ROLE], [ALIVE], [ALIVE], signal=15)


def test_what_keeps_a_worker_from_being_built_is_no_end_once_there_was_one() -> None:
    first = relay.Relay()
    first.fail("no such model")
    first.fail("and then")
    assert first.fatal() == "no such model"
    again = relay.Relay()
    again.tell("role", rank=0)
    again.tell("started", step=0, history={})
    again.fail("the GPU is still full")
    assert again.fatal() == ""


@pytest.mark.parametrize("older", [None, "/run/checkpoints/step-000010"])
def test_a_checkpoint_that_could_not_be_read_is_told_with_the_one_before(older: str | None) -> None:
    """But for where the last workers have read it after all."""
    names: list[str] = []

    def before(name: str) -> str | None:
        names.append(name)
        return older

    run = PreferenceRun(config(), None, {}, Figures(), before)  # type: ignore[arg-type]
    error = RuntimeError("Traceback:\nRuntimeError: cannot go on from step-000020")
    said = "the training job failed: RuntimeError: cannot go on from step-000020"
    cure = f"; to go back: --resume {older}" if older else ""
    told = relay.Relay()
    told.leave_unread("step-000020")
    assert str(run._failed(error, told.unread())) == said + cure
    told.tell("started", step=20, history={})
    assert str(run._failed(error, told.unread())) == said
    assert names == ["step-000020"]


def test_that_a_job_stops_is_said_at_once_and_once(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Figures, "stopping", lambda _, text: said.append(text))
    follow([ROLE], [ALIVE], [ALIVE], seconds=1, signal=15)
    assert said == [STOPPING]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(GetTimeoutError("x"), r"no answer within 60 s"), (ActorDiedError(), "is gone, with the")],
)
def test_a_relay_that_does_not_answer_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def get(call: Any, timeout: float) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(RelaySilent, match=reason):
        answer_of(None)
    with pytest.raises(RunFailed, match=reason) as failed:
        preference_job._answer(None)
    assert "\n" not in str(failed.value)


def test_signs_of_life_are_given_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=5.0)
    told: list[str] = []
    monkeypatch.setattr(relay.time, "monotonic", lambda: clock.now)
    alive = SignOfLife(SimpleNamespace(tell=SimpleNamespace(remote=told.append)))
    for _ in range(5):
        alive()
    assert told == ["alive"]
    clock.now += ALIVE_SECONDS
    alive()
    assert told == ["alive", "alive"]


def test_a_job_that_ran_out_of_gpu_memory_names_keys_of_its_own() -> None:
    last = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    said = preference_job._lines(RuntimeError(f"Traceback:\n  at x\n{last}\n"))
    assert said.startswith(f"the training job failed: {last}; set model.gradient_checkpointing")
    assert "policy." not in said
    named = re.findall(r"[a-z]+\.[a-z_]+(?==| or| lower)", preference_job.MORE_MEMORY)
    assert named == [
        "model.gradient_checkpointing",
        "eval.pairs_per_worker",
        "train.pairs_per_worker",
        "data.max_length",
    ]
    made = config()
    for key in named:
        section, _, name = key.partition(".")
        assert hasattr(getattr(made, section), name)
    assert preference_job._lines(ValueError("one\ntwo")) == "the training job failed: two"


def test_pairs_that_are_all_ties_are_right_by_half() -> None:
    told: list[dict[str, float]] = []
    recorder = SimpleNamespace(step=lambda step, figures: told.append(figures))
    recorded = Recorded(recorder, known=-1)  # type: ignore[arg-type]
    ties = {"reward/accuracy": 0.0, "reward/margin": 0.0}
    recorded.step(0, {f"eval/{name}": value for name, value in ties.items()})
    recorded.step(1, ties)
    recorded.step(2, {"reward/accuracy": 0.0, "reward/margin": -0.1})
    recorded.step(3, {"loss": 0.5})
    assert told == [
        {"eval/reward/accuracy": 0.5, "eval/reward/margin": 0.0},
        {"reward/accuracy": 0.5, "reward/margin": 0.0},
        {"reward/accuracy": 0.0, "reward/margin": -0.1},
        {"loss": 0.5},
    ]


def test_an_evaluation_without_a_run_counts_ties_as_a_run_does() -> None:
    """`aligntune evaluate dpo.yaml` of the model it starts from, all of whose pairs are ties."""
    figures = Figures()
    figures.step(0, {"eval/reward/accuracy": 0.0, "eval/reward/margin": 0.0})
    assert figures.last["eval/reward/accuracy"] == 0.5


def test_workers_of_a_job_are_bound_to_the_interface_that_joins_their_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray.train.torch

    from actors.preference.meeting import RoutedTorchConfig

    given: dict[str, Any] = {}

    def trainer(*_: Any, **settings: Any) -> SimpleNamespace:
        given.update(settings)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    storage = {"storage_path": str(tmp_path), "name": "job"}
    run = PreferenceRun(config(), None, storage, Figures())  # type: ignore[arg-type]
    run._fit(relay=None, train=SimpleNamespace(columns={"a": [1]}), evaluation=None)  # type: ignore[arg-type]
    assert run._error is None
    assert isinstance(given["torch_config"], RoutedTorchConfig)
