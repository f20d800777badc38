"""TRL's GRPOTrainer as a system, with its defaults for generation; warmed up on a few tokens."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.end_to_end import work as works
from tests.bench.end_to_end.seen import Group, Step, cpu_seconds
from tests.bench.end_to_end.work import Work


def run(work: Work, steps: int) -> Sequence[Step]:
    """A trainer on `work.threads` threads."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tests.e2e.rewards import digits

    torch.set_num_threads(work.threads)
    seen: list[Step] = []
    groups: list[Group] = []
    begun: list[tuple[float, float]] = []

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        scores = digits(completions)
        for start in range(0, len(prompts), work.completions):
            own = slice(start, start + work.completions)
            groups.append(
                Group(
                    prompt=prompts[start],
                    texts=tuple(completions[own]),
                    tokens=tuple(map(len, completion_ids[own])),
                    rewards=tuple(scores[own]),
                )
            )
        return scores

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            groups.clear()
            begun.append((time.perf_counter(), cpu_seconds()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = begun[-1]
            seen.append(
                Step(
                    wall_s=time.perf_counter() - wall,
                    cpu_s=cpu_seconds() - cpu,
                    loss=None,
                    groups=tuple(groups),
                )
            )

    with tempfile.TemporaryDirectory(prefix="bench-trl-") as name:
        folder = Path(name)
        path, _ = works.write(work, folder)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = torch.ones((work.samples, work.prompt_tokens[0]), dtype=torch.long)
        model.generate(ids[: work.completions], max_new_tokens=2, do_sample=True)
        model(ids[: work.completions]).logits.sum().backward()
        model.zero_grad()
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(**works.trl(work, folder, steps)),
            train_dataset=Dataset.from_list([{"prompt": text} for text in works.prompts_of(work)]),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [step.model_copy(update={"loss": loss}) for step, loss in zip(seen, losses, strict=True)]
