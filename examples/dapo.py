"""DAPO on grade-school maths: from the YAML file beside this one, with some of it changed here.

    python examples/dapo.py
    python examples/dapo.py model.name=models/qwen data.path=data/gsm8k data.name=null

An explicit argument wins over the file, and an override over both. The file asks for two GPUs; for
a run without any: policy.resources.gpus=0 rollout.resources.gpus=0
"""

from __future__ import annotations

import sys
from pathlib import Path

from aligntune import create_rl_trainer


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        config=Path(__file__).with_suffix(".yaml"),
        max_steps=100,
        output_dir="runs/dapo-gsm8k-python",
        overrides=["algorithm.overlong_filtering=true", *sys.argv[1:]],
    )
    result = trainer.train()
    print(f"{result.books.trained} groups trained, {result.books.filtered} filtered")
    print(
        f"{result.metrics['dapo/draws_per_kept_group']:.2f} draws per kept group in the last step"
    )


if __name__ == "__main__":
    main()
