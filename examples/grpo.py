"""GRPO on grade-school maths, with a second reward that is written here.

    python examples/grpo.py
    python examples/grpo.py model.name=models/qwen data.path=data/gsm8k data.name=null

As written it asks for three GPUs: policy, rollouts and the reference model. For a run without any:
policy.resources.gpus=0 rollout.resources.gpus=0 reference.resources.gpus=0
"""

from __future__ import annotations

import sys

from aligntune import create_rl_trainer


def concise(completions: list[str], **columns: object) -> list[float]:
    """1 for an empty completion, falling to 0 at 2000 characters."""
    return [max(0.0, 1.0 - len(text) / 2000) for text in completions]


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        algorithm="grpo",
        model_name="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="openai/gsm8k",
        system_prompt="Reason step by step. Put the final answer in \\boxed{}.",
        reward_functions=["math", concise],
        reward_function_weights=[1.0, 0.1],
        num_generations=8,
        max_prompt_length=512,
        max_completion_length=1024,
        output_dir="runs/grpo-gsm8k-python",
        overrides=[
            "data.name=main",
            "data.prompt_column=question",
            "data.eval_split=test",
            "data.eval_samples=200",
            "model.dtype=bfloat16",
            "policy.resources.gpus=1",
            "rollout.resources.gpus=1",
            "reference.resources.gpus=1",
            *sys.argv[1:],
        ],
    )
    result = trainer.train()
    print(f"{result.steps} steps with {result.engine}; the model is in {result.model}")
    print({name: value for name, value in result.metrics.items() if name.startswith("eval/")})


if __name__ == "__main__":
    main()
