"""Figures of the plan: how near its memory is to what is measured."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from actors.strategies.specs import STRATEGIES
from aligntune.online.work import kept_of
from cluster.plan.memory import CPU_FRAMEWORK, Memory, rollout_memory, trained_memory
from cluster.plan.shapes import from_folder
from cluster.plan.work import Rollout, Step, Trained
from tests.bench.measure_memory import (
    CHUNK,
    COMPLETION,
    GROUP,
    GROUPS,
    PROMPT,
    ROWS,
)

pytestmark = pytest.mark.long


STEP = Step(GROUPS, GROUP, PROMPT, COMPLETION, passes=1, updates=1, max_staleness=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights outweigh the interpreter: 116 million parameters."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    finish(start("make", str(folder)))
    return folder


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bench.measure_memory", *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        out, error = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out


def compare(
    what: str, memory: Memory, measured: list[int], there_before: float = CPU_FRAMEWORK
) -> None:
    """Predicted growth, without the framework that is there before, against the measured one."""
    for rank, grown in enumerate(measured):
        predicted = memory.peak - there_before - (memory.of_rank_0 if rank else 0)
        share = predicted / grown - 1
        print(f"{what} {rank}: predicted {predicted / 2**20:.0f} MiB, measured "
              f"{grown / 2**20:.0f} MiB ({share:+.1%})")  # fmt: skip
        assert abs(share) <= 0.25


CASES = [
    ("torch", 2, 1, False),
    ("torch", 2, 1, True),
    ("deepspeed", 1, 2, False),
    ("deepspeed", 2, 2, False),
    ("deepspeed", 3, 2, False),
    ("fsdp", 0, 2, False),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("strategy", "stage", "ranks", "checkpointing"), CASES)
def test_the_memory_of_a_policy_rank_is_as_predicted(
    model: Path, strategy: str, stage: int, ranks: int, checkpointing: bool
) -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    numbers = [str(stage), str(ranks)]
    last = [str(port), "yes" if checkpointing else "no"]
    running = [
        start("policy", str(model), strategy, *numbers, str(rank), *last) for rank in range(ranks)
    ]
    told = [[line for line in finish(one).splitlines() if line.startswith("{")] for one in running]
    said = [[json.loads(line) for line in lines] for lines in told]
    measured = [grown["bytes"] for _, grown in said]
    options = {"stage": stage} if strategy == "deepspeed" else {}
    choice = STRATEGIES[strategy].model_validate(options)
    work = Trained(
        "policy",
        from_folder(model, "measured"),
        ranks,
        kept=kept_of(choice),
        dtype_bytes=4,
        tokens=ROWS * STEP.longest,
        longest=STEP.longest,
        checkpointing=checkpointing,
        head_rows=CHUNK,
    )
    memory = trained_memory(work, on_gpu=False)
    copied = memory.device["checkpoint"]
    for rank, (copy, _) in enumerate(said):
        model = 0 if rank else memory.device.get("model file", 0)
        assert copy["checkpoint"] == pytest.approx(copied + model, rel=0.02)
    compare(f"{strategy} {stage}", memory, measured)


@pytest.mark.timeout(600)
def test_the_memory_of_a_rollout_replica_is_as_predicted(model: Path) -> None:
    measured = json.loads(finish(start("rollout", str(model))).splitlines()[-1])["bytes"]
    shape = from_folder(model, "measured")
    work = Rollout(shape, 1, "transformers", dtype_bytes=4, max_concurrent_groups=1)
    compare("rollout", rollout_memory(work, STEP, None), [measured])


@pytest.mark.timeout(600)
def test_the_memory_of_a_vllm_replica_is_as_predicted(model: Path) -> None:
    measured = json.loads(finish(start("vllm", str(model))).splitlines()[-1])["bytes"]
    shape = from_folder(model, "measured")
    work = Rollout(shape, 1, "vllm", dtype_bytes=4, max_concurrent_groups=1, kv_cache_bytes=2**30)
    compare("vllm", rollout_memory(work, STEP, None), [measured], there_before=0)
