"""Real runs by each way of sending weights: changes alone make the same run bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from aligntune.trainers import create_rl_trainer
from tests.e2e.conftest import read

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_session")]


def figures(tree: dict[str, Any], folder: Path, sync: str, **model: Any) -> list[dict[str, Any]]:
    """metrics.jsonl of a run of three steps, without times."""
    tree = copy.deepcopy(tree)
    tree["output_dir"] = str(folder)
    tree["rollout"]["weight_sync"] = sync
    tree["model"] |= model
    tree["train"] |= {"steps": 3}
    tree["tracking"] = {"trackers": []}
    run = create_rl_trainer(config=tree).train().output_dir
    timed = ("time", "throughput/", "rollout/")
    return [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in read(run / "metrics.jsonl")
    ]


def test_changes_make_the_run_that_whole_versions_make_and_an_adapter_the_policys_own_logprobs(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    full = figures(tree, tmp_path / "full", "full")
    delta = figures(tree, tmp_path / "delta", "delta")
    sent = [line.pop("weights/sent_fraction") for line in delta]
    assert len(full) == 3
    assert delta == full
    assert sent[0] == 1
    assert all(0 < share <= 1 for share in sent)
    lora = {"lora": {"r": 4, "alpha": 8.0}}
    for line in figures(tree, tmp_path / "adapter", "adapter", **lora):
        assert 0 <= line["kl/rollout_vs_policy"] < 1e-8
