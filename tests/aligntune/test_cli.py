"""The front door: what a person types first is answered at once and in few words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aligntune import __version__

REPOSITORY = Path(__file__).parents[2]


def aligntune(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """`python -m aligntune ARGUMENTS`."""
    return subprocess.run(
        [sys.executable, "-m", "aligntune", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_version() -> None:
    done = aligntune("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"aligntune {__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("jobs",), ("launch",)])
def test_without_a_command_the_help_is_shown_and_no_error(arguments: tuple[str, ...]) -> None:
    done = aligntune(*arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stdout
    assert done.stderr == ""


def test_help_has_its_short_form_everywhere() -> None:
    assert "quickstart" in aligntune("-h").stdout
    assert "--resume" in aligntune("train", "-h").stdout
    assert "status" in aligntune("jobs", "-h").stdout


def test_commands_are_completed_in_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "aligntune"  # the name that completion knows the program by
    script.write_text("from aligntune.cli import console\nconsole()\n")
    shell = {
        "_ALIGNTUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": "aligntune qu",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **shell},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["quickstart"], done.stderr


LIGHT = """
import sys
from aligntune.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = [name for name in ("torch", "ray", "transformers", "vllm") if name in sys.modules]
    assert not heavy, f"loaded {heavy}"
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train nowhere.yaml", "no config file at nowhere.yaml"),
        ("train", "give a config file, or --algorithm, --model and --dataset"),
        ("train a.yaml b.yaml", "one config file, not 2: a.yaml, b.yaml"),
        ("train --algorythm grpo", "No such option: --algorythm"),
        ("train twice.yaml", "twice.yaml:2: not valid YAML: 'model' stands twice"),
        ("train empty.yaml train", "one config file, not 2"),
        ("train good.yaml train.steps=[", "the value of train.steps"),
        ("train --algorithm dpo --model m --dataset d --reward math", "dpo has no argument"),
        ("evaluate nowhere.yaml", "'nowhere.yaml' does not exist"),
        ("plan nowhere.yaml", "'nowhere.yaml' does not exist"),
        ("submit nowhere.yaml --address head:8265", "'nowhere.yaml' does not exist"),
        ("nosuch", "No such command 'nosuch'; see `aligntune --help`"),
    ],
)
def test_a_slip_is_told_before_anything_heavy_is_loaded(
    tmp_path: Path, arguments: str, said: str
) -> None:
    (tmp_path / "twice.yaml").write_text("model: {name: a}\nmodel: {name: b}\n")
    (tmp_path / "good.yaml").write_text("algorithm: grpo\n")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
