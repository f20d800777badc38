"""aligntune as a system: a real run on Ray, with vLLM, and the settings that a variant turns."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.bench.end_to_end import work as works
from tests.bench.end_to_end.seen import Group, Marks, Step
from tests.bench.end_to_end.work import Work

WARM_UP = 1  # steps
LONG = 1_000  # steps of the run, which is stopped once those that are measured are over

VARIANTS: dict[str, dict[str, object]] = {
    "ours_0": {"train.max_staleness": 0},
    "ours_1": {"train.max_staleness": 1},
    **{
        f"core_{staleness}": {
            "train.max_staleness": staleness,
            "policy.resources.threads": 1,
            "rollout.resources.threads": 1,
        }
        for staleness in (0, 1, 2)
    },
    "transformers_0": {"train.max_staleness": 0, "rollout.engine": "transformers"},
}


def run(work: Work, steps: int, changes: dict[str, object]) -> Sequence[Step]:
    """A long run, for short ones settle otherwise, as far as `steps` after its warm-up."""
    from aligntune.errors import Interrupted
    from aligntune.runs.jsonl import read_lines
    from aligntune.trainers import create_rl_trainer

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    with tempfile.TemporaryDirectory(prefix="bench-ours-") as name:
        folder = Path(name)
        model, data = works.write(work, folder)
        config = works.ours(work, model, data, folder, LONG)
        for key, value in changes.items():
            section: dict[str, Any] = config
            *path, last = key.split(".")
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        metrics = folder / "run" / "metrics.jsonl"

        def written() -> int:
            return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

        def stop() -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        with Marks(written, WARM_UP + steps, stop) as marks, suppress(Interrupted):
            create_rl_trainer(config=config).train()
        rows = {row["step"]: row for row in read_lines(metrics)}
        samples = list(read_lines(folder / "run" / "samples.jsonl"))
    return [
        Step(
            wall_s=rows[step]["time/step"],
            cpu_s=marks.at[step][1] - marks.at[step - 1][1],
            loss=rows[step]["loss/total"],
            groups=tuple(group(row) for row in samples if row["step"] == step),
            parts={
                key.removeprefix("time/"): value
                for key, value in rows[step].items()
                if key.startswith("time/")
            },
        )
        for step in range(WARM_UP + 1, WARM_UP + steps + 1)
    ]


def group(row: dict[str, Any]) -> Group:
    """Of a line of samples.jsonl."""
    done = row["completions"]
    return Group(
        prompt=row["prompt"],
        texts=tuple(one["text"] for one in done),
        tokens=tuple(one["tokens"] for one in done),
        rewards=tuple(one["reward"] for one in done),
    )
