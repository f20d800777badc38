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
    "aligntune.runs.recorder",
    "aligntune.report.card",
)

DRY_RUNS = f"""
import sys
from aligntune.cli import main

for config in sys.argv[1:]:
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

# What the files of models export is what they say, and each of them was read once.
from pathlib import Path
from transformers import models
from transformers.utils import import_utils
read = import_utils.create_import_structure_from_path
folder = Path(models.__file__).parent
folders = sum(path.is_dir() for path in folder.rglob("[!_]*"))
assert folders > 128 and read.cache_info().misses < 1.5 * folders, (folders, read.cache_info())
read.cache_clear()
found = import_utils.define_import_structure(models.__file__)
anew = type(models)("models", models.__file__, found)
def exported(module):
    return {{name: sorted(of) for name, of in module._import_structure.items()}}
assert exported(models) == exported(anew)
assert models._object_missing_backend == anew._object_missing_backend

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
@pytest.mark.parametrize(
    "names",
    [
        ("grpo", "dpo", "sft", "reward_model"),  # a tokenizer is read first,
        ("bounded",),  # the model's positions,
        ("scored",),  # the reward model's configuration
    ],
)
def test_a_dry_run_loads_no_models_code_and_a_models_own_class_still_generates(
    names: tuple[str, ...], tmp_path: Path, tiny_model: Path
) -> None:
    reward = "def one(completions, **columns):\n    return [1.0 for _ in completions]\n"
    (tmp_path / "dry_run_reward.py").write_text(reward)
    rows = {
        "grpo": {"prompt": "1+1="},
        "dpo": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        "sft": {"prompt": "1+1=", "completion": "2"},
    }
    rows["reward_model"] = rows["dpo"]
    rows["bounded"] = rows["scored"] = rows["grpo"]
    ranks = json.loads((tiny_model / "config.json").read_text())
    ranks |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "score"}}
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "config.json").write_text(json.dumps(ranks))
    for name, row in rows.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text(f"{json.dumps(row)}\n" * 8)
        config = {
            "algorithm": "grpo" if name in ("bounded", "scored") else name,
            "model": {"name": str(tiny_model)},
            "data": {"path": str(data)},
            "train": {"steps": 1},
            "output_dir": str(tmp_path / "runs" / name),
        }
        if name in ("grpo", "bounded"):
            config["rewards"] = [{"function": "dry_run_reward:one"}]
        if name == "scored":
            config["rewards"] = [{"model": str(tmp_path / "ranks")}]
        if name == "bounded":
            config["rollout"] = {"max_prompt_length": 16}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS, *(f"{name}.yaml" for name in names)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
