"""One work as data, which every system does: model, prompts, reward, lengths, optimiser, steps.

The model is untrained, so each token ends a completion with a chance of about 1 in 128, and lengths
are ragged: a mean of some 130 tokens, cut at `new_tokens`. Each step has all prompts once, so the
order in which a system takes them does not matter.
"""

from __future__ import annotations

import json
import os
import random
import string
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Work(BaseModel):
    """What is trained, on what, and how; nothing of who does it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = 256
    layers: int = 8
    intermediate_size: int = 688
    heads: int = 8  # of 32 numbers each, the fewest that vLLM's attention on CPU takes
    prompts: int = 16
    completions: int = 8
    prompt_tokens: tuple[int, int] = (24, 56)
    new_tokens: int = 512
    learning_rate: float = 1e-6
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip: float = 0.2
    temperature: float = 1.0
    seed: int = 1
    cores: int | None = None  # threads of each half; none: all, as ours takes them by default

    @property
    def threads(self) -> int:
        """Of whoever has to be told."""
        return self.cores or os.cpu_count() or 1

    @property
    def samples(self) -> int:
        """Completions of a step."""
        return self.prompts * self.completions

    @property
    def longest(self) -> int:
        """Tokens of prompt and completion."""
        return self.prompt_tokens[1] + self.new_tokens


SIX_MILLION = Work()
SMALL = Work(
    hidden_size=64,
    layers=2,
    intermediate_size=128,
    heads=2,
    prompts=4,
    completions=4,
    new_tokens=48,
)
REWARD = "tests.e2e.rewards:digits"  # the share of characters that are digits


def prompts_of(work: Work) -> list[str]:
    """The prompts, each of as many characters as it has tokens."""
    draw = random.Random(work.seed)
    letters = string.ascii_letters + string.digits + " "
    return [
        "".join(draw.choice(letters) for _ in range(draw.randint(*work.prompt_tokens)))
        for _ in range(work.prompts)
    ]


def write(work: Work, folder: Path) -> tuple[Path, Path]:
    """Model and prompts in `folder`; returns where both are."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from aligntune.quickstart.tiny import END, PAD, VOCABULARY_SIZE, tiny_tokenizer

    model, data = folder / "model", folder / "prompts.jsonl"
    tokenizer = tiny_tokenizer((), "", work.longest)
    ids = {"pad_token_id": PAD, "eos_token_id": END}
    torch.manual_seed(work.seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=work.longest,
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype="float32",
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    Qwen2ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts_of(work)))
    return model, data


def ours(work: Work, model: Path, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The work as a config of aligntune's; all that it does not say is left to the defaults."""
    threads = {} if work.cores is None else {"resources": {"threads": work.cores}}
    return {
        "algorithm": {
            "name": "grpo",
            "beta": 0.0,
            "aggregation": "token_mean",
            "clip_low": work.clip,
            "clip_high": work.clip,
            "correction": "none",
        },
        "model": {"name": str(model)},
        "data": {"path": str(data), "apply_chat_template": False},
        "rewards": [{"function": REWARD}],
        "output_dir": str(folder / "run"),
        "train": {
            "steps": steps,
            "groups_per_step": work.prompts,
            "completions_per_group": work.completions,
            "seed": work.seed,
        },
        "rollout": {
            **threads,
            "engine": "vllm",
            "temperature": work.temperature,
            "max_completion_length": work.new_tokens,
            "max_prompt_length": work.prompt_tokens[1],
        },
        "policy": {
            **threads,
            "learning_rate": work.learning_rate,
            "adam_betas": list(work.adam_betas),
            "weight_decay": work.weight_decay,
            "max_grad_norm": work.max_grad_norm,
        },
        "checkpoint": {"every_steps": None, "at_end": False},
        "tracking": {"trackers": [], "samples_per_step": work.prompts},
    }


def trl(work: Work, folder: Path, steps: int) -> dict[str, Any]:
    """The work as the arguments of TRL's GRPOConfig; all that it does not say, generation above
    all, is left to the defaults. A micro-batch has as many rows as there are prompts."""
    return {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": work.prompts,
        "gradient_accumulation_steps": work.completions,
        "num_generations": work.completions,
        "max_completion_length": work.new_tokens,
        "temperature": work.temperature,
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon": work.clip,
        "scale_rewards": "group",
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": work.adam_betas[0],
        "adam_beta2": work.adam_betas[1],
        "weight_decay": work.weight_decay,
        "max_grad_norm": work.max_grad_norm,
        "seed": work.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,  # ours keeps activations too
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
