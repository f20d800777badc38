"""What is open in a config is decided by the machines, written as if set, and kept by a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.engines import base
from actors.engines.base import resolve_engine
from actors.engines.specs import VLLMSpec
from aligntune.config.auto import open_settings
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.online import settle_resources as module
from aligntune.online.settle_resources import settle_resources
from aligntune.online.work import work_of
from aligntune.runs.rundir import changes
from aligntune.shapes import known_shape
from cluster.machines import Machines
from cluster.plan.memory import frozen_memory, trained_memory
from cluster.plan.plan import make_plan
from cluster.resources import described

LAPTOP = Machines(described(1, 0, None, 8), 8, here=True)
ONE_H100 = Machines(described(1, 1, "h100-80gb"), 16, here=True)
ONE_A100 = Machines(described(1, 1, "a100-40gb"), 16, here=True)
EIGHT_H100 = Machines(described(1, 8, "h100-80gb"), 16, here=True)


def config(*overrides: str, **sections: Any) -> RunConfig:
    tree = {
        "algorithm": {"name": "grpo", "beta": 0},
        "model": {"name": "Qwen/Qwen3-0.6B"},
        "data": {"path": "d.jsonl"},
        "rewards": ["math"],
        "rollout": {"max_prompt_length": 256},
        "output_dir": "o",
        **sections,
    }
    made = load_config(tree, overrides)
    assert isinstance(made, RunConfig)
    return made


def settle(
    given: RunConfig, there: Machines, previous: dict[str, Any] | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    now, decisions = settle_resources(given, previous, there, known_shape)
    return now, {one.path: one.value for one in decisions}


def cache_of(now: RunConfig) -> float:
    """GiB of keys and values that an engine is started with."""
    engine = now.rollout.engine
    assert isinstance(engine, VLLMSpec)
    assert engine.kv_cache_gib is not None
    return engine.kv_cache_gib


def test_what_is_decided_is_written_as_if_it_had_been_set() -> None:
    now, decided = settle(config(), EIGHT_H100)
    assert decided["policy.ranks"] == 8
    written = yaml.safe_load(dump(now))
    assert written["policy"]["ranks"] == 8
    assert written["policy"]["strategy"]["name"] == "deepspeed"
    assert written["model"]["dtype"] == "bfloat16"
    again = load_config(written)
    assert dump(again) == dump(now)
    left = {path.partition(".")[0] for path in open_settings(again)}
    roles = {"policy", "rollout", "episodes", "reward", "reference", "critic"}
    assert left <= roles  # CPUs and threads, and the cache
    anew, decided = settle(again, EIGHT_H100)
    assert anew == now
    assert set(decided) == {"rollout.engine.kv_cache_gib"}


@pytest.mark.parametrize(
    ("model", "attention", "kept"),
    [
        ("google/gemma-2-2b", "sdpa", True),
        ("google/gemma-2-2b", "flash_attention_2", False),
        ("Qwen/Qwen3-0.6B", "sdpa", False),
        ("Qwen/Qwen3-0.6B", "eager", True),
    ],
)
def test_scores_are_counted_where_attention_keeps_them_as_under_a_cap(
    model: str, attention: str, kept: bool
) -> None:
    given = config(
        f"model.attention={attention}",
        algorithm={"name": "ppo", "beta": 0.1},
        model={"name": model},
        rewards=[{"model": model}],
    )
    work = work_of(given)
    reference, reward = work.frozen
    assert work.critic is not None
    for part in (work.policy, work.critic, work.rollout, reference):
        assert part.scores is kept
    assert reward.scores is ("gemma" in model), "it chooses by itself"
    for memory, part in ((trained_memory, work.policy), (frozen_memory, reference)):
        plain = replace(part, scores=False)
        more = memory(part, True).device["activations"] - memory(plain, True).device["activations"]
        assert (more > 0) is kept


def test_what_is_set_is_never_changed() -> None:
    given = config(
        "model.dtype=float32",
        "policy.resources.gpus=1",
        "policy.ranks=2",
        "rollout.replicas=3",
        "rollout.engine={name: vllm, gpu_memory_utilization: 0.5}",
    )
    now, decided = settle(given, EIGHT_H100)
    assert (now.model.dtype, now.policy.ranks, now.rollout.replicas) == ("float32", 2, 3)
    assert now.rollout.engine.model_dump()["gpu_memory_utilization"] == 0.5
    assert not {"model.dtype", "policy.ranks", "rollout.replicas"} & decided.keys()
    assert "rollout.engine.gpu_memory_utilization" not in decided
    assert now.policy.strategy.name == "deepspeed"


def test_vllm_measures_no_gpu_on_which_others_allocate() -> None:
    named = "rollout.engine={name: vllm}"
    now, decided = settle(config(named), ONE_H100)
    cache, key = cache_of(now), "rollout.engine.kv_cache_gib"
    assert decided["cluster.colocate"] == [["policy", "rollout"]]
    as_auto = settle(config(), ONE_H100)
    assert cache == decided[key] == as_auto[1][key] == cache_of(as_auto[0])
    assert 1 < cache < 80 * decided["rollout.engine.gpu_memory_utilization"]
    less = "rollout.engine={name: vllm, gpu_memory_utilization: 0.2}"
    assert 1 < settle(config(less), ONE_H100)[1][key] < 0.2 * 80 < cache
    assert key not in settle(config(less.replace("0.2", "0.2, kv_cache_gib: 3")), ONE_H100)[1]
    counts = ["cluster.colocate=[]", "policy.ranks=1", "rollout.replicas=1"]
    halves = ["policy.resources.gpus=0.5", "rollout.resources.gpus=0.5"]
    assert settle(config(less, *counts, *halves), ONE_H100)[1][key] > 1
    assert key not in settle(config(named, "cluster.colocate=[]"), EIGHT_H100)[1]
    assert key not in settle(config(named, "policy.resources.gpus=0"), ONE_H100)[1]


def test_vllms_cache_is_settled_anew_on_another_gpu_and_in_another_share() -> None:
    """A run's own config is read again, to evaluate its model or to train by it."""
    began, _ = settle(
        config(
            "policy.tokens_per_microbatch=2048",
            "rollout.engine={name: vllm, gpu_memory_utilization: 0.4}",
        ),
        ONE_H100,
    )
    written = yaml.safe_load(dump(began))
    assert written["rollout"]["engine"]["kv_cache_gib"] == "auto"
    cache = cache_of(began)
    for there, override, most in (
        (ONE_H100, [], 80 * 0.4),
        (ONE_A100, [], 40 * 0.4),
        (ONE_H100, ["rollout.engine.gpu_memory_utilization=0.3"], 80 * 0.3),
    ):
        again = load_config(written, override)
        assert isinstance(again, RunConfig)
        now = cache_of(settle(again, there)[0])
        assert 1 < now < most
        assert (now == cache) == (not override and there is ONE_H100)


