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
from aligntune.errors import UserError

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
        ("grpo", ["rollout.weight_sync=deltas"], "give one of full, delta, adapter"),
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


@pytest.mark.parametrize(("algorithm", "role"), [("grpo", "policy"), ("dpo", "train")])
def test_four_bits_are_taken_where_there_is_a_gpu(algorithm: str, role: str) -> None:
    load_config(tree(algorithm), [*QLORA, f"{role}.resources.gpus=1"])


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
