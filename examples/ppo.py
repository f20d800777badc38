"""PPO with a learned reward model, and a function beside it that has a small weight.

    python examples/ppo.py
    python examples/ppo.py model.name=models/qwen rewards.0.model=models/reward data.path=data/chats

As written it asks for five GPUs: policy, critic, rollouts, reward model and reference. For a run
without any: policy.resources.gpus=0 critic.resources.gpus=0 rollout.resources.gpus=0
reward.resources.gpus=0 reference.resources.gpus=0
"""

from __future__ import annotations

import sys

from aligntune import create_rl_trainer


def no_apology(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
    """-1 for a completion that apologises, else 0. The prompts are messages, so these are too."""
    return [-float("sorry" in messages[-1]["content"].lower()) for messages in completions]


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        algorithm="ppo",
        model_name="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="trl-lib/ultrafeedback-prompt",
        reward_model_name="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        reward_functions=[no_apology],
        reward_function_weights=[0.1],
        batch_size=128,
        max_steps=200,
        max_prompt_length=1024,
        max_completion_length=512,
        output_dir="runs/ppo-ultrafeedback-python",
        overrides=[
            "algorithm.missing_eos_penalty=1",
            "train.groups_per_minibatch=64",
            "model.dtype=bfloat16",
            "policy.resources.gpus=1",
            "critic.resources.gpus=1",
            "rollout.resources.gpus=1",
            "reward.resources.gpus=1",
            "reference.resources.gpus=1",
            *sys.argv[1:],
        ],
    )
    result = trainer.train()
    print(f"{result.steps} steps with {result.engine}; the model is in {result.model}")
    print(f"reward of the last step {result.metrics['reward/mean']:.3f}")


if __name__ == "__main__":
    main()
