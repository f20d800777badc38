"""Which engine serves, with which options, batches and seeds, and that it ends with its actor."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.engines import base
from actors.engines.base import EngineDead, WeightMismatch, resolve_engine
from actors.engines.lifeline import work_of
from actors.engines.specs import AutoEngineSpec, TransformersSpec, VLLMSpec
from actors.specs import LoRASpec, ModelSpec, RoleResources
from actors.transfer.base import Arrival
from cluster.plan.memory import VLLM_BATCH, VLLM_ROWS
from tests.actors.engines.replicas import WAIT_S, rollout_spec, until

AUTO = rollout_spec(AutoEngineSpec())


def test_auto_is_vllm_where_it_is_installed_and_transformers_elsewhere(monkeypatch):
    on_a_gpu = AUTO.model_copy(update={"resources": RoleResources(gpus=0.5)})
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(base.importlib.metadata, "version", lambda name: "0.32.0+cpu")
    assert resolve_engine(AUTO) == resolve_engine(on_a_gpu) == VLLMSpec()
    assert resolve_engine(rollout_spec(TransformersSpec())) == TransformersSpec()
    monkeypatch.setattr(base.importlib.metadata, "version", lambda name: "0.32.0")
    assert resolve_engine(AUTO) == TransformersSpec(), "CUDA's build sees the GPUs by NVML"
    assert resolve_engine(on_a_gpu) == VLLMSpec()
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    assert resolve_engine(AUTO) == TransformersSpec()
    with pytest.raises(ValueError, match="not installed"):
        resolve_engine(rollout_spec(VLLMSpec()))


def test_an_engine_option_that_is_unknown_or_ours_is_refused():
    from actors.engines.vllm_options import check_engine_options

    known = {"enforce_eager", "max_num_seqs", "logprobs_mode", "max_model_len"}
    with pytest.raises(ValueError, match=r"no option 'max_num_seq'; did you mean 'max_num_seqs'\?"):
        check_engine_options({"max_num_seq": 4}, known)
    with pytest.raises(ValueError, match="'logprobs_mode' is set by aligntune; remove it"):
        check_engine_options({"logprobs_mode": "raw_logprobs"}, known)
    with pytest.raises(ValueError, match=r"set rollout\.max_prompt_length"):
        check_engine_options({"max_model_len": 4}, known)
    check_engine_options({"enforce_eager": True}, known)


def test_every_option_of_vllms_that_aligntune_sets_is_refused_from_a_config():
    from actors.engines import vllm_options

    source = Path(vllm_options.__file__).with_name("vllm.py").read_text()
    (made,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "AsyncEngineArgs"
    )
    ours = {keyword.arg for keyword in made.keywords if keyword.arg is not None}
    assert len(ours) > 10
    for name in ours:
        with pytest.raises(ValueError, match=f"'{name}' is set by aligntune"):
            vllm_options.check_engine_options({name: None}, ours)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("speculative_config", "no update gives that one its weights; remove it"),
        ("spec_method", "no update gives that one its weights; remove it"),
        ("spec_tokens", "no update gives that one its weights; remove it"),
        ("watermark_config", "changes what is drawn"),
        ("logits_processors", "changes what is drawn"),
        ("override_generation_config", "would be ignored"),
        ("hf_overrides", "another model than the one that is trained"),
        ("kv_transfer_config", "those of earlier weights may stay"),
        ("lora_target_modules", r"set model\.lora\.target_modules instead"),
    ],
)
def test_an_option_that_would_make_rollouts_untrue_is_refused(name: str, why: str):
    from actors.engines.vllm_options import check_engine_options

    with pytest.raises(ValueError, match=f"'{name}' .*{why}"):
        check_engine_options({name: None}, {name})


@pytest.mark.slow
def test_every_option_that_is_refused_is_one_of_vllms():
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    from actors.engines import vllm_options

    known = {field.name for field in dataclasses.fields(arg_utils.AsyncEngineArgs)}
    assert {*vllm_options._OURS, *vllm_options._REFUSED} <= known


@pytest.mark.slow
def test_every_option_of_an_adapters_engine_is_refused_from_a_config():
    pytest.importorskip("vllm")
    from actors.engines.vllm_adapter import lora_options
    from actors.engines.vllm_options import check_engine_options

    for name in (ours := lora_options(LoRASpec())):
        with pytest.raises(ValueError, match=f"'{name}' is set by aligntune"):
            check_engine_options({name: None}, set(ours))


def test_vllms_batches_follow_from_the_groups_that_a_replica_is_given():
    from actors.engines.vllm_options import batch_limits

    def limits(
        sequences: int, *, prompt: int = 512, cache: float | None = None, **options: int
    ) -> tuple[int, int]:
        spec = rollout_spec(VLLMSpec(kv_cache_gib=cache)).model_copy(
            update={"max_prompt_length": prompt}
        )
        found = batch_limits(spec, sequences, most, 16384, options)
        return found["max_num_seqs"], found["max_num_batched_tokens"]

    most = 1024
    assert limits(256) == (256, 16384)
    assert limits(256, prompt=8) == (256, 2048)
    assert limits(1, prompt=8) == (1, 408)  # one sequence, prompt and completion
    assert limits(9999) == (1024, 16384)
    assert limits(256, max_num_seqs=3) == (3, 1536)
    assert limits(256, max_num_batched_tokens=100) == (100, 100)
    assert limits(256, max_num_seqs=20000) == (20000, 20000)
    assert limits(256, max_num_seqs=7, max_num_batched_tokens=9) == (7, 9)
    most = 2048
    assert limits(9999) == (2048, 16384)
    assert limits(9999, cache=8) == (VLLM_ROWS, VLLM_BATCH), "what a plan counts, and no more"
    assert limits(9999, cache=8, max_num_seqs=1500) == (1500, VLLM_BATCH)
    assert limits(9, cache=8, max_num_batched_tokens=16000) == (9, 16000)


def test_replicas_draw_apart():
    seeds = {base.engine_seed(seed, f"rollout-{index}") for seed in (0, 1) for index in (0, 1)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_process_tied_to_another_ends_when_that_one_is_killed():
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tied = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, threading; from actors.engines.lifeline import end_with;"
            "end_with(int(sys.argv[1])); print('tied', flush=True); threading.Event().wait()",
            str(owner.pid),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tied.stdout is not None
    assert tied.stdout.readline() == "tied\n"
    assert tied.poll() is None
    owner.kill()
    assert tied.wait(WAIT_S) == 1
    owner.wait(WAIT_S)


TIED = """
import os, threading
from actors.engines.lifeline import end_with
end_with(os.getppid())
print(os.getpid(), flush=True)
threading.Event().wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
def test_a_process_tied_to_another_ends_with_it_though_it_is_stopped():
    of_owner = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    owner = subprocess.Popen(
        [sys.executable, "-c", of_owner, TIED], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    tied = int(owner.stdout.readline())
    ended = os.pidfd_open(tied)
    os.kill(tied, signal.SIGSTOP)
    until(lambda: psutil.Process(tied).status() == psutil.STATUS_STOPPED)
    owner.kill()
    assert select.select([ended], [], [], WAIT_S)[0]
    owner.communicate(timeout=WAIT_S)
    os.close(ended)


@pytest.fixture
def busy() -> Iterator[int]:
    """A process that works."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        yield child.pid
        child.kill()


@pytest.fixture
def idle() -> Iterator[int]:
    """A process that waits."""
    line = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_SLEEPING)
        yield child.pid
        child.kill()


def test_processes_work_that_use_time_and_none_is_stopped_or_gone(busy, idle):
    of_both, of_idle = work_of([busy, idle]), work_of([idle])
    until(of_both)
    assert not of_idle()
    os.kill(idle, signal.SIGSTOP)  # as one process of several of an engine
    until(lambda: psutil.Process(idle).status() == psutil.STATUS_STOPPED)
    assert not of_both()
    os.kill(idle, signal.SIGCONT)
    until(of_both)
    psutil.Process(idle).kill()
    until(lambda: psutil.Process(idle).status() == psutil.STATUS_ZOMBIE)
    assert not of_both()


@pytest.mark.slow
def test_processes_that_only_poll_do_not_work():
    line = "import time\nprint(flush=True)\nwhile True: time.sleep(0.02)"
    with subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        spent = psutil.Process(child.pid).cpu_times
        worked, before = work_of([child.pid]), sum(spent()[:2])
        until(lambda: sum(spent()[:2]) > before + 0.01)
        polls = not worked()
        child.kill()
    assert polls


class Silent:
    """Stands in for vLLM's client: the engine answers once it is let."""

    def __init__(self) -> None:
        self.let = asyncio.Event()

    async def is_sleeping(self) -> bool:
        await self.let.wait()
        return False


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that was not started, and soon looks again."""
    pytest.importorskip("vllm")
    from actors.engines import vllm

    monkeypatch.setattr(vllm, "_LOOK_S", 0.01)
    monkeypatch.setattr(vllm, "_AGAIN_S", 0.01)
    return vllm.VLLMEngine(ModelSpec(name="none"), rollout_spec(VLLMSpec()), 0, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["on CPU", "on a GPU"])
def test_an_engine_answers_by_its_work_as_it_loads_or_on_cpu_and_not_where_it_waits_for_a_gpu(
    engine, busy, where
):
    async def run() -> None:
        engine._llm, engine._processes = Silent(), [busy]
        if where == "on CPU":
            engine._on_cpu = True
        else:
            serving = asyncio.create_task(engine.answers())
            used = work_of([busy])
            async with asyncio.timeout(WAIT_S):
                while not used():  # noqa: ASYNC110 - a process sets no event
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not serving.done(), "it hangs, whatever its processes use"
            engine._loading = True
            async with asyncio.timeout(WAIT_S):
                await serving
        async with asyncio.timeout(WAIT_S):
            await engine.answers()
        os.kill(busy, signal.SIGSTOP)
        until(lambda: psutil.Process(busy).status() == psutil.STATUS_STOPPED)
        stopped = asyncio.create_task(engine.answers())
        assert not (await asyncio.wait((stopped,), timeout=0.5))[0]
        engine._llm.let.set()
        async with asyncio.timeout(WAIT_S):
            await stopped

    asyncio.run(run())


class Fails:
    """Stands in for vLLM's client, of which an update fails and which is found dead at look
    `dies`; 0: it lives."""

    def __init__(self, dies: int) -> None:
        self.dies = dies
        self.looks = 0

    async def check_health(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self.looks += 1
        if self.looks == self.dies:
            raise EngineDeadError

    async def pause_generation(self, **_: Any) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, request: Any) -> None:
        raise Exception("cancelled")


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "error"), [(3, EngineDead), (0, WeightMismatch)])
def test_a_worker_that_dies_amid_an_update_is_a_death_and_no_mismatch(
    engine, monkeypatch, dies, error
):
    """A dead one is replaced; weights that do not fit end the run."""
    from actors.engines import vllm

    monkeypatch.setattr(vllm, "_DEATH_S", WAIT_S if dies else 0.05)

    async def run() -> None:
        engine._llm = Fails(dies)
        with pytest.raises(error):
            await engine.load_weights(Arrival(1, {}))
        with pytest.raises(EngineDead, match="version 1 did not load: cancelled"):
            await engine.check()

    asyncio.run(run())
