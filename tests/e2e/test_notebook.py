"""Trainers are called where an event loop runs already, as in a notebook's cell."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aligntune import create_rl_trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_session")]


def test_an_online_run_trains_and_evaluates_in_a_running_loop(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["train"]["steps"] = 1
    tree["data"] |= {"split": "train[4:]", "eval_split": "train[:4]"}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))

    async def cell() -> tuple[int, dict[str, float]]:
        trainer = create_rl_trainer(config=config)
        return trainer.train().steps, trainer.evaluate()

    steps, figures = asyncio.run(cell())
    assert steps == 1
    assert figures["eval/prompts"] == 4


def test_a_preference_job_of_scored_texts_trains_in_a_running_loop(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i}+1", "completion": text} for i in range(4) for text in ("12", "a")]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def cell() -> int:
        return (
            create_rl_trainer(
                algorithm="reward_model",
                model_name=str(tiny_model),
                dataset_name=str(data),
                reward_functions="tests.e2e.rewards:digits",
                output_dir=str(tmp_path / "run"),
                max_steps=1,
                overrides=["tracking.trackers=[]"],
            )
            .train()
            .steps
        )

    assert asyncio.run(cell()) == 1
