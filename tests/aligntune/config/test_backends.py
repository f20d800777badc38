"""What `backend: unsloth` cannot do is refused in one line, and nothing imports it here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aligntune import create_rl_trainer
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.settle_resources import settled

NCCL = ["rollout.weight_sync=nccl"]
IPC = ["rollout.weight_sync=ipc"]
QLORA = ["backend=unsloth", "model.load_in_4bit=true", "model.lora.r=8"]


def tree(algorithm: str) -> dict[str, Any]:
    online = {} if algorithm == "dpo" else {"rewards": ["math"]}
    data = {"path": "d"}
    return {
        "algorithm": algorithm,
        "model": {"name": "m"},
        "data": data,
        "output_dir": "o",
        **online,
    }


@pytest.mark.parametrize(
    ("algorithm", "overrides", "message"),
    [
        ("grpo", ["model.load_in_4bit=true"], "needs backend=unsloth"),
        ("grpo", ["backend=unsloth", "model.load_in_4bit=true"], "needs model.lora"),
        ("grpo", [*QLORA, "policy.resources.gpus=0"], r"policy\.resources\.gpus is 0"),
        ("dpo", [*QLORA, "train.resources.gpus=0"], r"train\.resources\.gpus is 0"),
        ("grpo", ["backend=unsloth", "policy.strategy=deepspeed"], "use backend=trl"),
        ("grpo", ["backend=unsloth", "policy.strategy=fsdp"], "policy.strategy=fsdp does not run"),
        ("dpo", ["backend=unsloth", "train.deepspeed={}"], "use backend=trl"),
        ("drgrpo", ["backend=unsloth", "model.attention=eager"], "chooses the attention kernel"),
        ("grpo", ["rollout.weight_sync=adapter"], "model.lora is not set; set it, or use"),
        ("grpo", ["rollout.weight_sync=deltas"], "give one of full, delta, adapter, nccl, ipc"),
        ("grpo", [*NCCL, "rollout.engine=transformers"], "use rollout.engine=vllm"),
        ("grpo", [*NCCL, "policy.resources.gpus=0"], r"policy\.resources\.gpus=0; set it to 1"),
        ("grpo", [*NCCL, "rollout.resources.gpus=0.5"], r"resources\.gpus=0\.5; set it to 1"),
        ("grpo", [*NCCL, "cluster.colocate=[[policy, rollout]]"], r"set cluster\.colocate=\[\]"),
        ("grpo", [*NCCL, "backend=unsloth"], "use backend=trl, or use rollout.weight_sync=full"),
        (
            "grpo",
            [*NCCL, "rollout.engine={name: vllm, options: {data_parallel_size: 2}}"],
            "has data_parallel_size; remove it",
        ),
        ("grpo", [*IPC, "rollout.engine=transformers"], "use rollout.engine=vllm"),
        ("grpo", [*IPC, "rollout.resources.gpus=0"], "give both a GPU, or use"),
        ("grpo", [*IPC, "cluster.colocate=[]"], r"set cluster\.colocate=\[\[policy, rollout\]\]"),
        (
            "grpo",
            [*IPC, "rollout.engine={name: vllm, tensor_parallel_size: 2}"],
            "tensor_parallel_size=2; use 1",
        ),
        (
            "grpo",
            [*IPC, "policy.strategy=fsdp", "policy.ranks=2", "rollout.replicas=4"],
            r"replicas=4 are more than policy\.ranks=2; lower them",
        ),
        (
            "grpo",
            [*QLORA, "policy.resources.gpus=1", "rollout.weight_sync=adapter"],
            "use rollout.weight_sync=full",
        ),
        ("grpo", ["policy.shared_prompts=true", "policy.packing=false"], "remove one of the two"),
        (
            "grpo",
            ["policy.shared_prompts=true", "backend=unsloth"],
            "policy.shared_prompts has no effect with backend=unsloth",
        ),
        ("gspo", ["backend=unsloth"], "gspo does not run with backend=unsloth"),
    ],
)
def test_what_the_backend_cannot_do_is_refused(
    algorithm: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as said:
        load_config(tree(algorithm), overrides)
    assert "\n" not in str(said.value)


def test_resources_of_nccl_that_are_open_are_checked_once_they_are_settled() -> None:
    config = load_config(tree("grpo"), NCCL)
    assert isinstance(config, RunConfig)
    one_each = {"policy.resources.gpus": 1.0, "rollout.resources.gpus": 1.0}
    settled(config, {**one_each, "cluster.colocate": []})
    for shared in (
        {**one_each, "cluster.colocate": [["policy", "rollout"]]},
        {**one_each, "policy.resources.gpus": 0.0},
        {**one_each, "rollout.engine": "transformers"},
    ):
        with pytest.raises(UserError, match=r"or use rollout\.weight_sync=full"):
            settled(config, shared)


def test_resources_of_ipc_that_are_open_are_checked_once_they_are_settled() -> None:
    config = load_config(tree("grpo"), IPC)
    assert isinstance(config, RunConfig)
    shared = {
        "policy.resources.gpus": 1.0,
        "rollout.resources.gpus": 1.0,
        "cluster.colocate": [["policy", "rollout", "reference"]],
    }
    settled(config, shared)
    for apart in ({**shared, "cluster.colocate": []}, {**shared, "rollout.resources.gpus": 0.0}):
        with pytest.raises(UserError, match=r"or use rollout\.weight_sync=full"):
            settled(config, apart)


@pytest.mark.parametrize(("algorithm", "role"), [("grpo", "policy"), ("dpo", "train")])
def test_four_bits_are_taken_where_there_is_a_gpu(algorithm: str, role: str) -> None:
    load_config(tree(algorithm), [*QLORA, f"{role}.resources.gpus=1"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_a_missing_package_is_found_before_anything_starts(
    algorithm: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"chosen": "2", "rejected": "3"} if algorithm == "dpo" else {"answer": "2"}
    rows = [{"prompt": "1+1", **wanted}] * 8
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = create_rl_trainer(
        algorithm=algorithm,
        backend="unsloth",
        model_name=str(tiny_model),
        dataset_name=str(data),
        output_dir=str(tmp_path / "run"),
        **({} if algorithm == "dpo" else {"reward_functions": "exact_match"}),
    )
    trainer.check()
    assert "unsloth" not in sys.modules
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "unsloth_zoo" else find(name)
    )
    with pytest.raises(UserError, match="needs unsloth_zoo, which is not installed"):
        trainer.train()
    assert not (tmp_path / "run").exists()
