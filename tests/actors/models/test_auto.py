"""The Auto classes of transformers without its generation code: light, and whole when needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "ray",
    "torch._dynamo",
    "torch.distributed.tensor",
    "sympy",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "datasets",
    "accelerate",
    "deepspeed",
    "peft",
    "trl",
    "vllm",
)

DRY_RUNS = f"""
import sys
from aligntune.cli import main

for config in ("grpo.yaml", "dpo.yaml", "sft.yaml", "reward_model.yaml"):
    try:
        main(["train", config, "--dry-run"])
    except SystemExit as ended:
        assert ended.code == 0, config
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded

# What is installed is read when somebody asks for what has another name, and then as it is.
from importlib.metadata import packages_distributions
from transformers.utils.import_utils import PACKAGE_DISTRIBUTION_MAPPING as distributions
assert not distributions and distributions.get("torch") is None and not distributions
assert distributions.get("yaml") == ["PyYAML"]
assert dict(distributions) == packages_distributions()

# A model class of a model's own code, as older ones are: it generates without its mixin.
from torch import nn
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

class Own(nn.Module):
    def prepare_inputs_for_generation(self):
        pass

whole = add_generation_mixin_to_remote_model(Own)
from transformers import GenerationMixin
from transformers.generation.utils import GenerationMixin as real
assert GenerationMixin is real
assert whole.__mro__[1:3] == (Own, nn.Module) and real in whole.__mro__, whole.__mro__
"""


@pytest.mark.slow  # its imports are what is looked at
def test_a_dry_run_loads_no_models_code_and_a_models_own_class_still_generates(
    tmp_path: Path, tiny_model: Path
) -> None:
    reward = "def one(completions, **columns):\n    return [1.0 for _ in completions]\n"
    (tmp_path / "dry_run_reward.py").write_text(reward)
    rows = {
        "grpo": {"prompt": "1+1="},
        "dpo": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        "sft": {"prompt": "1+1=", "completion": "2"},
    }
    rows["reward_model"] = rows["dpo"]
    for name, row in rows.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text(f"{json.dumps(row)}\n" * 8)
        config = {
            "algorithm": name,
            "model": {"name": str(tiny_model)},
            "data": {"path": str(data)},
            "train": {"steps": 1},
            "output_dir": str(tmp_path / "runs" / name),
        }
        if name == "grpo":
            config["rewards"] = [{"function": "dry_run_reward:one"}]
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
