"""What passes through the driver of a real run: how little of a group, and each call on a trace."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from actors.timeline import Span, Timeline
from aligntune.online import assemble
from aligntune.trainers import create_rl_trainer
from tests.aligntune.tracking.test_trace import checked
from tests.e2e.conftest import read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

COMPLETIONS, TOKENS = 16, 200


def with_positions(model: Path, folder: Path) -> Path:
    """A copy of a model that has room for long completions; its positions have no weights."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


def test_a_groups_texts_stay_out_of_the_driver_and_every_call_is_on_the_trace(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["model"]["name"] = str(with_positions(Path(tree["model"]["name"]), tmp_path / "longer"))
    answered: dict[str, int] = defaultdict(int)

    class Weighing(Timeline):
        """Adds up the bytes that come home for each group."""

        def heard(self, span: Span, answer: Any) -> None:
            answered[span.about] += len(pickle.dumps(answer))
            super().heard(span, answer)

    monkeypatch.setattr(assemble, "Timeline", Weighing)
    tree["algorithm"]["beta"] = 0.04
    tree["train"].update(steps=2, groups_per_step=2, completions_per_group=COMPLETIONS)
    tree["rollout"]["max_completion_length"] = TOKENS
    tree["data"].update(split="train[2:]", eval_split="train[:2]")
    tree["tracking"] = {"trackers": [], "samples_per_step": 1, "profile": True}
    folder = create_rl_trainer(config=tree).train().output_dir

    samples = read(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 2]
    for sample in samples:
        told = sample["completions"]
        assert len(told) == COMPLETIONS
        assert sum(len(completion["text"]) for completion in told) > 2048
        assert sum(completion["advantage"] for completion in told) == pytest.approx(0, abs=1e-4)
        assert all(completion["versions"][0][0] == sample["step"] - 1 for completion in told)
        assert set(told[0]["scores"]) == {"digits"}
    assert [len(sample["completions"]) for sample in read(folder / "eval_samples.jsonl")] == [1] * 4

    groups = {about: size for about, size in answered.items() if about.startswith("group ")}
    assert groups.keys() == {f"group {index}" for index in range(4)}
    assert max(groups.values()) <= 2048, groups

    calls = checked((folder / "trace.json").read_text())
    seen = Counter((call["name"], call["args"]["for"]) for call in calls)
    for index in range(4):
        for method in ("generate", "score", "logprobs"):
            assert seen[method, f"group {index}"] == 1
    for step in (1, 2):
        for method in ("update", "export_weights", "load_weights"):
            assert seen[method, f"step {step}"] == 1
    for version in (0, 2):
        assert seen["generate", f"evaluation of version {version}"] == 2
