"""Rows that do not fit the environments and tools of a run are refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligntune.errors import UserError
from aligntune.online.trainer import OnlineTrainer
from aligntune.trainers import create_rl_trainer
from tests.aligntune.online.user_code import Quiet, nod
from tests.stand_ins import write_agent_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agent-model")
    write_agent_model(folder)
    return folder


def trainer(tmp_path: Path, model: Path, rows: list[dict[str, Any]], **code: Any) -> OnlineTrainer:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = create_rl_trainer(
        algorithm="grpo",
        model_name=str(model),
        dataset_name=str(data),
        output_dir=str(tmp_path / "run"),
        overrides=["rollout.engine=transformers", "train.groups_per_step=1"],
        **code,
    )
    assert isinstance(made, OnlineTrainer)
    return made


@pytest.mark.slow
def test_a_row_with_tools_of_its_own_is_refused(tmp_path: Path, model: Path) -> None:
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    rows = [{"prompt": "1", "answer": "1", "tools": None}, {"prompt": "2", "tools": [schema]}]
    checked = trainer(tmp_path, model, rows, tools=[nod], reward_functions="exact_match")
    with pytest.raises(UserError, match="row 1 of the data has tools of its own"):
        checked.check()


@pytest.mark.slow
def test_a_row_of_no_environment_that_is_named_is_refused(tmp_path: Path, model: Path) -> None:
    rows = [{"environment": "quiet"}, {"environment": "loud"}]
    with pytest.raises(UserError, match="row 1 of the data has environment 'loud'"):
        trainer(tmp_path, model, rows, environment={"quiet": Quiet}).check()


@pytest.mark.slow
def test_an_environment_may_ask_in_the_rows_stead(tmp_path: Path, model: Path) -> None:
    rows: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}]
    trainer(tmp_path, model, rows, environment=Quiet).check()
    with pytest.raises(UserError, match="no column 'prompt'"):
        trainer(tmp_path, model, rows, tools=[nod], reward_functions="exact_match").check()
