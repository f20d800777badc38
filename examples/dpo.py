"""DPO on pairs of answers, with LoRA: the frozen weights below the adapters are the reference.

    python examples/dpo.py
    python examples/dpo.py model.name=models/qwen data.path=data/pairs

As written it asks for one GPU. For a run without any: train.resources.gpus=0
"""

from __future__ import annotations

import sys

from aligntune import create_rl_trainer


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        algorithm="dpo",
        model_name="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
        use_peft=True,
        lora_r=16,
        batch_size=4,
        learning_rate=1e-5,
        output_dir="runs/dpo-ultrafeedback-python",
        overrides=[
            "data.eval_split=test",
            "data.eval_samples=200",
            "model.dtype=bfloat16",
            "train.accumulation_steps=8",
            "train.resources.gpus=1",
            *sys.argv[1:],
        ],
    )
    result = trainer.train()
    print(result.describe())
    print(f"margin of the last step {result.metrics['reward/margin']:.3f}")


if __name__ == "__main__":
    main()
