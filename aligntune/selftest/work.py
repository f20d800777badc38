"""What the self-test trains and samples with: a model of random weights, groups, and one step.

The weights are random but not flat: a log-prob depends on what was read before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.messages import Completion, GroupTensors, GroupWork, Row, UpdateJob
from actors.packing import share_out
from actors.specs import ModelSpec, PolicySpec
from aligntune.algorithms.grpo import GRPO

SMALL = {"hidden": 512, "layers": 6, "mlp": 1536, "heads": 8, "kv_heads": 2, "vocabulary": 8192}
LARGE = {  # Qwen2.5-0.5B's
    "hidden": 896,
    "layers": 24,
    "mlp": 4864,
    "heads": 14,
    "kv_heads": 2,
    "vocabulary": 151_936,
}


def make_model(folder: Path, sizes: dict[str, int], seed: int = 0, spread: float = 0.04) -> None:
    """Write a Qwen2 of `sizes` in bfloat16, with the quickstart's tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from aligntune.quickstart.task import make_tokenizer

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=8192,
        initializer_range=spread,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def policy_spec(**settings: Any) -> PolicySpec:
    """What an algorithm would have filled in, and `settings`."""
    return PolicySpec.model_validate(
        {"learning_rate": 1e-5, "adam_betas": (0.9, 0.999), "start_timeout_s": 120} | settings
    )


def started(folder: Path, dtype: str = "bfloat16", model: Any = None, **settings: Any) -> Any:
    """A policy rank, alone, with the model in `folder`."""
    from actors.policy import PolicyActor

    spec = ModelSpec.model_validate({"name": str(folder), "dtype": dtype} | (model or {}))
    actor = PolicyActor(spec, policy_spec(**settings), 0, 1, total_steps=100, seed=0)
    actor.start(*actor.address())
    return actor


def ragged(count: int, mean: int, longest: int, seed: int = 0) -> list[int]:
    """Lognormal lengths (sigma 0.8), 16 to `longest`, whose median is about `mean` / 1.4."""
    draw = np.random.default_rng(seed)
    lengths = np.exp(draw.normal(math.log(mean) - 0.32, 0.8, count)).astype(int)
    return [int(length) for length in lengths.clip(16, longest)]


def group_of(group_id: int, prompt: int, lengths: Sequence[int], vocabulary: int) -> GroupTensors:
    """A group of random tokens, the same for the same arguments."""
    draw = np.random.default_rng([group_id, prompt, *lengths])
    total = sum(lengths)
    return GroupTensors(
        group_id=group_id,
        prompt_ids=draw.integers(2, vocabulary, prompt).astype(np.int32),
        lengths=tuple(lengths),
        token_ids=draw.integers(2, vocabulary, total).astype(np.int32),
        logprobs=draw.normal(-9, 0.3, total).astype(np.float32),
        mask=np.ones(total, bool),
    )


def sampled_group(prompt: np.ndarray, completions: Sequence[Completion]) -> GroupTensors:
    """The group that an engine's completions of one prompt make."""
    written = [one.segments[0] for one in completions]  # each is of one turn
    lengths = tuple(len(segment.token_ids) for segment in written)
    return GroupTensors(
        group_id=0,
        prompt_ids=prompt,
        lengths=lengths,
        token_ids=np.concatenate([segment.token_ids for segment in written]),
        logprobs=np.concatenate([segment.logprobs for segment in written]),
        mask=np.ones(sum(lengths), bool),
    )


def job_of(groups: Sequence[GroupTensors], step: int = 1, budget: int = 1024) -> UpdateJob:
    """One GRPO optimiser step on one rank, by advantages of either sign."""
    works, rows = [], []
    for index, group in enumerate(groups):
        count = len(group.lengths)
        signs = np.random.default_rng(index).normal(0, 1, count)
        works.append(
            GroupWork(
                group_id=group.group_id,
                prompt_tokens=len(group.prompt_ids),
                lengths=group.lengths,
                trained=(True,) * count,
                truncated=(False,) * count,
                advantages=tuple(float(sign) for sign in signs),
                scores=(0.0,) * count,
                tensors=group,
            )
        )
        prompt = len(group.prompt_ids)
        rows += [[Row(index, c, prompt + n)] for c, n in enumerate(group.lengths)]
    return UpdateJob(
        step=step,
        groups=tuple(works),
        minibatches=share_out(rows, 1),
        loss=GRPO(beta=0.0).loss,
        recompute_old=True,
        temperature=1.0,
        budget=budget,
    )


def flops_of(parameters: int, layers: int, width: int, rows: Sequence[int]) -> float:
    """Operations of one forward and backward pass over `rows` (tokens of each): 6 a parameter that
    multiplies and token, and 6 layers * width * tokens^2 of causal attention (PaLM, appendix B,
    halved). Recomputation does not count."""
    return 6.0 * parameters * sum(rows) + sum(6.0 * layers * width * n * n for n in rows)