def test_a_cache_that_is_set_too_large_is_refused_with_a_cure_that_works() -> None:
    given = "rollout.engine={name: vllm, gpu_memory_utilization: 0.3, kv_cache_gib: 79}"
    with pytest.raises(UserError, match=r"what would fit: .*rollout\.engine\.kv_cache_gib=auto"):
        settle(config(given), ONE_H100)
    now, _ = settle(config(given, "rollout.engine.kv_cache_gib=auto"), ONE_H100)
    assert cache_of(now) < 24


def test_vllm_that_needs_a_gpu_is_not_taken_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "vllm_is_installed", lambda: True)
    for at in (base, module):
        monkeypatch.setattr(at, "vllm_needs_no_gpu", lambda: False)
    without = "rollout.resources.gpus=0"
    now, _ = settle(config(without), ONE_H100)
    assert resolve_engine(now.rollout).name == work_of(now, known_shape).rollout.engine
    assert resolve_engine(now.rollout).name == "transformers"
    assert resolve_engine(settle(config(), LAPTOP)[0].rollout).name == "transformers"
    assert resolve_engine(settle(config(), ONE_H100)[0].rollout).name == "vllm"
    monkeypatch.setattr(module, "vllm_is_installed", lambda: True)
    with pytest.raises(UserError, match=r"give rollouts a GPU, or set rollout\.engine=trans"):
        settle(config("rollout.engine=vllm", without), ONE_H100)


