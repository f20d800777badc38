"""Which engine serves, with which options, batches and seeds, and that it ends with its actor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from actors.engines import base
from actors.engines.base import resolve_engine
from actors.engines.specs import AutoEngineSpec, TransformersSpec, VLLMSpec
from tests.actors.engines.replicas import WAIT_S, rollout_spec


def test_auto_is_vllm_where_it_is_installed_and_transformers_elsewhere(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    assert resolve_engine(AutoEngineSpec()) == VLLMSpec()
    assert resolve_engine(TransformersSpec()) == TransformersSpec()
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    assert resolve_engine(AutoEngineSpec()) == TransformersSpec()
    with pytest.raises(ValueError, match="not installed"):
        resolve_engine(VLLMSpec())


def test_an_engine_option_that_is_unknown_or_ours_is_refused():
    from actors.engines.vllm import check_engine_options

    known = {"enforce_eager", "max_num_seqs", "logprobs_mode", "max_model_len"}
    with pytest.raises(ValueError, match=r"no option 'max_num_seq'; did you mean 'max_num_seqs'\?"):
        check_engine_options({"max_num_seq": 4}, known)
    with pytest.raises(ValueError, match="'logprobs_mode' is set by aligntune; remove it"):
        check_engine_options({"logprobs_mode": "raw_logprobs"}, known)
    with pytest.raises(ValueError, match=r"set rollout\.max_prompt_length"):
        check_engine_options({"max_model_len": 4}, known)
    check_engine_options({"enforce_eager": True}, known)


def test_vllms_batches_follow_from_the_groups_that_a_replica_is_given():
    from actors.engines.vllm import batch_limits

    def limits(sequences: int, *, prompt: int = 512, **options: int) -> tuple[int, int]:
        spec = rollout_spec(VLLMSpec()).model_copy(update={"max_prompt_length": prompt})
        found = batch_limits(spec, sequences, 1024, 16384, options)
        return found["max_num_seqs"], found["max_num_batched_tokens"]

    assert limits(256) == (256, 16384)
    assert limits(256, prompt=8) == (256, 2048)
    assert limits(1, prompt=8) == (1, 408)  # one sequence, prompt and completion
    assert limits(9999) == (1024, 16384)
    assert limits(256, max_num_seqs=3) == (3, 1536)
    assert limits(256, max_num_batched_tokens=100) == (100, 100)
    assert limits(256, max_num_seqs=20000) == (20000, 20000)
    assert limits(256, max_num_seqs=7, max_num_batched_tokens=9) == (7, 9)


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
