"""`aligntune quickstart`: makes the assets, trains through the path of `aligntune train`, reports.

An unfinished quickstart in the folder goes on; a finished one is made anew. Only what an earlier
quickstart wrote there is ever removed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.models.auto import import_transformers
from actors.specs import RewardFunctionSpec
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.tree import override
from aligntune.errors import UserError
from aligntune.online.trainer import OnlineTrainer
from aligntune.quickstart.agent import write_agent_assets
from aligntune.quickstart.settings import REWARD_MODEL, quickstart_settings
from aligntune.quickstart.task import write_assets
from aligntune.quickstart.tiny import Assets
from aligntune.runs.checkpoint import write_atomically
from aligntune.runs.jsonl import read_lines
from aligntune.trainers import create_rl_trainer

SHOWN = "exact_match"
ACCURACY = f"eval/reward/{SHOWN}/mean"  # greedy, over the held-out questions
RANKED = "eval/reward/accuracy"  # of a reward model, over the held-out pairs
MADE = ("assets", "reward_model", "run", "result.json")


def run_quickstart(
    algorithm: str,
    out: Path,
    seed: int = 0,
    overrides: Sequence[str] = (),
    task: str = "sum",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Make, train, and return what is also in `out`/result.json.

    Keys: accuracy_before, accuracy_after (held-out, greedy; of an agent the share of episodes that
    end in the right answer), steps, seconds (in all), engine, algorithm, task, seed; and, where a
    reward model had to be trained first, reward_model_accuracy (its share of held-out pairs ranked
    rightly). `say` hears what is done. Raises UserError for a wrong name or a folder with something
    else in it.
    """
    started = time.monotonic()
    settings = quickstart_settings(algorithm, task)
    assets = Assets(out / "assets")
    ranks = task != "agent" and _needs_reward_model(algorithm)
    reward_model = {"model": str(out / "reward_model" / "model"), "name": "reward_model"}
    shown = {"function": SHOWN, "weight": 0.0}  # not trained on
    tree = {
        "algorithm": {"name": algorithm},
        "model": {"name": str(assets.model)},
        "data": {"path": str(assets.train), "eval_path": str(assets.eval)},
        "rewards": [reward_model, shown] if ranks else [SHOWN],
        "output_dir": str(out / "run"),
    }
    told = [*_overrides(settings), f"train.seed={seed}", *overrides]
    config = load_config(tree, told)  # what is wrong is said before anything is made
    if not isinstance(config, RunConfig):
        raise UserError(f"the quickstart has no {config.algorithm_name}; name an online algorithm")
    _check(config, tree["output_dir"])
    _claim(out, {"algorithm": algorithm, "task": task, "seed": seed})
    say(f"a tiny model learns to add, carelessly: {assets.root}")
    _make(assets, write_agent_assets if task == "agent" else write_assets, seed)
    ranked: dict[str, float] = {}
    if ranks:
        say(f"a reward model learns which of two answers is better: {out / 'reward_model'}")
        ranked = {"reward_model_accuracy": _train_reward_model(out, assets, seed)}
    say(f"{config.algorithm_name} trains it: {out / 'run'}")
    trained = OnlineTrainer(config).train()
    rows = read_lines(trained.output_dir / "evals.jsonl")
    accuracy = {row["step"]: row[ACCURACY] for row in rows}
    result = {
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[trained.steps],
        "steps": trained.steps,
        "seconds": round(time.monotonic() - started, 1),
        "engine": trained.engine,
        "algorithm": config.algorithm_name,
        "task": task,
        "seed": seed,
        **ranked,
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _check(config: RunConfig, output_dir: object) -> None:
    """Whether the run will have what is told of it at the end. Raises UserError."""
    shown = [
        reward
        for reward in config.rewards
        if isinstance(reward, RewardFunctionSpec)
        and reward.function == SHOWN
        and reward.name in (None, SHOWN)
    ]
    fits = {
        "eval.at_start": config.eval.at_start,
        "eval.at_end": config.eval.at_end,
        "data.eval_path": config.data.evaluates,
        "rewards": bool(shown),
        "output_dir": config.output_dir == output_dir,
    }
    for key, does in fits.items():
        if not does:
            raise UserError(
                f"the quickstart shows the held-out {SHOWN} before and after, of a run in --out, "
                f"and {key} takes that away; leave it, or train with `aligntune train`"
            )


def _overrides(settings: Mapping[str, object]) -> list[str]:
    return [override(path, value) for path, value in settings.items()]


def _needs_reward_model(algorithm: str) -> bool:
    from aligntune.algorithms import registry

    return registry.get(algorithm).model_validate({}).needs.reward_model


def _train_reward_model(out: Path, assets: Assets, seed: int) -> float:
    """Train a reward model on the task's pairs, in `out`/reward_model, unless a complete one is
    there; returns its accuracy on the held-out pairs."""
    home = out / "reward_model"
    if not (home / "model").is_dir():
        create_rl_trainer(
            algorithm="reward_model",
            model_name=str(assets.model),
            dataset_name=str(assets.pairs),
            output_dir=str(home),
            seed=seed,
            overrides=[
                *_overrides(REWARD_MODEL),
                override("data.eval_path", str(assets.eval_pairs)),
            ],
        ).train()
    rows = read_lines(home / "metrics.jsonl")
    return float([row[RANKED] for row in rows if RANKED in row][-1])


def _claim(out: Path, what: dict[str, Any]) -> None:
    """Make `out` a quickstart's folder, or see that it is the same one's; clear a finished one."""
    marker = out / "quickstart.json"
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"--out {out} holds something else than a quickstart; name a new folder"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(marker, json.dumps(what) + "\n")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written to: {error.strerror}") from error
        return
    there = json.loads(marker.read_text(encoding="utf-8"))
    if there != what:
        raise UserError(f"--out {out} holds the quickstart {there}; name another folder")
    if (out / "result.json").is_file():
        for name in MADE:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _make(assets: Assets, write: Callable[[Path, int], Assets], seed: int) -> None:
    """Write the assets, unless an interrupted quickstart left them complete."""
    if assets.accuracy.is_file():
        return
    if assets.root.exists():
        shutil.rmtree(assets.root)
    import_transformers()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of writing a model that takes no time
    try:
        write(assets.root, seed)
    except RuntimeError as error:
        raise UserError(str(error)) from error
