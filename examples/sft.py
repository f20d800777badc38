"""Supervised warm-up on conversations, with LoRA: the assistant's answers are imitated.

    python examples/sft.py
    python examples/sft.py model.name=models/qwen data.path=data/conversations

As written it asks for one GPU. For a run without any: train.resources.gpus=0
"""

from __future__ import annotations

import sys

from aligntune import create_rl_trainer


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        algorithm="sft",
        model_name="Qwen/Qwen2.5-0.5B",
        dataset_name="trl-lib/Capybara",
        use_peft=True,
        lora_r=16,
        batch_size=4,
        learning_rate=2e-4,
        max_seq_length=2048,
        output_dir="runs/sft-capybara-python",
        overrides=[
            "data.eval_split=test",
            "data.eval_samples=200",
            "data.max_dropped_fraction=0.25",
            "model.dtype=bfloat16",
            "train.accumulation_steps=8",
            "train.resources.gpus=1",
            *sys.argv[1:],
        ],
    )
    result = trainer.train()
    print(result.describe())
    print(f"loss of the last step {result.metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
