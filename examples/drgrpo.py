"""Dr. GRPO on grade-school maths, with LoRA instead of full fine-tuning.

    python examples/drgrpo.py
    python examples/drgrpo.py model.name=models/qwen data.path=data/gsm8k data.name=null

As written it asks for two GPUs, for policy and rollouts. For a run without any:
policy.resources.gpus=0 rollout.resources.gpus=0
"""

from __future__ import annotations

import sys

from aligntune import create_rl_trainer


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        algorithm="drgrpo",
        model_name="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="openai/gsm8k",
        system_prompt="Reason step by step. Put the final answer in \\boxed{}.",
        reward_functions="math",
        use_peft=True,
        lora_r=16,
        lora_alpha=32,
        learning_rate=2e-5,
        num_generations=8,
        max_prompt_length=512,
        max_completion_length=1024,
        output_dir="runs/drgrpo-gsm8k-python",
        overrides=[
            "data.name=main",
            "data.prompt_column=question",
            "model.dtype=bfloat16",
            "policy.resources.gpus=1",
            "rollout.resources.gpus=1",
            *sys.argv[1:],
        ],
    )
    result = trainer.train()
    print(f"{result.steps} steps with {result.engine}; the model is in {result.model}")
    print(f"reward of the last step {result.metrics['reward/mean']:.3f}")


if __name__ == "__main__":
    main()
