"""`create_rl_trainer`: the Python face of `aligntune train`, for every kind of run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Never

from aligntune.config.auto import tree_of
from aligntune.config.code import Agent, Environment, Tool, named_code, not_replaced
from aligntune.config.keywords import RewardFunction, build_tree
from aligntune.config.tree import load_tree

if TYPE_CHECKING:
    from aligntune.online.trainer import OnlineTrainer
    from aligntune.preference.trainer import PreferenceTrainer


def create_rl_trainer(
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    overrides: Sequence[str] | None = None,
    reward_functions: RewardFunction | Sequence[RewardFunction] | None = None,
    reward_function_weights: Sequence[float] | None = None,
    reward_model_name: str | None = None,
    tools: Sequence[Tool] | None = None,
    environment: Environment | None = None,
    agent: Agent | None = None,
    num_epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    max_samples: int | None = None,
    split: str | None = None,
    system_prompt: str | None = None,
    use_peft: bool | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    beta: float | None = None,
    num_generations: int | None = None,
    temperature: float | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_seq_length: int | None = None,
    seed: int | None = None,
    **unknown: Never,
) -> OnlineTrainer | PreferenceTrainer:
    """A trainer from keyword arguments, a config file or mapping, or both.

    An explicit argument wins over the config, and `overrides` win over everything. None counts as
    not given. Nothing is started before `train()`, `evaluate()` or `export()` of the trainer is
    called; `summary()` and `check()` start nothing.

    Args:
        model_name: a local folder, a hub name or an fsspec URI.
        dataset_name: a local file or folder, or a hub name.
        algorithm: ppo, grpo, drgrpo, dapo, gspo, dpo, reward_model, sft, or `module:Class`.
        backend: trl or unsloth, what loads and steps the trained model.
        output_dir: the run directory; default `runs/<algorithm>`.
        config: a YAML file, or a mapping of the same form.
        overrides: `key.path=value` for what has no argument here.
        reward_functions: registered names, `module:function` paths or callables; they take the
            place of every reward of the config.
        reward_function_weights: one a reward function, in the same order.
        reward_model_name: a reward model's folder or hub name.
        tools: functions that the policy may call, with types and a docstring, or their paths.
        environment: a class with `reset` and tools as methods, or several by name.
        agent: an async function that plays an episode, its path, or {"command": [...]}.
        num_epochs: passes over the data.
        max_steps: steps of the whole run.
        batch_size: prompts of a step; in a preference job pairs of a forward pass of a worker.
        learning_rate: of AdamW; default: the algorithm's.
        max_samples: the first rows of the training data.
        split: a split or a slice of one, as in `train[:95%]`.
        system_prompt: the first message of every prompt.
        use_peft: True trains LoRA adapters with defaults, False the whole model.
        lora_r: rank of the adapters.
        lora_alpha: scale of the adapters; updates are multiplied by alpha / r.
        beta: weight of the KL term; in DPO how strongly the policy is held to the reference.
        num_generations: completions of a group.
        temperature: of sampling.
        max_prompt_length: tokens.
        max_completion_length: tokens.
        max_seq_length: tokens of prompt and completion together. Of an online algorithm give
            max_completion_length too: the prompt has what it leaves. In a preference job it stands
            for data.max_length.
        seed: of data order, sampling and new weights.

    Raises:
        UserError: whatever is wrong, in one line, before anything starts.
    """
    arguments = dict(locals())
    arguments |= arguments.pop("unknown")
    arguments, code = named_code(arguments)
    given, changes, functions = build_tree(arguments)
    tree = load_tree(given, changes)

    from aligntune.config.load import load_config
    from aligntune.config.preference import PreferenceConfig

    loaded = load_config(tree)
    code = not_replaced(functions | code, tree_of(loaded))
    if isinstance(loaded, PreferenceConfig):
        from aligntune.preference.trainer import PreferenceTrainer

        return PreferenceTrainer(loaded, code)
    from aligntune.online.trainer import OnlineTrainer

    return OnlineTrainer(loaded, code)
