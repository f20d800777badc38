"""The loop itself, over roles that answer at once: what it does at stops, losses and restarts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from actors.messages import (
    FinishReason,
    GroupRecord,
    GroupWork,
    Prompt,
    Scores,
    UpdateResult,
    VersionSpan,
)
from actors.supervise import ObjectsLost
from aligntune.algorithms.base import Algorithm
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.errors import Interrupted, RunFailed
from aligntune.online import controller as module
from aligntune.online import serving
from aligntune.online.controller import Controller
from aligntune.online.learner import PolicyLost, Weights
from aligntune.online.ledger import audit
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.jsonl import read_lines
from aligntune.runs.recorder import Recorder
from aligntune.runs.rundir import RunDir

STEPS = 3
Hook = Callable[..., Any]


class Reference:
    """An object in the store, or one that is gone with its node."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(self._value, Exception):
            future.set_exception(self._value)
        else:
            future.set_result(self._value)
        return future


class World:
    """A run's folder, and the roles of its processes, each of which can be told to misbehave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = RunConfig.model_construct()
        self.scores: Callable[[int], tuple[float, float]] = lambda group: (1.0, 0.0)
        self.texts: Callable[[int], Any] = lambda group: (f"{group}a", f"{group}b")
        self.during: dict[str, Hook] = {}  # role's method: called first, with what it was given
        self.updates: list[tuple[int, Algorithm]] = []
        self.version = 0
        self.prepare: Hook | None = None
        self.controller: Controller | None = None

    async def happens(self, what: str, *args: Any) -> None:
        if hook := self.during.get(what):
            answer = hook(*args)
            if asyncio.iscoroutine(answer):
                await answer

    def configure(self, **changes: Any) -> None:
        """The run's settings, some other than usual; `algorithm` by default GRPO without KL."""
        self.config = load_config(
            {
                "algorithm": {"name": "grpo", "beta": 0.0},
                "model": {"name": "m"},
                "data": {"path": "d"},
                "rewards": ["length"],
                "output_dir": str(self.folder),
                "train": ahead(0),
                "eval": {"every_steps": 1},
                "checkpoint": {"every_steps": 1},
                "tracking": {"trackers": []},
                **changes,
            }
        )

    def run(self, evaluated: bool = True) -> dict[str, float]:
        """One process of the run, from its newest checkpoint."""
        self.version = 0  # of the model that is started from
        rundir, prompt = RunDir(self.folder), Prompt(0, "a", "a", np.array([1]))
        checkpoints = Checkpoints(self.folder / "checkpoints", 2)
        checkpoint = checkpoints.latest()
        roles = SimpleNamespace(
            policy=None,
            critic=None,
            rollout=None,
            reward=None,
            reference=None,
            room_for_rollout=None,
        )
        prompts = SimpleNamespace(prompt_at=lambda position: prompt, fingerprint="f")
        after = checkpoint.step if checkpoint else 0
        with Recorder(self.config, rundir, STEPS, after) as recorder:
            self.controller = Controller(
                self.config,
                roles,  # type: ignore[arg-type]
                STEPS,
                prompts,  # type: ignore[arg-type]
                [prompt] if evaluated else [],
                rundir,
                checkpoints,
                recorder,
            )
            return asyncio.run(asyncio.wait_for(self.controller.run(checkpoint), 60))

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl without times."""
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))}
            for row in read_lines(self.folder / "metrics.jsonl")
        ]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_lines(self.folder / "events.jsonl") if e["kind"] == kind]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    (tmp_path / "run").mkdir()
    world = World(tmp_path / "run")

    class FakeLearner:
        def __init__(self, *_: Any) -> None: ...

        async def start(self) -> list[tuple[str, dict[str, Any]]]:
            await world.happens("start")
            return [("policy-0", {"pid": 1})]

        async def blind(self, _: Path) -> list[str]:
            return []

        async def update(
            self, step: int, algorithm: Algorithm, works: Sequence[GroupWork]
        ) -> UpdateResult:
            world.updates.append((step, algorithm))
            await world.happens("update", step)
            return UpdateResult(metrics={"loss/policy": float(step)}, seconds=0.1, tokens=4)

        async def export(self, version: int) -> Weights:
            world.version = version
            return Weights(version, f"weights {version}", 0)

        async def save(self, folder: Path) -> None:
            await world.happens("save")
            (folder / "policy" / "weights").write_text("x")

        async def load(self, _: Path) -> None: ...

        async def save_model(self, folder: Path) -> None:
            os.makedirs(folder, exist_ok=True)

        def kill(self) -> None: ...

    class FakeReplicas:
        def __init__(self, role: str, size: int, make: Any, prepare: Any, **_: Any) -> None:
            if role == "rollout":
                world.prepare = prepare

        async def start(self) -> None: ...

        async def broadcast(self, method: str, *args: Any, **_: Any) -> list[Any]:
            await world.happens(method, *args)
            return []

        async def call(self, method: str, *args: Any, **options: Any) -> tuple[Any, ...]:
            if dispatched := options.get("on_dispatch"):
                dispatched("replica-0")
            await world.happens(method, *args)
            if method == "generate":
                group = args[1].group_id
                spans = ((VersionSpan(world.version, 1),),) * 2
                stop = (FinishReason.STOP,) * 2
                return GroupRecord(group, 1, (1, 1), stop, spans, 0.1, "replica-0"), group
            values = tuple((score,) for score in world.scores(args[1]))
            return Scores(args[1], ("length",), values, 0.1), Reference(world.texts(args[1]))

        async def close(self) -> None: ...

    async def evaluation(*_: Any) -> dict[str, float]:
        assert world.controller is not None
        await world.happens("evaluate", world.controller.version)
        return {"eval/reward/mean": 0.5 + world.controller.version / 10}

    monkeypatch.setattr(module, "Learner", FakeLearner)
    monkeypatch.setattr(serving, "ReplicaSet", FakeReplicas)
    monkeypatch.setattr(module, "evaluate", evaluation)
    world.configure()
    return world


@pytest.mark.parametrize("stopped_at", range(STEPS + 1))
def test_a_stop_amid_an_evaluation_loses_no_figure(
    world: World, tmp_path: Path, stopped_at: int
) -> None:
    whole = world.run()
    expected = world.rows()
    assert [row["step"] for row in expected] == list(range(STEPS + 1))
    assert all("eval/reward/mean" in row for row in expected)

    world.folder = tmp_path / "stopped"
    world.folder.mkdir()
    world.configure()

    async def stop(version: int) -> None:
        if version == stopped_at:
            assert world.controller is not None
            world.controller.stop(signal.SIGTERM)
            await asyncio.Event().wait()

    world.during["evaluate"] = stop
    with pytest.raises(Interrupted):
        world.run()
    assert len(world.rows()) == stopped_at
    del world.during["evaluate"]
    last = world.run()
    assert world.rows() == expected
    assert last.keys() == whole.keys()
    assert audit(world.folder / "ledger.jsonl").balanced


@pytest.mark.parametrize("stopped_at", [0, 2])
def test_figures_that_a_checkpoint_kept_are_written_once_however_often_it_is_gone_back_to(
    world: World, stopped_at: int
) -> None:
    async def stop(version: int) -> None:
        if version == stopped_at:
            assert world.controller is not None
            world.controller.stop(signal.SIGTERM)
            await asyncio.Event().wait()

    def die(step: int) -> None:
        raise MemoryError("killed")

    world.during["evaluate"] = stop
    with pytest.raises(Interrupted):
        world.run()
    world.during = {"update": die}
    with pytest.raises(MemoryError):
        world.run()
    world.during = {}
    world.run()
    assert [row["step"] for row in world.rows()] == list(range(STEPS + 1))


def test_a_finished_run_that_is_called_again_gives_its_last_figures(world: World) -> None:
    first = world.run()
    assert world.run() == first
    assert len(world.updates) == STEPS


def test_options_changed_on_resume_are_those_that_train(world: World) -> None:
    world.during["evaluate"] = lambda version: (
        world.controller.stop(signal.SIGTERM) if version == 1 and world.controller else None
    )
    with pytest.raises(Interrupted):
        world.run()
    del world.during["evaluate"]
    world.configure(algorithm={"name": "grpo", "beta": 0.0, "clip_high": 0.5})
    world.run()
    assert [(step, algorithm.clip_high) for step, algorithm in world.updates] == [
        (1, 0.2),
        (2, 0.5),
        (3, 0.5),
    ]


DAPO = {"name": "dapo", "overlong_shaping": False}


async def settle() -> None:
    """Lets whatever can go on go on."""
    for _ in range(50):
        await asyncio.sleep(0)


def ahead(max_staleness: int) -> dict[str, Any]:
    """Rollouts that may run ahead of the updates."""
    return {
        "steps": STEPS,
        "groups_per_step": 2,
        "completions_per_group": 2,
        "groups_per_minibatch": 2,
        "max_staleness": max_staleness,
    }


def test_a_group_filtered_while_a_checkpoint_is_written_counts_in_the_resumed_run_too(
    world: World, tmp_path: Path
) -> None:
    """Group 4 comes to its end between the figures of step 2 and the checkpoint of step 2."""

    def configure() -> None:
        world.configure(algorithm=DAPO, train=ahead(1))
        world.scores = lambda group: (1.0, 1.0) if group == 4 else (1.0, 0.0)
        saving = asyncio.Event()

        async def score(prompt: Prompt, group: int) -> None:
            if group == 4:
                await saving.wait()

        async def save() -> None:
            assert world.controller is not None
            if world.controller.version == 2:
                saving.set()
                await settle()

        world.during = {"score": score, "save": save}

    configure()
    world.run()
    expected = [row["groups/filtered"] for row in world.rows()[1:]]
    assert expected == [0, 0, 1]

    world.folder = tmp_path / "killed"
    world.folder.mkdir()
    configure()

    def die(step: int) -> None:
        if step == 3:
            raise MemoryError("killed")

    world.during["update"] = die
    with pytest.raises(MemoryError):
        world.run()
    del world.during["update"]
    world.run()
    assert [row["groups/filtered"] for row in world.rows()[1:]] == expected


def test_a_group_filtered_during_an_update_is_replaced_during_it(world: World) -> None:
    world.configure(algorithm=DAPO, train=ahead(1))
    world.scores = lambda group: (1.0, 1.0) if group in (2, 3) else (1.0, 0.0)
    rolled: list[int] = []
    updating = asyncio.Event()

    async def score(prompt: Prompt, group: int) -> None:
        rolled.append(group)
        if group in (2, 3):
            await updating.wait()

    async def update(step: int) -> None:
        if step == 1:
            assert rolled == [0, 1, 2, 3]
            updating.set()
            await settle()
            assert rolled == [0, 1, 2, 3, 4, 5]

    world.during = {"score": score, "update": update}
    world.run()
    assert len(world.updates) == STEPS


def test_a_full_step_is_trained_on_however_much_was_filtered(world: World) -> None:
    world.configure(algorithm={**DAPO, "max_sampling_rounds": 1}, train=ahead(3))
    world.scores = lambda group: (1.0, 1.0) if group < 2 else (1.0, 0.0)
    world.run()
    assert [step for step, _ in world.updates] == [1, 2, 3]


def test_a_step_that_never_fills_ends_with_the_metric_that_was_looked_at(world: World) -> None:
    world.configure(algorithm={**DAPO, "metric": "length"}, train=ahead(0))
    world.scores = lambda group: (0.25, 0.25)
    with pytest.raises(RunFailed, match=r"length of those filtered: 0\.25 x \d+"):
        world.run()


def test_a_text_that_is_lost_with_its_node_costs_its_sample_and_nothing_else(world: World) -> None:
    lost = ObjectLostError("0" * 56, None, "")
    world.texts = lambda group: lost if group == 1 else (f"{group}a", f"{group}b")
    world.run()
    assert [row["step"] for row in world.rows()] == list(range(STEPS + 1))
    samples = read_lines(world.folder / "samples.jsonl")
    assert [sample["completion"] for sample in samples][:3] == ["0a", None, "2a"]


def test_weights_lost_with_their_node_rebuild_the_policy(world: World) -> None:
    lost = iter([False, True])

    def load(bundle: Any) -> None:
        if next(lost, False):
            raise ObjectsLost("an argument of load_weights is lost")

    world.during["load_weights"] = load
    world.run()
    (rebuilt,) = world.events("policy_rebuilt")
    assert (rebuilt["from_version"], rebuilt["to_version"]) == (2, 1)
    assert [row["step"] for row in world.rows()] == list(range(STEPS + 1))
    assert len(world.events("role_started")) == 2, "the new ranks say who they are too"


def test_a_replica_that_starts_with_lost_weights_has_the_policy_rebuilt(world: World) -> None:
    """Its own restarts are not spent on weights that no longer exist."""
    loaded: list[str] = []

    class Handle:
        """A rollout actor."""

        def __init__(self) -> None:
            self.start = SimpleNamespace(remote=lambda: ref({"groups_at_once": 7}))
            self.load_weights = SimpleNamespace(remote=self.load)

        def load(self, bundle: str) -> Any:
            loaded.append(bundle)
            return ref(ObjectsLost("gone") if len(loaded) == 1 else 0.1)

    def ref(value: Any) -> Any:
        return value

    async def answer(value: Any, *_: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    slots: list[asyncio.Task[int]] = []

    def update(step: int) -> None:
        if step == 2 and not slots:
            assert world.prepare is not None
            slots.append(asyncio.create_task(world.prepare(Handle(), "rollout-1")))

    world.during["update"] = update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "answer", answer)
        world.run()
    assert slots[0].result() == 7
    (rebuilt,) = world.events("policy_rebuilt")
    assert "gone" in rebuilt["reason"]
    assert len(loaded) >= 2


def test_a_policy_that_keeps_being_lost_ends_the_run(world: World) -> None:
    world.configure(policy={"max_restarts": 2})

    def die(step: int) -> None:
        raise PolicyLost("policy-0: died during update")

    world.during["update"] = die
    with pytest.raises(RunFailed, match="the policy was lost 3 times"):
        world.run()
    assert audit(world.folder / "ledger.jsonl").balanced
