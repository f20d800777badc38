"""Every algorithm with every backend, from `create_rl_trainer` as a user calls it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aligntune import create_rl_trainer
from aligntune.errors import RunFailed, UserError
from tests.e2e.conftest import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ONLINE = ("ppo", "grpo", "gspo", "dapo", "drgrpo")
PREFERENCE = ("dpo", "reward_model", "sft")
BACKENDS = ("trl", "unsloth")
REFUSED = {("gspo", "unsloth"), ("reward_model", "unsloth")}
IN_EVERY_RUN = {("dpo", "unsloth")}  # test_page_examples.py has others, online through Unsloth too
CELLS = [(algorithm, backend) for algorithm in (*ONLINE, *PREFERENCE) for backend in BACKENDS]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty preferences."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"{i}+1", "chosen": str(i + 1), "rejected": str(i)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with one label and a head that is not trained."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward-model")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(
    tiny_model: Path, questions: Path, pairs: Path, reward_model: Path, tmp_path: Path
) -> Callable[[str, str], dict[str, Any]]:
    """The keyword arguments of a cell."""

    def make(algorithm: str, backend: str) -> dict[str, Any]:
        online = algorithm in ONLINE
        given: dict[str, Any] = {
            "model_name": str(tiny_model),
            "dataset_name": str(questions if online else pairs),
            "algorithm": algorithm,
            "backend": backend,
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "overrides": ["tracking.trackers=[]"],
        }
        if algorithm == "sft":
            given["overrides"].append("data.completion_column=chosen")
        if not online:
            return given
        if algorithm == "ppo":
            given["reward_model_name"] = str(reward_model)
        else:
            given["reward_functions"] = "tests.e2e.rewards:digits"
            given["num_generations"] = 4
        given |= {"max_prompt_length": 24, "max_completion_length": 8, "use_peft": True}
        given["overrides"] += ["rollout.engine=transformers", "train.groups_per_minibatch=4"]
        return given

    return make


def cell(algorithm: str, backend: str) -> Any:
    marks = () if (algorithm, backend) in IN_EVERY_RUN else (pytest.mark.long,)
    return pytest.param(algorithm, backend, marks=marks, id=f"{algorithm}-{backend}")


@pytest.mark.parametrize(
    ("algorithm", "backend"), [cell(*names) for names in CELLS if names not in REFUSED]
)
def test_a_supported_cell_trains_with_the_backend_it_names(
    ray_session: None,
    arguments: Callable[[str, str], dict[str, Any]],
    tiny_model: Path,
    algorithm: str,
    backend: str,
) -> None:
    given = arguments(algorithm, backend)
    folder = Path(given["output_dir"])
    result = create_rl_trainer(**given).train()

    assert result.steps == 2
    assert [row["step"] for row in read(folder / "metrics.jsonl") if row["step"]] == [1, 2]
    plain = "trl " if algorithm in PREFERENCE else "transformers "
    wanted = "unsloth " if backend == "unsloth" else plain
    assert result.backend.startswith(wanted)
    started = [e for e in read(folder / "events.jsonl") if e["kind"] == "role_started"]
    assert [e["backend"] for e in started if "backend" in e] == [result.backend]
    config = (folder / "config.yaml").read_text()
    assert f"# ran with backend: {result.backend}\n" in config
    assert f"\nbackend: {backend}\n" in config
    assert "unsloth" not in sys.modules, "it belongs into the worker"

    if algorithm == "grpo":  # its reference is always the plain model
        first = next(row for row in read(folder / "metrics.jsonl") if row["step"] == 1)
        assert first["kl/reference"] == pytest.approx(0.0, abs=1e-8)
        assert first["kl/rollout_vs_policy"] == pytest.approx(0.0, abs=1e-5)

    before = load_file(tiny_model / "model.safetensors")
    after = load_file(result.model / "model.safetensors")
    shared = before.keys() & after.keys()
    assert len(shared) >= len(before) - 1
    assert any(not torch.equal(before[name], after[name]) for name in shared)


@pytest.mark.parametrize(("algorithm", "backend"), sorted(REFUSED))
def test_a_refused_cell_is_refused_before_anything_starts(
    arguments: Callable[[str, str], dict[str, Any]], algorithm: str, backend: str
) -> None:
    given = arguments(algorithm, backend)
    with pytest.raises(UserError, match=f"{algorithm} does not run with backend={backend}") as said:
        create_rl_trainer(**given)
    assert "\n" not in str(said.value)
    assert not Path(given["output_dir"]).exists()


@pytest.mark.long
def test_what_only_the_policy_s_process_can_see_ends_the_run_with_its_reason(
    ray_session: None, arguments: Callable[[str, str], dict[str, Any]]
) -> None:
    """Here that four bits need a GPU, in a run whose driver was told that there is one."""
    given = arguments("grpo", "unsloth")
    given["overrides"] += ["model.load_in_4bit=true", "policy.resources.gpus=1"]
    trainer = create_rl_trainer(**given)
    policy = trainer.config.policy  # type: ignore[union-attr]
    resources = policy.resources.model_copy(update={"gpus": 0.0})
    policy = policy.model_copy(update={"resources": resources})
    trainer.config = trainer.config.model_copy(update={"policy": policy})
    with pytest.raises(RunFailed, match="needs a GPU and this worker has none"):
        trainer.train()
    events = read(Path(given["output_dir"]) / "events.jsonl")
    assert "needs a GPU" in events[-1]["reason"]