def test_auto_may_be_written_and_is_as_if_nothing_were() -> None:
    written = config(
        "model.dtype=auto",
        "policy.resources.gpus=auto",
        "rollout.engine={name: auto}",
        "policy.strategy=auto",
        "policy.ranks=auto",
        "cluster.colocate=auto",
    )
    assert open_settings(written) == open_settings(config())
    assert load_config(yaml.safe_load(dump(written))) == written
    assert open_settings(load_config(yaml.safe_load(dump(written)))) == open_settings(written)


def test_without_a_gpu_a_run_is_as_it_was_but_for_its_threads() -> None:
    now, decided = settle(config("rollout.engine=transformers"), LAPTOP)
    assert now.policy.resources.gpus == now.rollout.resources.gpus == 0
    assert now.policy.resources.threads == now.rollout.resources.threads == 8
    assert now.policy.resources.cpus == 1.0
    assert (now.model.dtype, now.policy.strategy.name) == ("float32", "torch")
    assert "rollout.engine" not in decided


@pytest.mark.parametrize(
    ("there", "tokens", "set_", "waits"),
    [
        (EIGHT_H100, 1024, None, 600),
        (EIGHT_H100, 32_768, None, None),
        (EIGHT_H100, 32_768, 700, 700),
        (LAPTOP, 16, None, 600),
        (LAPTOP, 4096, None, None),
    ],
)
def test_a_full_replica_has_the_time_that_it_takes_by_the_plan(
    there: Machines, tokens: int, set_: float | None, waits: float | None
) -> None:
    """Or it would be killed with all its groups, and the next one too."""
    given = config(f"rollout.max_completion_length={tokens}")
    if set_ is not None:
        given = config(
            f"rollout.max_completion_length={tokens}",
            f"rollout.generation_timeout_s={set_}",
            "policy.update_timeout_s=0.1",
        )
    now, decided = settle(given, there)
    made = make_plan(work_of(now, known_shape), there.cluster)
    told = " ".join(made.notes)
    assert ("rollout.generation_timeout_s=700" in told) == (set_ is not None)
    assert ("policy.update_timeout_s=0.1" in told) == (set_ is not None)
    if waits is None:
        assert now.rollout.generation_timeout_s == decided["rollout.generation_timeout_s"] > 600
        again, _ = settle(load_config(yaml.safe_load(dump(now))), there)  # type: ignore[arg-type]
        assert again == now
        assert open_settings(again) == open_settings(now)
    else:
        assert now.rollout.generation_timeout_s == waits
        assert "rollout.generation_timeout_s" not in decided


EVALUATES = ["data.eval_path=e.jsonl", "eval.temperature=0.7"]


@pytest.mark.parametrize(
    ("these", "as_long_as"),
    [
        (["train.groups_per_step=8"], ["rollout.max_concurrent_groups=8"]),
        (["train.groups_per_step=4", "train.max_staleness=1"], ["train.groups_per_step=8"]),
        (["train.groups_per_step=8", *EVALUATES], ["data.eval_path=e.jsonl"]),
        ([*EVALUATES, "eval.completions=64"], [*EVALUATES, "train.completions_per_group=64"]),
        ([*EVALUATES, "eval.completions=4"], EVALUATES),
    ],
)
def test_a_replica_has_time_for_the_groups_that_may_be_there_and_for_no_more(
    these: list[str], as_long_as: list[str]
) -> None:
    """In an evaluation all that it takes, of as many completions as that draws; in training what
    may be open in all."""

    def waits(*overrides: str) -> float:
        long = ["rollout.max_completion_length=32768", "train.completions_per_group=8"]
        now, _ = settle(config(*long, "rollout.replicas=1", *overrides), EIGHT_H100)
        return now.rollout.generation_timeout_s

    assert waits(*these) == waits(*as_long_as)


@pytest.mark.parametrize(("engine", "cures"), [("vllm", True), ("transformers", False)])
def test_a_limit_that_is_too_short_is_told_with_a_cure_that_the_engine_has(
    engine: str, cures: bool
) -> None:
    short = ["rollout.generation_timeout_s=1", f"rollout.engine={engine}"]
    now, _ = settle(config(*short), EIGHT_H100)
    (told,) = (
        n for n in make_plan(work_of(now, known_shape), EIGHT_H100.cluster).notes if "=1:" in n
    )
    assert told.count("rollout.max_concurrent_groups") == cures


