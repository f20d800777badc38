"""What the quickstart sets for each algorithm: the values at which its model and task were seen to
learn. They say nothing about other models. Importing this loads no torch.
"""

from __future__ import annotations

from aligntune.errors import UserError, nearest
from aligntune.quickstart.agent import MAX_SAMPLED_TOKENS, MAX_TURNS
from aligntune.quickstart.task import MAX_ANSWER_TOKENS

TASKS = ("sum", "agent")

_COMMON: dict[str, object] = {
    "rollout.temperature": 1.0,
    "rollout.max_completion_length": MAX_ANSWER_TOKENS,
    "rollout.max_prompt_length": 32,
    "policy.adam_betas": [0.9, 0.99],
}

_TUNED: dict[str, dict[str, object]] = {
    "grpo": {
        "train.steps": 30,
        "train.groups_per_step": 16,
        "train.completions_per_group": 8,
        "train.groups_per_minibatch": 16,
        "policy.learning_rate": 2e-4,
    },
    "drgrpo": {
        "train.steps": 30,
        "train.groups_per_step": 16,
        "train.completions_per_group": 8,
        "train.groups_per_minibatch": 16,
        "policy.learning_rate": 2e-4,
    },
    "dapo": {
        "train.steps": 20,
        "train.groups_per_step": 16,
        "train.completions_per_group": 8,
        "train.groups_per_minibatch": 8,
        "algorithm.max_sampling_rounds": 30,
        "policy.learning_rate": 1e-4,
    },
    "gspo": {
        "train.steps": 40,
        "train.groups_per_step": 16,
        "train.completions_per_group": 8,
        "train.groups_per_minibatch": 4,
        "policy.learning_rate": 1e-4,
    },
    "ppo": {
        "train.steps": 20,
        "train.groups_per_step": 128,
        "train.completions_per_group": 1,
        "train.groups_per_minibatch": 64,
        "train.epochs_per_batch": 2,
        "policy.learning_rate": 2e-4,
        "critic.learning_rate": 1e-3,
    },
}

_AGENT: dict[str, object] = {
    "train.steps": 8,
    "train.groups_per_step": 16,
    "train.completions_per_group": 8,
    "train.groups_per_minibatch": 8,
    "tools": ["aligntune.quickstart.agent:add"],
    "rollout.temperature": 1.0,
    "rollout.max_completion_length": MAX_SAMPLED_TOKENS,
    "rollout.max_prompt_length": 32,
    "episodes.max_turns": MAX_TURNS,
    "policy.adam_betas": [0.9, 0.99],
}
"""Of an agent, whatever the algorithm, over its learning rate and the like in `_TUNED`."""

REWARD_MODEL: dict[str, object] = {
    "train.steps": 400,
    "train.pairs_per_worker": 64,
    "train.learning_rate": 1e-3,
    "train.warmup_steps": 50,
    "train.adam_betas": [0.9, 0.99],
    "eval.pairs_per_worker": 64,
    "eval.at_start": False,
    "checkpoint.every_steps": 200,
    "data.max_length": 64,
}
"""Of the job that trains the reward model an algorithm needs, on the task's preference pairs."""


def quickstart_settings(algorithm: str, task: str = "sum") -> dict[str, object]:
    """What the quickstart sets for `algorithm` or an alias of it, as `key.path: value` of the tree.

    `task` is one of `TASKS`.

    Learning rates and steps are those at which this model and task were seen to learn; they say
    nothing about other models.

    Raises:
        UserError: no such task, or no settings for that algorithm.
    """
    if task not in TASKS:
        raise UserError(f"the quickstart has no task {task!r}; {nearest(task, TASKS)}")
    from aligntune.algorithms import registry  # torch: seconds, and only needed here

    try:
        chosen = registry.get(algorithm)
    except ValueError as error:
        raise UserError(str(error)) from error
    tuned = {registry.get(name): settings for name, settings in _TUNED.items()}
    if chosen not in tuned:
        raise UserError(
            f"the quickstart has no settings for {algorithm!r}; {nearest(algorithm, tuple(_TUNED))}"
        )
    if task == "agent":
        return {**tuned[chosen], **_AGENT}
    return {**_COMMON, **tuned[chosen]}
