"""Small local models and data in the places that the documents and examples name.

A folder wins over a hub name of the same form, so a command from a document runs as it is shown,
from a working folder in which `Qwen/Qwen2.5-0.5B-Instruct` is a tiny model. The one thing that
local data refuse is `data.name`, the configuration of a hub data set: see `LOCAL`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

MODELS = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-0.5B",
    "models/qwen",
    "runs/quickstart/assets/model",
)
REWARD_MODELS = ("Skywork/Skywork-Reward-V2-Qwen3-0.6B", "models/reward")
QUESTIONS = ("openai/gsm8k", "data/gsm8k")
CHATS = ("trl-lib/ultrafeedback-prompt", "data/chats")
PAIRS = ("trl-lib/ultrafeedback_binarized", "data/pairs")
CONVERSATIONS = ("trl-lib/Capybara", "data/conversations")

AGENT_MODELS = ("Qwen/Qwen3-0.6B", "models/agent")  # whose template carries tools
SUMS, SECRETS = "data/sums", "data/secrets"

POSITIONS = 32768

LOCAL = ("data.name=null",)
"""Overrides that a command for hub data needs where a folder stands in for the hub."""

ON_CPU = tuple(
    f"{role}.resources.gpus=0" for role in ("policy", "critic", "rollout", "reward", "reference")
)
"""Overrides for a command that asks for GPUs."""

SHORT = (
    "train.epochs=null",
    "train.steps=2",
    "train.groups_per_step=4",
    "train.completions_per_group=2",
    "rollout.engine=transformers",
    "rollout.max_completion_length=4",
    "cluster.object_store_gib=0.25",
)
"""Overrides that make a run of a document a matter of seconds."""


def write_stand_ins(root: Path, tiny_model: Path) -> None:
    """Fill `root`, an empty folder, with the stand-ins and a copy of the examples."""
    shutil.copytree(
        REPOSITORY / "examples", root / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in MODELS:
        _copy(root / name, tiny_model)
    for name in REWARD_MODELS:
        write_reward_model(root / name, tiny_model)
    questions = [
        {"question": f"{10 + i}+{i % 10}", "answer": f"Count on.\n#### {10 + i + i % 10}"}
        for i in range(64)
    ]
    for name in QUESTIONS:
        _write_rows(root / name / "train.jsonl", questions)
        _write_rows(root / name / "test.jsonl", questions[:8])
    chats = [{"prompt": [{"role": "user", "content": f"{i}+1"}]} for i in range(128)]
    for name in CHATS:
        _write_rows(root / name / "train.jsonl", chats)
    pairs = [
        {
            side: [{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": answer}]
            for side, answer in (("chosen", f"{i + 1}"), ("rejected", f"{i}"))
        }
        for i in range(16)
    ]
    for name in PAIRS:
        for split in ("train", "test"):
            _write_rows(root / name / f"{split}.jsonl", pairs)
    for name in ("pairs", "eval_pairs"):  # what the quickstart leaves beside its model
        plain = [{"prompt": f"{i}+1", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(16)]
        _write_rows(root / "runs/quickstart/assets" / f"{name}.jsonl", plain)

    for name in CONVERSATIONS:
        for split in ("train", "test"):
            _write_rows(root / name / f"{split}.jsonl", [{"messages": p["chosen"]} for p in pairs])

    for name in AGENT_MODELS:
        write_agent_model(root / name)
    sums = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(64)]
    _write_rows(root / SUMS / "train.jsonl", sums)
    _write_rows(root / SECRETS / "train.jsonl", [{"secret": i + 1} for i in range(64)])


def write_agent_model(folder: Path) -> None:
    """A tiny model whose chat template carries tools; what it writes is noise."""
    from aligntune.quickstart.agent import make_agent_tokenizer
    from aligntune.quickstart.tiny import tiny_model

    tokenizer = make_agent_tokenizer()
    tiny_model(0, tokenizer, POSITIONS).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _copy(place: Path, target: Path) -> None:
    """`target` at `place`, with as many positions as the models that it stands for."""
    place.mkdir(parents=True)
    for file in target.iterdir():
        if file.name != "config.json":
            shutil.copy(file, place)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = POSITIONS
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_reward_model(folder: Path, tiny_model: Path) -> None:
    """Configuration and tokenizer of a one-label classifier; no weights, so it cannot be run."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_model, num_labels=1, max_position_embeddings=POSITIONS)
    config.architectures = ["Qwen2ForSequenceClassification"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