@pytest.mark.parametrize(
    ("steps", "overrides", "compiles"),
    [
        (1_000, ["rollout.engine=vllm"], True),
        (1_000, [], True),
        (10, ["rollout.engine=vllm"], False),
        (1_000, ["rollout.engine=vllm", "rollout.resources.threads=1"], False),
        (1_000, ["rollout.engine=transformers"], False),
        (1_000, ["rollout.engine={name: vllm, compiles: false}"], False),
        (1_000, ["rollout.engine={name: vllm, options: {enforce_eager: true}}"], False),
        (1_000, ["rollout.engine={name: vllm, options: {optimization_level: 0}}"], False),
    ],
)
def test_vllm_compiles_on_a_cpu_for_a_run_of_many_tokens_and_no_file_says_so(
    steps: int,
    overrides: list[str],
    compiles: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("vllm_is_installed", "vllm_needs_no_gpu"):
        monkeypatch.setattr(module, name, lambda: True)
        monkeypatch.setattr(base, name, lambda: True)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    given = config(*overrides)

    def started(steps: int) -> tuple[RunConfig, bool]:
        now, decisions = settle_resources(given, None, LAPTOP, known_shape, lambda: steps)
        engine = resolve_engine(now.rollout)
        told = any(one.path == "rollout.engine.compiles" for one in decisions)
        assert told == (isinstance(engine, VLLMSpec) and engine.compiles)
        return now, told

    assert not started(steps)[1], "Python's headers are missing"
    (tmp_path / "Python.h").touch()
    now, told = started(steps)
    assert told == compiles
    before, _ = settle_resources(given, None, LAPTOP, known_shape)
    assert dump(now) == dump(before)
    assert load_config(yaml.safe_load(dump(now))).rollout.engine == given.rollout.engine


def test_a_run_that_goes_on_elsewhere_keeps_what_its_checkpoint_holds() -> None:
    began, _ = settle(config(), EIGHT_H100)
    previous = yaml.safe_load(dump(began))
    now, decided = settle(
        config(), Machines(described(2, 8, "h100-80gb"), 16, here=False), previous
    )
    assert decided["policy.ranks"] == began.policy.ranks
    assert now.policy.strategy == began.policy.strategy
    assert now.model.dtype == began.model.dtype
    changes(previous, now, "there")  # it is the same run


def test_a_run_is_not_another_before_it_is_decided_what_it_takes() -> None:
    began, _ = settle(config(), EIGHT_H100)
    changes(yaml.safe_load(dump(began)), config(), "there")
    with pytest.raises(UserError, match=r"policy\.ranks was 8 there and is 4 here"):
        changes(yaml.safe_load(dump(began)), config("policy.ranks=4"), "there")


def test_a_run_whose_ranks_find_no_place_elsewhere_is_refused_with_the_reason() -> None:
    began, _ = settle(config(), EIGHT_H100)
    with pytest.raises(UserError, match="8"):
        settle(config(), ONE_H100, yaml.safe_load(dump(began)))


def test_what_is_not_installed_here_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    now, _ = settle(config(), EIGHT_H100)
    assert (now.policy.strategy.name, now.policy.ranks) == ("torch", 1)


def test_four_bits_without_a_gpu_are_refused_once_the_machine_is_known() -> None:
    given = config("model.load_in_4bit=true", "model.lora={}", "backend=unsloth")
    with pytest.raises(UserError, match=r"policy\.resources\.gpus is 0"):
        settle(given, LAPTOP)


def test_a_run_that_fits_nowhere_is_refused_in_one_line() -> None:
    given = config(model={"name": "meta-llama/Llama-3.1-70B"})
    with pytest.raises(UserError, match=r"GiB short") as refused:
        settle(given, ONE_H100)
    assert "\n" not in str(refused.value)


def test_ppo_has_a_place_for_its_critic_and_its_reward_model() -> None:
    given = config(
        algorithm={"name": "ppo"},
        rewards=[{"model": "Skywork/Skywork-Reward-V2-Qwen3-0.6B"}],
    )
    now, decided = settle(given, EIGHT_H100)
    assert decided["critic.ranks"] == now.critic.ranks
    assert decided["rewards.0.dtype"] == "bfloat16"
    assert now.reward.resources.gpus == 1
    assert now.reference.resources.gpus == 1
