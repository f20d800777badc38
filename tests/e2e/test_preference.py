"""DPO and reward-model jobs on a real Ray: what they learn, and that nothing killed stops them."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligntune import create_rl_trainer
from aligntune.errors import RunFailed
from aligntune.preference_trainer import PreferenceTrainer
from aligntune.tracking.metrics import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EVEN, ODD = "02468", "13579"


def write_pairs(path: Path, rows: int, seed: int) -> Path:
    """Even digits are preferred to odd ones, whatever was asked."""
    rng = random.Random(seed)
    lines = [
        {
            "prompt": f"{rng.randrange(100)}+{rng.randrange(100)}",
            "chosen": "".join(rng.choices(EVEN, k=2)),
            "rejected": "".join(rng.choices(ODD, k=2)),
        }
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 400, seed=0)
    write_pairs(folder / "held.jsonl", 64, seed=1)
    return folder


@pytest.fixture
def job(tiny_model: Path, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        overrides = changes.pop("overrides", [])
        return {
            "model_name": str(tiny_model),
            "dataset_name": str(data / "train.jsonl"),
            "algorithm": "dpo",
            "output_dir": str(tmp_path / "run"),
            "batch_size": 8,
            "learning_rate": 1e-3,
            "max_steps": 20,
            "overrides": [
                f"data.eval_path={data / 'held.jsonl'}",
                "tracking.trackers=[]",
                *overrides,
            ],
            **changes,
        }

    return make


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line for line in lines}


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = read_lines(path) if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
    return found


@pytest.mark.long
def test_dpo_on_two_workers_learns_and_outlives_a_killed_worker(
    ray_session: None, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    trainer = create_rl_trainer(
        **job(max_steps=60, overrides=["train.workers=2", "checkpoint.every_steps=10"])
    )
    killed: list[int] = []

    def kill_one_worker() -> None:
        wait_for(lambda: events_of(folder, "checkpoint_saved"), 300)
        rank = next(e for e in events_of(folder, "role_started") if e["rank"] == 1)
        os.kill(rank["pid"], signal.SIGKILL)
        killed.append(rank["pid"])

    killer = threading.Thread(target=kill_one_worker)
    killer.start()
    result = trainer.train()
    killer.join()
    assert killed
    steps = steps_of(folder)
    assert list(steps) == list(range(61))
    assert steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["eval/reward/accuracy"] == 0.0
    assert steps[60]["eval/reward/accuracy"] >= 0.9
    assert result.steps == 60
    resumed = events_of(folder, "resumed")
    assert [event["step"] % 10 for event in resumed] == [0]
    assert len(events_of(folder, "role_started")) == 4
    assert result.backend == "trl 1.13.0"  # type: ignore[union-attr]
    assert (result.model / "model.safetensors").is_file()
    assert trainer.evaluate()["eval/reward/accuracy"] == pytest.approx(
        steps[60]["eval/reward/accuracy"], abs=0.05
    )


@pytest.mark.long
def test_one_worker_has_the_losses_of_bare_trl(
    ray_session: None,
    job: Callable[..., dict[str, Any]],
    data: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    trainer = create_rl_trainer(**job(max_steps=6))
    trainer.train()
    ours = [steps_of(tmp_path / "run")[step]["loss"] for step in range(1, 7)]
    script = """
import json, sys
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
model, data, out = sys.argv[1:]
rows = [json.loads(line) for line in open(data)]
say = lambda role, text: [{"role": role, "content": text}]
rows = [
    {"prompt": say("user", r["prompt"]), "chosen": say("assistant", r["chosen"]),
     "rejected": say("assistant", r["rejected"])} for r in rows
]
args = DPOConfig(out, max_steps=6, per_device_train_batch_size=8, learning_rate=1e-3, seed=0,
    use_cpu=True, bf16=False, report_to="none", logging_steps=1, gradient_checkpointing=False,
    save_strategy="no", disable_tqdm=True, max_length=None)
trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(model))
losses = []
log = trainer.log
def keep(logs, *rest):
    if "loss" in logs:
        losses.append(logs["loss"])
    log(logs, *rest)
trainer.log = keep
trainer.train()
print(json.dumps(losses))
"""
    bare = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            str(tiny_model),
            str(data / "train.jsonl"),
            str(tmp_path / "b"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    theirs = json.loads(bare.stdout.strip().splitlines()[-1])
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(set(theirs)) == 6


@pytest.mark.long
def test_a_killed_driver_is_resumed_to_the_same_end(
    job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    arguments = job(max_steps=30, algorithm="reward_model", overrides=["checkpoint.every_steps=10"])
    script = "import json, sys; from aligntune import create_rl_trainer as c; "
    script += "c(**json.loads(sys.argv[1])).train()"
    root = Path(__file__).parents[2]

    def start(folder: Path) -> subprocess.Popen[bytes]:
        given = json.dumps({**arguments, "output_dir": str(folder)})
        return subprocess.Popen(
            [sys.executable, "-c", script, given],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    folder, whole = tmp_path / "run", tmp_path / "whole"
    process = start(folder)
    try:
        wait_for(lambda: events_of(folder, "checkpoint_saved"), 300)
    finally:
        process.kill()
        process.wait()
    assert start(folder).wait(600) == 0
    assert start(whole).wait(600) == 0
    one, other = steps_of(folder), steps_of(whole)
    assert list(one) == list(other) == list(range(31))
    for step in (1, 15, 30):
        assert one[step]["loss"] == pytest.approx(other[step]["loss"], abs=1e-6)
    assert [event["step"] for event in events_of(folder, "resumed")] in ([10], [20], [30])


def test_what_no_restart_can_mend_ends_the_job_with_its_reason(
    ray_session: None, job: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in os.listdir(tiny_model):
        if not name.endswith(".safetensors"):
            (broken / name).write_bytes((tiny_model / name).read_bytes())
    trainer = create_rl_trainer(**job(model_name=str(broken)))
    with pytest.raises(RunFailed, match=r"worker could not start: ModelError: .*broken"):
        trainer.train()


@pytest.mark.long
def test_a_reward_model_ranks_above_chance_and_serves_as_a_reward(
    ray_session: None, tmp_path: Path
) -> None:
    from aligntune.quickstart import make_task, preference_pairs, write_assets
    from aligntune.trainers import OnlineTrainer

    assets = write_assets(tmp_path / "assets", seed=0)
    held = tmp_path / "held.jsonl"
    rows = preference_pairs(make_task(0).held_out, seed=1)
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = create_rl_trainer(
        model_name=str(assets.model),
        dataset_name=str(assets.pairs),
        algorithm="reward_model",
        output_dir=str(tmp_path / "rm"),
        batch_size=64,
        learning_rate=2e-3,
        max_steps=200,
        overrides=[
            f"data.eval_path={held}",
            "eval.pairs_per_worker=128",
            "tracking.trackers=[]",
            "train.warmup_steps=20",
            "train.adam_betas=[0.9, 0.99]",
            "checkpoint.every_steps=200",
        ],
    )
    assert isinstance(trainer, PreferenceTrainer)
    result = trainer.train()
    assert result.metrics["eval/reward/accuracy"] >= 0.6  # of held-out pairs
    online = create_rl_trainer(
        model_name=str(assets.model),
        dataset_name=str(assets.train),
        algorithm="grpo",
        reward_model_name=str(result.model),
        output_dir=str(tmp_path / "grpo"),
        max_steps=1,
        batch_size=4,
        overrides=[
            "rollout.engine=transformers",
            "rollout.max_completion_length=8",
            "train.groups_per_minibatch=4",
            "tracking.trackers=[]",
        ],
    )
    assert isinstance(online, OnlineTrainer)
    metrics = online.train().metrics
    assert metrics["reward/model/mean"] == pytest.approx(metrics["reward/mean"])
    assert metrics["reward/std"] > 0
