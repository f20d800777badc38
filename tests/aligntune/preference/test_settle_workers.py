"""What a preference job's workers take is decided by the machines; a step keeps its pairs."""

from __future__ import annotations

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
from aligntune.preference.settle_workers import settle_workers
from aligntune.runs.rundir import changes
from cluster.gpus import gpu_names
from cluster.machines import Machines
from cluster.plan.pairs import PairWork
from cluster.plan.shapes import from_table
from cluster.resources import described


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
    now, _ = settle_workers(config(), 1024, there=machines(1, 0, None))
    train = now.train
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
    buckets = replace(adapter, workers=2).bytes - adapter.bytes
    assert buckets == 4 * shape.lora_parameters(8)


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
)
def test_a_step_keeps_its_pairs_on_whatever_gpus_or_the_job_is_refused(
    gpu: str, gpus: int, name: str, model: str, longest: int
) -> None:
    asked = config(name=name, model=model)
    try:
        now, _ = settle_workers(asked, longest, there=machines(1, gpus, gpu))
    except UserError as refused:
        line = str(refused)
    else:
        assert now.train.pairs_per_step == asked.train.pairs_per_step
        assert now.train.workers <= gpus
        return
    assert "GiB short" in line
    assert "\n" not in line


def test_what_is_set_is_never_changed_and_workers_are_left_where_the_batch_would_change() -> None:
    there = machines(1, 8, "h100-80gb")
    now, decisions = settle_workers(
        config("train.pairs_per_worker=2", "model.dtype=float32"), 64, there=there
    )
    assert (now.train.workers, now.train.pairs_per_worker, now.model.dtype) == (1, 2, "float32")
    assert "model.dtype" not in {one.path for one in decisions}


def test_a_job_that_goes_on_elsewhere_keeps_its_batch_and_dtype() -> None:
    began, _ = settle_workers(config(), 1024, there=machines(1, 4, "h100-80gb"))
    previous: dict[str, Any] = yaml.safe_load(dump(began))
    now, _ = settle_workers(config(), 1024, previous, machines(1, 8, "h100-80gb"))
    assert now.train.workers == 4
    changes(previous, now, "there")


def test_a_model_that_no_gpu_holds_is_refused_with_what_may_fit() -> None:
    with pytest.raises(UserError, match=r"GiB short .* model\.lora"):
        settle_workers(config(model="Qwen/Qwen2.5-7B"), 1024, there=machines(1, 1, "l4-24gb"))


def test_deepspeed_that_is_set_is_not_counted_against() -> None:
    given = config(
        "train.deepspeed={zero_optimization: {stage: 3}}",
        "train.workers=8",
        model="Qwen/Qwen2.5-7B",
    )
    now, _ = settle_workers(given, 1024, there=machines(1, 8, "h100-80gb"))
    assert now.train.workers == 8
    assert now.train.resources.gpus == 1
