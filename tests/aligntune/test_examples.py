"""Every example loads, names what it says it names, and dry-runs with local models and data."""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aligntune import cli
from aligntune.algorithms import registry
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import ALGORITHMS, PreferenceConfig
from aligntune.online.trainer import OnlineTrainer
from aligntune.preference.trainer import PreferenceTrainer
from tests.stand_ins import LOCAL, REPOSITORY, write_stand_ins
from tests.trials import equal_trials_once

EXAMPLES = REPOSITORY / "examples"
YAMLS = sorted(EXAMPLES.glob("*.yaml"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
DATA_AND_MODEL = ("data.path", "model.name")
ALIKE = (
    "dapo",
    "drgrpo",
    "gspo",
)  # their rewards are grpo's, tried in a process that imports sympy


def tried(examples: list[Path]) -> list[Any]:
    """The examples, those whose dry run does what another's does marked slow."""
    return [pytest.param(p, marks=pytest.mark.slow) if p.stem in ALIKE else p for p in examples]


@pytest.fixture(autouse=True, scope="module")
def _equal_trials_once() -> Iterator[None]:
    with equal_trials_once():
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with stand-ins for the models and data that the examples name."""
    root = tmp_path_factory.mktemp("workplace")
    write_stand_ins(root, tiny_model)
    return root


def shown_commands(path: Path) -> list[list[str]]:
    """The indented command lines in the head of an example."""
    head = path.read_text(encoding="utf-8").split("from __future__", 1)[0]
    lines = (line.removeprefix("#").strip() for line in head.splitlines())
    return [shlex.split(line) for line in lines if line.startswith(("aligntune ", "python "))]


def run_script(
    path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> RunConfig | PreferenceConfig:
    """Run an example up to its `train`, which checks instead; returns the config it made."""
    made: list[RunConfig | PreferenceConfig] = []

    class Checked(Exception):
        """The script has come to its training."""

    def check(self: OnlineTrainer | PreferenceTrainer, resume: str = "auto") -> None:
        made.append(self.config)
        if overrides:  # hub names are for the hub: only what is local can be looked at here
            self.check(resume)
            assert self.summary()
        raise Checked

    for trainer in (OnlineTrainer, PreferenceTrainer):
        monkeypatch.setattr(trainer, "train", check)
    monkeypatch.setattr("sys.argv", [str(path), *overrides])
    with pytest.raises(Checked):
        runpy.run_path(str(path), run_name="__main__")
    return made[0]


def test_every_algorithm_of_ours_has_a_yaml_and_a_python_example() -> None:
    ours = {name for name in registry.names() if registry.get(name).__module__.startswith("align")}
    ours |= ALGORITHMS.keys()
    assert {path.stem for path in YAMLS} == ours
    assert {path.stem for path in SCRIPTS} == ours


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_a_yaml_example_resolves_and_trains_a_hub_model_by_its_algorithm(path: Path) -> None:
    config = load_config(path)
    assert config.algorithm_name == path.stem
    for name in (config.model.name, config.data.path):
        assert name.count("/") == 1
        assert not Path(name).exists()


@pytest.mark.parametrize("path", [*YAMLS, *SCRIPTS], ids=lambda p: p.name)
def test_an_example_shows_itself_by_hub_name_and_by_local_folder(path: Path) -> None:
    by_name, by_folder, *_ = shown_commands(path)
    assert by_name[-1] == f"examples/{path.name}"
    overrides = {text.partition("=")[0] for text in by_folder if "=" in text}
    assert overrides.issuperset(DATA_AND_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("path", tried(YAMLS), ids=lambda p: p.name)
def test_the_commands_in_a_yaml_example_dry_run(
    path: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    for command in shown_commands(path):
        local = () if path.stem in ALGORITHMS else LOCAL
        with pytest.raises(SystemExit) as ended:
            cli.main([*command[1:], *local, "--dry-run"])
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        assert f"name: {path.stem}" in shown.out
        preference = path.stem in ALGORITHMS
        things = "rows" if path.stem == "sft" else "pairs"
        wanted = f" 16 of 16 {things}, longest " if preference else " prompts, longest "
        assert wanted in shown.out


@pytest.mark.slow
@pytest.mark.parametrize("path", tried(SCRIPTS), ids=lambda p: p.name)
def test_the_commands_in_a_python_example_dry_run(
    path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    for command in shown_commands(path):
        config = run_script(path, command[2:], monkeypatch)
        assert config.algorithm_name == path.stem
        assert config.rewards or path.stem in ALGORITHMS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_yaml_and_python_of_an_algorithm_train_the_same_model_on_the_same_data(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = run_script(path, [], monkeypatch)
    file = load_config(path.with_suffix(".yaml"))
    assert (script.model.name, script.data.path) == (file.model.name, file.data.path)
    assert type(script.algorithm) is type(file.algorithm)
