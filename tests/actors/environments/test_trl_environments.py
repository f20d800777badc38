"""An environment that TRL itself ships runs here as it is: its Harbor sandbox with a bash tool.

Harbor is stood in for by a folder and a shell, as it wants containers and a newer Python; all that
TRL has written is TRL's: the loop in a thread that its environment has, its tool, its verifier's
reward, which a reward function reads from `environments`, and the end of the sandbox.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.environments.base import Episode
from actors.environments.specs import EpisodeCode, EpisodeReward
from actors.environments.tool_episodes import ToolEpisodes
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, Script, call_text, prompt_of

pytestmark = pytest.mark.slow  # TRL takes seconds to be imported

MODULES = ("environments.factory", "models.task.task", "models.trial.config")
MODULES += ("models.trial.paths", "verifier.factory")

STAND_IN = '''
import asyncio
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace as Made

ENDED = Path(__file__).parent / "ended"


class Sandbox:
    """Commands run in a shell here; their absolute folders are below one of its own."""

    os = "linux"

    def __init__(self, folder):
        self.folder = Path(folder)

    async def start(self, force_build):
        self.folder.mkdir()

    async def run_healthcheck(self):
        pass

    async def exec(self, command, timeout_sec=None, user=None):
        for name in ("/workdir", "/home/user/input"):
            command = command.replace(name, f"{self.folder}{name}")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        return Made(stdout=done.stdout, stderr=done.stderr, return_code=done.returncode)

    async def empty_dirs(self, folders, chmod):
        pass

    async def stop(self, delete):
        await asyncio.sleep(0.5)  # as of a container
        with ENDED.open("a") as ended:
            ended.write(self.folder.name + "\\n")


class EnvironmentFactory:
    @staticmethod
    def create_environment_from_config(config, trial_paths, session_id, **given):
        return Sandbox(trial_paths.folder / session_id)


class Task:
    short_name = "count"
    config = Made(environment=None, verifier=Made(env={}))

    def __init__(self, task_dir):
        self.paths = Made(environment_dir=task_dir / "environment")
        self.instruction = (task_dir / "instruction.md").read_text()


def EnvironmentConfig(type):
    return Made(type=type)


def VerifierConfig():
    return Made()


def TrialPaths(trial_dir):
    return Made(folder=trial_dir)


class EnvironmentPaths:
    @staticmethod
    def for_os(system):
        return Made(verifier_dir="/logs")


class VerifierFactory:
    @staticmethod
    def create_verifier_from_config(config, task, trial_paths, environment, override_env):
        async def verify():
            answer = environment.folder / "workdir/answer.txt"
            right = answer.exists() and answer.read_text() == "3"
            return Made(rewards={"reward": float(right)})

        return Made(verify=verify)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `harbor` is imported from, and a task of its kind."""
    root = tmp_path_factory.mktemp("harbor")
    (root / "harbor_stand_in.py").write_text(STAND_IN)
    for name in MODULES:
        file = root / "harbor" / Path(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("from harbor_stand_in import *\n")
    (root / "task").mkdir()
    (root / "task" / "instruction.md").write_text("How many letters has 'fig'?")
    return root


@pytest.fixture(scope="module")
def play(
    folder: Path, chat_model: ModelSpec, tokenizer: Any, loop: Any
) -> Iterator[Callable[..., Episode]]:
    code = EpisodeCode(
        environments={"": "trl.experimental.harbor:HarborBashEnv"},
        rewards={
            "outcome": EpisodeReward("trl.experimental.harbor._spec:_outcome_reward_func", 30.0)
        },
        search_path=(str(folder),),
    )
    episodes = ToolEpisodes(code, LIMITS, chat_model, None)

    def played(*turns: str) -> Episode:
        row = prompt_of("", task_dir=str(folder / "task"))
        return loop(episodes.run(row, 0, 1, Script(tokenizer, turns)))

    yield played
    loop(episodes.close())
    sandboxes = (folder / "ended").read_text().split()
    assert len(sandboxes) == len(set(sandboxes)) == 2, "each episode's sandbox has been stopped"


def bash(command: str) -> str:
    return call_text("bash", command=command)


@pytest.mark.parametrize("answer", [3, 4])
def test_trls_sandbox_is_reset_used_verified_and_stopped(
    play: Callable[..., Episode], answer: int
) -> None:
    episode = play(
        bash("pwd; false") + bash("false"), bash(f"echo -n {answer} > /workdir/answer.txt"), "Done."
    )
    asked, first, second, third = (
        m["content"] for m in episode.messages if m["role"] in ("user", "tool")
    )
    assert asked.startswith("How many letters has 'fig'?\n\nYou have a single `bash` tool")
    assert (first, second) == (f"{os.getcwd()}\n", "(empty output, rc=1)")
    assert third == "(empty output, rc=0)"
    assert episode.rewards == {"outcome": float(answer == 3)}
    assert episode.figures.tools_failed == 0
