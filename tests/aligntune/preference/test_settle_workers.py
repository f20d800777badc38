"""What a preference job's workers take is decided by the machines; a step keeps its pairs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aligntune.config.load import load_config
from aligntune.config.preference import PreferenceConfig
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.preference.settle_workers import _work, settle_workers
from aligntune.runs.rundir import changes
from cluster.gpus import gpu_names
from cluster.machines import Machines
from cluster.plan.pairs import PairWork
from cluster.plan.shapes import from_table
from cluster.resources import described

HELD = "data.eval_path=held.jsonl"


def config(*overrides: str, name: str = "dpo", model: str = "Qwen/Qwen3-0.6B") -> PreferenceConfig:
    tree = {
        "algorithm": name,
        "model": {"name": model},
        "data": {"path": "d.jsonl"},
        "output_dir": "o",
    }
    made = load_config(tree, overrides)
    assert isinstance(made, PreferenceConfig)
    return made


def machines(nodes: int, gpus: int, gpu: str | None) -> Machines:
    return Machines(described(nodes, gpus, gpu if gpus else None, 16), 16, here=True)


def test_without_a_gpu_one_worker_has_all_processors() -> None:
    now, _ = settle_workers(config(HELD), 1024, there=machines(1, 0, None))
    train = now.train
    assert now.eval.pairs_per_worker == 16
    assert (train.workers, train.pairs_per_worker, train.accumulation_steps) == (1, 8, 1)
    assert train.resources.gpus == 0
    assert train.resources.threads == 16
    assert now.model.dtype == "float32"


def test_with_gpus_each_has_a_worker_and_a_step_its_pairs() -> None:
    now, _ = settle_workers(config(), 1024, there=machines(1, 4, "h100-80gb"))
    assert now.train.workers == 4
    assert now.train.pairs_per_step == 8
    assert now.train.resources.gpus == 1
    assert now.model.dtype == "bfloat16"


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "[sigmoid, aot]"])
def test_pairs_that_the_loss_sorts_stay_in_one_forward_pass(loss: str) -> None:
    for gpus in (1, 4):
        asked = config(f"algorithm.loss_type={loss}")
        now, _ = settle_workers(asked, 1024, there=machines(1, gpus, "h100-80gb"))
        train = now.train
        assert (train.workers, train.pairs_per_worker, train.accumulation_steps) == (1, 8, 1)
        assert train.resources.gpus == 1


def test_several_workers_hold_buckets_as_large_as_the_gradients_and_a_reference_in_float32() -> (
    None
):
    shape = from_table("Qwen/Qwen3-0.6B")
    alone = PairWork(shape, 64, 1, 1, 1, 2, True, None, False, logits=True, reference=False)
    assert replace(alone, workers=2).bytes - alone.bytes == 4 * shape.parameters
    for size in (2, 4):
        one = replace(alone, dtype_bytes=size)
        assert replace(one, reference=True).bytes - one.bytes == 4 * shape.parameters
    adapter = replace(alone, lora_rank=8)
    assert replace(adapter, reference=True).bytes == adapter.bytes  # itself without its adapters
    buckets = replace(adapter, workers=2).bytes - adapter.bytes
    assert buckets == 4 * shape.lora_parameters(8)


def test_scores_are_counted_of_a_model_that_caps_them() -> None:
    capped, plain = (
        _work(config(model=name), 1024) for name in ("google/gemma-2-2b", "Qwen/Qwen3-0.6B")
    )
    assert capped.scores
    assert not plain.scores
    assert _work(config("model.attention=eager"), 1024).scores
    assert capped.bytes > replace(capped, scores=False).bytes


def test_gpus_of_no_known_type_leave_what_is_open_as_without_one() -> None:
    there = machines(1, 4, "h100-80gb")
    nodes = tuple(node._replace(gpu=None) for node in there.cluster.nodes)
    there = replace(there, cluster=replace(there.cluster, nodes=nodes))
    with pytest.raises(UserError, match=r"set train\.resources\.gpus"):
        settle_workers(config(), 1024, there=there)
    now, decided = settle_workers(config("train.resources.gpus=1"), 1024, there=there)
    assert (now.train.workers, now.train.resources.gpus) == (1, 1)
    values = {one.path: one.value for one in decided}
    assert values["model.dtype"] == now.model.dtype == "float32"


@pytest.mark.slow
@given(
    st.sampled_from(gpu_names()),
    st.sampled_from([1, 2, 3, 8, 64]),
    st.sampled_from(["dpo", "reward_model"]),
    st.sampled_from(["Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-7B"]),
    st.sampled_from([64, 1024]),
    st.sets(
        st.sampled_from(
            [
                HELD,
                "train.pairs_per_worker=32",
                "train.workers=2",
                "train.accumulation_steps=2",
                "model.gradient_checkpointing=false",
                "algorithm.loss_type=aot",
                "train.deepspeed={}",
            ]
        )
    ),
)
def test_a_step_keeps_its_pairs_on_whatever_gpus_or_the_job_is_refused(
    gpu: str, gpus: int, name: str, model: str, longest: int, options: set[str]
) -> None:
    if name != "dpo":
        options = options - {"algorithm.loss_type=aot"}
    if HELD in options and gpus < 8:
        options = options | {"eval.pairs_per_worker=64"}
    there = machines(1, gpus, gpu)
    asked = config(*options, name=name, model=model)
    try:
        now, _ = settle_workers(asked, longest, there=there)
    except UserError as refused:
        line = str(refused)
    else:
        assert now.train.pairs_per_step == asked.train.pairs_per_step
        assert now.train.workers <= max(gpus, asked.train.workers)
        assert now.eval.pairs_per_worker >= (2 if "algorithm.loss_type=aot" in options else 1)
        return
    assert "GiB short" in line
    assert "\n" not in line
    if "what fits: " in line:
        cure = re.findall(r"[a-z]+\.\w+=\w+", line.partition("what fits: ")[2])
        assert cure
        keys = {one.partition("=")[0] for one in cure}
        others = [one for one in options if one.partition("=")[0] not in keys]
        cured, _ = settle_workers(
            config(*others, *cure, name=name, model=model), longest, there=there
        )
        assert cured.train.pairs_per_step == asked.train.pairs_per_step


def test_what_is_set_is_never_changed_and_workers_are_left_where_the_batch_would_change() -> None:
    there = machines(1, 8, "h100-80gb")
    now, decisions = settle_workers(
        config("train.pairs_per_worker=2", "model.dtype=float32"), 64, there=there
    )
    assert (now.train.workers, now.train.pairs_per_worker, now.model.dtype) == (1, 2, "float32")
    why = {one.path: one.why for one in decisions}
    assert "model.dtype" not in why
    assert "with train.workers=8 all compute, and a step has 16 pairs" in why["train.workers"]
    _, decisions = settle_workers(config(), 64, there=there)
    assert not any("all compute" in one.why for one in decisions)  # they do


def test_a_job_that_goes_on_elsewhere_keeps_its_batch_and_dtype() -> None:
    began, _ = settle_workers(config(), 1024, there=machines(1, 4, "h100-80gb"))
    previous: dict[str, Any] = yaml.safe_load(dump(began))
    now, _ = settle_workers(config(), 1024, previous, machines(1, 8, "h100-80gb"))
    assert now.train.workers == 4
    changes(previous, now, "there")


def test_a_run_keeps_the_pairs_of_an_evaluation_where_the_loss_sorts_them() -> None:
    there = machines(1, 1, "h200-141gb")
    for loss, kept in (("aot", 4), ("sigmoid", 16)):
        asked = (HELD, f"algorithm.loss_type={loss}")
        previous: dict[str, Any] = yaml.safe_load(dump(config(*asked, "eval.pairs_per_worker=4")))
        now, _ = settle_workers(config(*asked), 64, previous, there)
        assert now.eval.pairs_per_worker == kept
        without = config(asked[1])
        assert settle_workers(without, 64, previous, there)[0].eval == without.eval


def test_such_a_run_that_began_without_a_gpu_keeps_them_too_or_is_told_the_key_alone() -> None:
    sorts = (HELD, "algorithm.loss_type=aot", "train.pairs_per_worker=2")
    asked = config(*sorts)
    began, decided = settle_workers(asked, 1000, there=machines(1, 0, None))
    assert "eval.pairs_per_worker" in {one.path for one in decided}
    previous: dict[str, Any] = yaml.safe_load(dump(began))
    cure = r"what fits: eval\.pairs_per_worker=(\d+)$"
    with pytest.raises(UserError, match=cure) as refused:
        settle_workers(asked, 1000, previous, machines(1, 1, "l40s-48gb"))
    (pairs,) = re.findall(cure, str(refused.value))
    less = config(*sorts, f"eval.pairs_per_worker={pairs}")
    now, _ = settle_workers(less, 1000, previous, machines(1, 1, "l40s-48gb"))
    assert now.eval.pairs_per_worker == int(pairs)


def test_a_model_that_no_gpu_holds_is_refused_with_what_may_fit() -> None:
    with pytest.raises(UserError, match=r"GiB short .* model\.lora"):
        settle_workers(config(model="Qwen/Qwen2.5-7B"), 1024, there=machines(1, 1, "l4-24gb"))


ZERO_3 = ("train.deepspeed={zero_optimization: {stage: 3}}", "train.workers=8")


def test_what_deepspeed_shares_out_is_not_counted_and_what_each_worker_has_is() -> None:
    there = machines(1, 8, "h100-80gb")
    given = config(*ZERO_3, "train.pairs_per_worker=1", HELD, model="Qwen/Qwen2.5-7B")
    now, _ = settle_workers(given, 1024, there=there)
    assert now.train.workers == 8
    assert now.train.resources.gpus == 1
    assert now.model.gradient_checkpointing is False
    cure = r"beside what DeepSpeed .*fits: train\.pairs_per_worker=8 train\.accumulation_steps=4,"
    with pytest.raises(UserError, match=cure):
        settle_workers(
            config(*ZERO_3, "train.pairs_per_worker=32", "model.gradient_checkpointing=true"),
            1024,
            there=there,
        )


def test_an_evaluation_has_as_many_pairs_at_once_as_the_memory_has_room_for() -> None:
    def pairs(gpu: str, *overrides: str, name: str = "dpo") -> int:
        asked = config(HELD, *overrides, name=name)
        return settle_workers(asked, 1000, there=machines(1, 1, gpu))[0].eval.pairs_per_worker

    assert pairs("h200-141gb") == 16
    assert pairs("l4-24gb") in (1, 2, 4)
    assert pairs("l40s-48gb", "algorithm.loss_type=aot", "train.pairs_per_worker=2") in (2, 4, 8)
    assert pairs("l4-24gb", name="reward_model") == 16
    with pytest.raises(UserError, match=r"GiB short .* what fits: eval\.pairs_per_worker=[124]$"):
        pairs("l4-24gb", "eval.pairs_per_worker=16")


def test_a_pass_of_an_evaluation_holds_the_logits_that_trl_holds() -> None:
    """Bytes a logit, by hand: DPO's policy, its copy or with weighting two, and the reference, in
    float32; of SFT as they were computed, and log-probs and logits in float32."""

    def bytes_a_pair(name: str, *overrides: str) -> int:
        asked = config(HELD, *overrides, name=name)
        many, more = (replace(_work(asked, 100), held_out=pairs) for pairs in (1000, 1001))
        return more.bytes - many.bytes

    vocabulary = from_table("Qwen/Qwen3-0.6B").vocabulary
    for overrides, expected in (
        (("model.dtype=bfloat16",), 12),
        (("model.dtype=bfloat16", "model.lora.r=8"), 12),
        (("model.dtype=bfloat16", "algorithm.precompute_reference=true"), 8),
        (("model.dtype=float32", "algorithm.reference_free=true"), 8),
        (("model.dtype=bfloat16", "algorithm.weighting=true"), 16),
    ):
        body = bytes_a_pair("reward_model", overrides[0])
        assert bytes_a_pair("dpo", *overrides) - body == 200 * vocabulary * expected
    for dtype, expected in (("bfloat16", 10), ("float32", 8)):
        body = bytes_a_pair("reward_model", f"model.dtype={dtype}") // 2
        assert bytes_a_pair("sft", f"model.dtype={dtype}") - body == 100 * vocabulary * expected


def test_a_batch_that_does_not_fit_is_told_how_the_same_pairs_fit() -> None:
    set_ = ("train.pairs_per_worker=32", "train.workers=1")
    with pytest.raises(UserError, match="GiB short") as refused:
        settle_workers(config(*set_), 1000, there=machines(1, 1, "l4-24gb"))
    fits = "what fits: train.pairs_per_worker=1 train.accumulation_steps=32, for the same 32 pairs"
    assert fits in str(refused.value)
    assert "output_dir" not in str(refused.value)
    one = ("train.workers=1", "train.pairs_per_worker=1", "train.accumulation_steps=32")
    now, _ = settle_workers(config(*one), 1000, there=machines(1, 1, "l4-24gb"))
    assert now.train.pairs_per_step == 32
    previous: dict[str, Any] = yaml.safe_load(dump(config(*set_, "train.accumulation_steps=1")))
    with pytest.raises(UserError, match=r"same 32 pairs a step, in a new output_dir, for the run"):
        settle_workers(config(), 1000, previous, machines(1, 1, "l4-24gb"))
    free = config("train.pairs_per_worker=32")
    with pytest.raises(UserError, match=r"fits: train\.workers=4 train\.pairs_per_worker=\d "):
        settle_workers(free, 1000, there=machines(1, 4, "h100-80gb"))
    fast = ("model.gradient_checkpointing=false", "train.pairs_per_worker=1")
    off = config(*fast, name="reward_model")
    with pytest.raises(UserError, match=r"what fits: model\.gradient_checkpointing=true$"):
        settle_workers(off, 20000, there=machines(1, 1, "h100-80gb"))
