"""What is wrong with tools, environments and agents ends a run with exit code 2 before Ray."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from aligntune import cli
from tests.actors.environments.user_code import MODULE
from tests.stand_ins import SUMS, write_agent_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    write_agent_model(root / "models/agent")
    (root / "refused_code.py").write_text(MODULE + "\n\nasync def run(data, **given): ...\n")
    (root / SUMS).mkdir(parents=True)
    rows = [{"prompt": f"{i}+1", "answer": str(i), "environment": "Quite"} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / SUMS / "train.jsonl").write_text(lines)
    return root


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


CODE = "refused_code"
REFUSALS = {
    "a tool without types": (
        f"tools=[{CODE}:no_types]",
        "tool 'no_types': Argument a is missing a type hint in function no_types; give every "
        "parameter a type such as int, str, list[str] or Literal",
    ),
    "a tool without a docstring": (
        f"tools=[{CODE}:no_docstring]",
        "tool 'no_docstring' has no docstring; write one that says what it does, with an Args "
        "section: the model reads it",
    ),
    "two tools of one name": (
        f"tools=[{CODE}:add,{CODE}:add]",
        "two tools are named 'add'; rename one",
    ),
    "a tool and a method of one name": (
        f"tools=[{CODE}:add] environment={CODE}:Adds",
        "two tools are named 'add': a function and a method of the environment; rename one",
    ),
    "a class without reset": (
        f"environment={CODE}:NoReset",
        "environment NoReset has no method reset; write",
    ),
    "an environment that no class has": (
        f"environment={{Quiet: {CODE}:Quiet, Guess: {CODE}:Guess}}",
        "row 0 of the data has environment 'Quite'; did you mean 'Quiet'?",
    ),
    "a template that cannot carry tools": (
        f"tools=[{CODE}:add] model.name={{plain}}",
        "does not render tool calls and their answers; use a model that was trained for tools, "
        "such as Qwen3, or give it such a template",
    ),
    "a port in use": (
        f"agent={CODE}:run episodes.port={{port}}",
        "episodes.port: the sessions of agents cannot be served at 127.0.0.1:{port}: address "
        "already in use; set another one, or leave it out for any that is free",
    ),
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_a_run_that_cannot_be_is_refused_with_its_cure(
    refused: str,
    workplace: Path,
    tiny_model: Path,
    taken_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    overrides, message = (
        text.replace("{port}", str(taken_port)).replace("{plain}", str(tiny_model))
        for text in REFUSALS[refused]
    )
    given = ["--algorithm", "grpo", "--model", "models/agent", "--dataset", SUMS]
    given += ["--reward", "exact_match", *re.split(r" (?=\w+[.=])", overrides)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *given])
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    (line,) = errors.splitlines()
    assert message in line
    assert not (workplace / "runs").exists()
