"""Every example of an agent dry-runs, as it shows itself, with local models and data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aligntune import cli
from tests.aligntune.test_examples import run_script, shown_commands
from tests.stand_ins import REPOSITORY, write_stand_ins
from tests.trials import equal_trials_once

AGENTS = REPOSITORY / "examples" / "agents"
YAMLS = sorted(AGENTS.glob("*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def _equal_trials_once() -> Iterator[None]:
    with equal_trials_once():
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("agents")
    write_stand_ins(root, tiny_model)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_the_commands_in_a_yaml_example_of_an_agent_dry_run(
    path: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    by_name, by_folder, *_ = shown_commands(path)
    assert by_name[-1] == f"examples/agents/{path.name}"
    assert {"model.name=models/agent"} <= set(by_folder)
    for command in shown_commands(path):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command[1:], "--dry-run"])
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        assert "64 prompts, longest " in shown.out


@pytest.mark.slow
def test_the_commands_in_the_python_example_of_an_agent_dry_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    path = AGENTS / "tools.py"
    for command in shown_commands(path):
        config = run_script(path, command[2:], monkeypatch)
        assert config.algorithm_name == "grpo"
        assert [tool.rpartition(":")[2] for tool in config.tools] == ["add", "multiply"]


def test_each_door_has_an_example() -> None:
    texts = [path.read_text(encoding="utf-8") for path in YAMLS] + [
        (AGENTS / "tools.py").read_text(encoding="utf-8")
    ]
    for door in ("\nenvironment: ", "\nagent: ", "tools=["):
        assert any(door in text for text in texts), door
