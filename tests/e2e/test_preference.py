"""DPO and reward-model jobs on a real Ray: what they learn, and that nothing killed stops them."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
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
from aligntune.errors import RunFailed, UserError
from aligntune.preference.trainer import PreferenceTrainer
from aligntune.runs.jsonl import read_lines

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


def kill_a_worker(folder: Path, killed: list[int]) -> threading.Thread:
    """Kills rank 1 once a checkpoint is there; started."""

    def kill() -> None:
        wait_for(lambda: events_of(folder, "checkpoint_saved"), 300)
        rank = next(e for e in events_of(folder, "role_started") if e["rank"] == 1)
        os.kill(rank["pid"], signal.SIGKILL)
        killed.append(rank["pid"])

    killer = threading.Thread(target=kill)
    killer.start()
    return killer


def test_two_workers_outlive_a_killed_one_and_a_finished_run_trains_no_more(
    ray_session: None, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    two = ["train.workers=2", "algorithm.precompute_reference=true", "train.scheduler=constant"]
    given = job(max_steps=10, overrides=[*two, "checkpoint.every_steps=2"])
    killed: list[int] = []
    killer = kill_a_worker(folder, killed)
    result = create_rl_trainer(**given).train()
    killer.join()
    assert killed
    steps = steps_of(folder)
    assert list(steps) == list(range(11))
    assert steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(events_of(folder, "role_started")) == 4
    assert [event["step"] % 2 for event in events_of(folder, "resumed")] == [0]
    model = (result.model / "model.safetensors").read_bytes()
    lines = (folder / "metrics.jsonl").read_bytes()

    again = create_rl_trainer(**given).train()
    assert again.already
    assert len(events_of(folder, "resumed")) == len(events_of(folder, "run_started")) == 1
    assert (again.steps, again.metrics) == (10, result.metrics)
    assert again.backend == result.backend  # type: ignore[union-attr]
    assert (folder / "metrics.jsonl").read_bytes() == lines
    assert (again.model / "model.safetensors").read_bytes() == model

    with pytest.raises(UserError, match=r"makes 9 steps and .* checkpoint is of step 10; raise"):
        create_rl_trainer(**{**given, "max_steps": 9}).train()


@pytest.mark.long
def test_dpo_on_two_workers_learns_and_outlives_a_killed_worker(
    ray_session: None, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    trainer = create_rl_trainer(
        **job(max_steps=60, overrides=["train.workers=2", "checkpoint.every_steps=10"])
    )
    killed: list[int] = []
    killer = kill_a_worker(folder, killed)
    result = trainer.train()
    killer.join()
    assert killed
    steps = steps_of(folder)
    assert list(steps) == list(range(61))
    assert steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["eval/reward/accuracy"] == 0.5, "all are ties before the first step"
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


@pytest.mark.long
def test_a_stopped_job_saves_and_goes_on_and_a_named_checkpoint_is_gone_back_to(
    job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    given = job(max_steps=60)
    command = [
        *(sys.executable, "-m", "aligntune.cli", "train", "checkpoint.every_steps=10"),
        *("--algorithm", "dpo", "--model", given["model_name"], "--dataset", given["dataset_name"]),
        *("--out", str(folder), "train.steps=60", "train.learning_rate=1e-3"),
        *("tracking.trackers=[]", "checkpoint.keep_last=9", *given["overrides"]),
    ]

    def start(*more: str) -> subprocess.Popen[str]:
        root = Path(__file__).parents[2]
        return subprocess.Popen(
            [*command, *more], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    process = start()
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(steps_of(folder)) > 12, 300)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert "resume with: aligntune train" in output
    last = max(steps_of(folder))
    assert last < 60
    saved = [event["step"] for event in events_of(folder, "checkpoint_saved")]
    assert saved[-1] == last, "what was trained is in a checkpoint"
    assert [event["reason"] for event in events_of(folder, "run_stopped")] == [
        "stopped by signal 15"
    ]

    output, _ = (process := start()).communicate(timeout=300)
    assert process.returncode == 0, output
    assert [event["step"] for event in events_of(folder, "resumed")] == [last]
    whole = steps_of(folder)
    assert list(whole) == list(range(61))

    checkpoints = folder / "checkpoints"
    output, _ = (process := start("--resume", str(tmp_path / "step-000010"))).communicate()
    assert process.returncode == 2, output
    assert "is not a complete checkpoint of this run" in output
    assert "step-000010" in output.partition("there are")[2]

    output, _ = (process := start("--resume", str(checkpoints / "step-000010"))).communicate()
    assert process.returncode == 0, output
    assert [event["step"] for event in events_of(folder, "resumed")] == [last, 10]
    again = steps_of(folder)
    assert list(again) == list(range(61))
    for step in (1, 10, 11, 60):
        assert again[step]["loss"] == pytest.approx(whole[step]["loss"], abs=1e-5)
    expected = {f"step-{step:06d}" for step in range(10, 61, 10)}
    assert {path.name for path in checkpoints.glob("step-*")} == expected


@pytest.mark.long
def test_lora_leaves_an_adapter_and_the_merged_model(
    ray_session: None, job: Callable[..., dict[str, Any]], tiny_model: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = create_rl_trainer(**job(lora_r=4, lora_alpha=8.0, learning_rate=1e-2)).train()
    merged = AutoModelForCausalLM.from_pretrained(result.model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        start = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, result.model / "adapter")(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, adapted, atol=1e-4, rtol=0)
    assert float((adapted - start).abs().max()) > 1e-2, "nothing was learnt"


@pytest.mark.long
def test_a_precomputed_reference_gives_the_same_losses_and_none_gives_others(
    ray_session: None, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = {}
    for name in ("kept", "precompute_reference", "reference_free"):
        option = [] if name == "kept" else [f"algorithm.{name}=true"]
        overrides = ["train.workers=2", *option]
        given = job(max_steps=4, output_dir=str(tmp_path / name), overrides=overrides)
        create_rl_trainer(**given).train()
        found[name] = steps_of(tmp_path / name)
    for step in range(1, 5):
        wanted = pytest.approx(found["kept"][step]["loss"], abs=1e-5)
        assert found["precompute_reference"][step]["loss"] == wanted
    first = found["reference_free"][1]
    assert first["reward/chosen"] == pytest.approx(0.1 * first["logprobs/chosen"], rel=1e-4)
    assert first["loss"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.long
def test_a_deepspeed_config_reaches_the_workers(
    ray_session: None, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = {}
    for name in ("plain", "zero"):
        folder = tmp_path / name
        option = ["train.deepspeed={zero_optimization: {stage: 2}}"] if name == "zero" else []
        overrides = ["train.workers=2", "checkpoint.every_steps=5", *option]
        given = job(max_steps=10, output_dir=str(folder), overrides=overrides)
        result = create_rl_trainer(**given).train()
        assert (result.model / "model.safetensors").is_file()
        found[name] = steps_of(folder)
    saved = tmp_path / "zero" / "checkpoints" / "step-000010"
    assert len(list(saved.rglob("*optim_states.pt"))) == 2, "each rank has its part"
    for step in range(1, 11):
        wanted = pytest.approx(found["plain"][step]["loss"], abs=1e-3)
        assert found["zero"][step]["loss"] == wanted


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["file", "local"])  # known to pyarrow, and to fsspec alone
def test_checkpoints_and_the_model_go_through_a_uri(
    ray_session: None, job: Callable[..., dict[str, Any]], tmp_path: Path, scheme: str
) -> None:
    shared = tmp_path / "shared"
    uri = f"{scheme}://{shared}"
    overrides = [f"checkpoint.storage={uri}", "checkpoint.every_steps=5"]
    given = job(max_steps=5, overrides=overrides)
    result = create_rl_trainer(**given).train()
    assert (shared / "checkpoints" / "step-000005" / "trainer_state.json").is_file()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (result.model / "model.safetensors").is_file()
    create_rl_trainer(**{**given, "max_steps": 10}).train()
    assert [event["step"] for event in events_of(tmp_path / "run", "resumed")] == [5]
    assert list(steps_of(tmp_path / "run")) == list(range(11))
    elsewhere = {**given, "output_dir": str(tmp_path / "elsewhere"), "max_steps": 12}
    with pytest.raises(UserError, match=r"holds another run: train\.seed was"):
        create_rl_trainer(**{**elsewhere, "seed": 7}).train()
    shutil.rmtree(tmp_path / "run")
    create_rl_trainer(**elsewhere).train()
    assert [event["step"] for event in events_of(tmp_path / "elsewhere", "resumed")] == [10]
    assert list(steps_of(tmp_path / "elsewhere")) == list(range(13))


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
    started = events_of(Path(trainer.config.output_dir), "role_started")
    assert started, "a worker says who it is before it loads anything"


@pytest.mark.long
def test_a_reward_model_ranks_above_chance_and_serves_as_a_reward(
    ray_session: None, tmp_path: Path
) -> None:
    from aligntune.online.trainer import OnlineTrainer
    from aligntune.quickstart.task import make_task, preference_pairs, write_assets

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
