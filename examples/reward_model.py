"""A reward model from pairs of answers, then the accuracy of the trained one on held-out pairs.

    python examples/reward_model.py
    python examples/reward_model.py model.name=models/qwen data.path=data/pairs

As written it asks for one GPU. For a run without any: train.resources.gpus=0
"""

from __future__ import annotations

import sys

from aligntune import create_rl_trainer


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        algorithm="reward_model",
        model_name="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
        batch_size=8,
        learning_rate=1e-5,
        output_dir="runs/reward-ultrafeedback-python",
        overrides=[
            "algorithm.center_coefficient=0.01",
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
    print(f"held-out accuracy {trainer.evaluate()['eval/reward/accuracy']:.3f}")


if __name__ == "__main__":
    main()
