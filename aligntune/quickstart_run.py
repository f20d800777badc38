"""`aligntune quickstart`: makes the assets, trains through the path of `aligntune train`, reports.

An unfinished quickstart in the folder goes on; a finished one is made anew. Only what an earlier
quickstart wrote there is ever removed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligntune.checkpoint import write_atomically
from aligntune.config import load_config
from aligntune.errors import UserError
from aligntune.quickstart import QuickstartAssets, quickstart_settings, write_assets
from aligntune.tracking.metrics import read_lines
from aligntune.trainers import OnlineTrainer

ACCURACY = "eval/reward/exact_match/mean"  # greedy, over the held-out questions
MADE = ("assets", "run", "result.json")


def run_quickstart(
    algorithm: str, out: Path, seed: int = 0, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Make, train, and return what is also in `out`/result.json.

    Keys: accuracy_before, accuracy_after (held-out, greedy), steps, seconds (in all), engine,
    algorithm, seed. Raises UserError for a wrong name or a folder with something else in it.
    """
    started = time.monotonic()
    settings = quickstart_settings(algorithm)
    _claim(out, {"algorithm": algorithm, "seed": seed})
    assets = _assets(out / "assets", seed)
    tree = {
        "algorithm": {"name": algorithm},
        "model": {"name": str(assets.model)},
        "data": {"path": str(assets.train), "eval_path": str(assets.eval)},
        "rewards": ["exact_match"],
        "output_dir": str(out / "run"),
    }
    tuned = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
    config = load_config(tree, [*tuned, f"train.seed={seed}", *overrides])
    trained = OnlineTrainer(config).train()
    rows = read_lines(trained.output_dir / "metrics.jsonl")
    accuracies = [row[ACCURACY] for row in rows if ACCURACY in row]
    result = {
        "accuracy_before": accuracies[0],
        "accuracy_after": accuracies[-1],
        "steps": trained.steps,
        "seconds": round(time.monotonic() - started, 1),
        "engine": trained.engine,
        "algorithm": config.algorithm_name,
        "seed": seed,
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _claim(out: Path, what: dict[str, Any]) -> None:
    """Make `out` a quickstart's folder, or see that it is the same one's; clear a finished one."""
    marker = out / "quickstart.json"
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"--out {out} holds something else than a quickstart; name a new folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, json.dumps(what) + "\n")
        return
    there = json.loads(marker.read_text(encoding="utf-8"))
    if there != what:
        raise UserError(f"--out {out} holds the quickstart {there}; name another folder")
    if (out / "result.json").is_file():
        for name in MADE:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _assets(root: Path, seed: int) -> QuickstartAssets:
    """The assets in `root`, made there unless an interrupted quickstart left them complete."""
    done = root / "accuracy.json"
    if not done.is_file():
        if root.exists():
            shutil.rmtree(root)
        try:
            assets = write_assets(root, seed)
        except RuntimeError as error:
            raise UserError(str(error)) from error
        write_atomically(done, json.dumps(assets.accuracy))
    return QuickstartAssets(
        model=root / "model",
        train=root / "train.jsonl",
        eval=root / "eval.jsonl",
        pairs=root / "pairs.jsonl",
        accuracy=json.loads(done.read_text(encoding="utf-8")),
    )
