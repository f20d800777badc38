"""The familiar keyword arguments of `create_rl_trainer` and the config paths they stand for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from aligntune.config.code import described
from aligntune.config.tree import load_tree, set_path
from aligntune.errors import UserError, nearest, shown
from aligntune.names import algorithm_of, preference_name

PATHS = {
    "model_name": "model.name",
    "dataset_name": "data.path",
    "algorithm": "algorithm",
    "backend": "backend",
    "output_dir": "output_dir",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "batch_size": "train.groups_per_step",
    "learning_rate": "policy.learning_rate",
    "max_samples": "data.max_samples",
    "system_prompt": "data.system_prompt",
    "split": "data.split",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "beta": "algorithm.beta",
    "num_generations": "train.completions_per_group",
    "temperature": "rollout.temperature",
    "max_prompt_length": "rollout.max_prompt_length",
    "max_completion_length": "rollout.max_completion_length",
    "seed": "train.seed",
    "tools": "tools",
    "environment": "environment",
    "agent": "agent",
}
PREFERENCE_PATHS = {
    **{
        name: PATHS[name]
        for name in (
            "model_name",
            "dataset_name",
            "algorithm",
            "backend",
            "output_dir",
            "num_epochs",
            "max_steps",
            "max_samples",
            "system_prompt",
            "split",
            "lora_r",
            "lora_alpha",
            "beta",
            "seed",
        )
    },
    "batch_size": "train.pairs_per_worker",
    "learning_rate": "train.learning_rate",
    "max_seq_length": "data.max_length",
}
"""Of DPO and reward-model jobs, which roll nothing out."""
SPECIAL = (
    "config",
    "overrides",
    "max_seq_length",
    "use_peft",
    "reward_functions",
    "reward_function_weights",
    "reward_model_name",
)

RewardFunction = str | Callable[..., Any]


def build_tree(
    arguments: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str], dict[str, Callable[..., Any]]]:
    """A config tree, the overrides on top, and the reward callables by their place in the tree.

    `config` is a YAML file or a mapping; an explicit argument wins over it, None counts as not
    given. Raises UserError for a name that is not known, with the nearest that is.
    """
    for name in arguments:
        if name not in PATHS and name not in SPECIAL:
            raise UserError(
                f"create_rl_trainer has no argument {name!r}; {nearest(name, [*PATHS, *SPECIAL])}"
            )
    given = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in arguments.items()
        if value is not None
    }
    tree = _base(given.get("config"))
    kind = preference_name(given.get("algorithm", algorithm_of(tree)))
    paths = PATHS if kind is None else PREFERENCE_PATHS
    if kind is not None:
        valid = [*PREFERENCE_PATHS, "config", "overrides", "use_peft"]
        if kind == "reward_model":  # of scored texts
            valid += ["reward_functions", "reward_function_weights"]
        for name in given:
            if name not in valid:
                raise UserError(f"{kind} has no argument {name!r}; it takes {', '.join(valid)}")
    if not isinstance(given.get("use_peft", False), bool):
        raise UserError(f"use_peft is True or False, not {shown(given['use_peft'])}")
    if given.get("use_peft") is False:
        if "lora_r" in given or "lora_alpha" in given:
            raise UserError("use_peft=False and lora_r or lora_alpha contradict each other")
        set_path(tree, "model.lora", None)
    elif given.get("use_peft") and not _has_lora(tree.get("model")):
        set_path(tree, "model.lora", {})
    for name, path in paths.items():
        if name in given:
            set_path(tree, path, given[name])
    if "max_steps" in given and "num_epochs" not in given:
        tree["train"].pop("epochs", None)
    elif "num_epochs" in given and "max_steps" not in given:
        tree["train"].pop("steps", None)
    if "max_seq_length" in given and kind is None:
        _split_length(tree, given)
    functions = _rewards(tree, given)
    if "output_dir" not in tree:
        tree["output_dir"] = os.path.join("runs", _named(algorithm_of(tree)))
    return tree, _overrides(given.get("overrides", ())), functions


def _named(algorithm: Any) -> str:
    return algorithm if isinstance(algorithm, str) and algorithm else "run"


def _overrides(given: Any) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UserError(f"overrides is a list of 'key.path=value', not {shown(given)}")
    items = list(given)
    for item in items:
        if not isinstance(item, str):
            raise UserError(f"overrides: {shown(item)} is not a text of the form 'key.path=value'")
    return items


def _has_lora(model: Any) -> bool:
    return isinstance(model, Mapping) and bool(model.get("lora"))


def _base(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, str | Mapping):
        return load_tree(config)
    raise UserError(f"config is a YAML file or a mapping, not {type(config).__name__}")


def _split_length(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """max_seq_length is prompt and completion together: what one leaves is the other's."""
    total = _count("max_seq_length", given["max_seq_length"])
    rollout = tree.get("rollout")
    length = rollout.get("max_completion_length") if isinstance(rollout, Mapping) else None
    if length is None:
        raise UserError(
            "max_seq_length is prompt and completion together; give max_completion_length too"
        )
    completion = _count("max_completion_length", length)
    prompt = total - completion
    if prompt <= 0:
        raise UserError(
            f"max_seq_length={total} leaves no token for the prompt beside "
            f"max_completion_length={completion}"
        )
    if given.get("max_prompt_length") not in (None, prompt):
        raise UserError(
            f"max_prompt_length={given['max_prompt_length']} and max_completion_length="
            f"{completion} do not add up to max_seq_length={total}; drop one of the three"
        )
    set_path(tree, "rollout.max_prompt_length", prompt)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} is a number of tokens, not {shown(value)}")
    return value


def _rewards(tree: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Put the rewards and their weights into the tree; returns those given as callables, by place,
    as `rewards.0.function`.

    `reward_functions` takes the place of every reward of the config; `reward_model_name` alone
    takes that of its reward models.
    """
    weights = _list("reward_function_weights", given.get("reward_function_weights"))
    model = given.get("reward_model_name")
    if "reward_functions" not in given:
        if weights is not None:
            raise UserError("reward_function_weights needs reward_functions, in the same order")
        if model is not None:
            there = _list("rewards", tree.get("rewards")) or []
            functions_of_file = [r for r in there if not _is_model(r)]
            tree["rewards"] = [{"model": model}, *functions_of_file]
        return {}
    rewards = given["reward_functions"]
    one = isinstance(rewards, str) or callable(rewards)
    items: list[RewardFunction] = [rewards] if one else _list("reward_functions", rewards) or []
    if weights is not None and len(weights) != len(items):
        raise UserError(f"{len(weights)} reward_function_weights for {len(items)} reward_functions")
    functions: dict[str, Callable[..., Any]] = {}
    entries: list[dict[str, Any]] = [] if model is None else [{"model": model}]
    for index, item in enumerate(items):
        entry: dict[str, Any] = {}
        if isinstance(item, str):
            entry["function"] = item
        elif callable(item):
            place = f"rewards.{len(entries)}.function"
            name = getattr(item, "__name__", type(item).__name__)
            entry.update(
                function=described(place, item),
                name=name if name != "<lambda>" else f"lambda_{index}",
            )
            functions[place] = item
        else:
            raise UserError(f"reward_functions[{index}] is neither a name nor a callable")
        if weights is not None:
            entry["weight"] = weights[index]
        entries.append(entry)
    tree["rewards"] = entries
    return functions


def _list(name: str, value: Any) -> list[Any] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        raise UserError(f"{name} is a list, not {shown(value)}")
    return list(value)


def _is_model(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "model" in entry
