"""What runs leave, broken: checkpoints, run directories, ledgers."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed, UserError
from aligntune.runs.checkpoint import Checkpoints, intact
from aligntune.runs.rundir import RunDir
from tests.fuzz import broken
from tests.fuzz.trial import NotRight, Refused, one_line

RAY_STARTS = "here Ray would start"


@functools.cache
def a_run() -> Path:
    """A run directory as a whole run has left it. Removed with the process."""
    import atexit
    import tempfile

    from tests.histories.history import DEFAULT, History
    from tests.histories.play import play

    folder = Path(tempfile.mkdtemp(prefix="aligntune-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    play(History(0, "grpo", {**DEFAULT, "keep": 3}), folder)
    return folder / "run"


def _spoil_files(dice: random.Random, folder: Path, patterns: tuple[str, ...]) -> set[str]:
    """Break some files of a folder; returns their names."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    files = sorted(path for path in found if path.is_file())
    touched = set()
    for path in dice.sample(files, min(len(files), dice.choice((1, 1, 1, 2, 3)))):
        touched.add(str(path.relative_to(folder)))
        match dice.choice(("spoil", "spoil", "spoil", "json", "remove", "folder")):
            case "remove":
                path.unlink()
            case "folder" if path.name not in ("latest", "run.lock") and dice.random() < 0.3:
                path.unlink()
                path.mkdir()
            case "json":
                path.write_text(_mutated_json(dice, path.read_text(encoding="utf-8")))
            case _:
                path.write_bytes(broken.spoil(dice, path.read_bytes()))
    return touched


def _mutated_json(dice: random.Random, text: str) -> str:
    """JSON, or lines of it, with one thing changed."""
    lines = text.splitlines()
    try:
        return json.dumps(broken.mutate(dice, json.loads(text)), default=str)
    except (ValueError, TypeError):
        pass
    if not lines:
        return "{}"
    at = dice.randrange(len(lines))
    try:
        lines[at] = json.dumps(broken.mutate(dice, json.loads(lines[at])), default=str)
    except (ValueError, TypeError):
        lines[at] = lines[at][: len(lines[at]) // 2]
    return "\n".join(lines) + "\n"


def checkpoints(dice: random.Random, folder: Path) -> Refused | None:
    """A folder of checkpoints: what is taken is whole."""
    shutil.copytree(a_run() / "checkpoints", folder / "checkpoints")
    place = folder / "checkpoints"
    patterns = ("*", "*/*.json", "*/*/*")
    touched = (
        _spoil_files(dice, place, tuple(dice.sample(patterns, dice.choice((1, 2, 3)))))
        if (place / "latest").exists()
        else set()
    )
    if dice.random() < 0.3:
        odd = dice.choice(
            ("step-000002.bak", "step-2", "step-000009.partial", "step-", "x", "step-0000099")
        )
        (place / odd).mkdir(exist_ok=True)
    if dice.random() < 0.2:
        shutil.rmtree(place / "step-000003", ignore_errors=True)
    rundir = RunDir(folder)
    try:
        found = Checkpoints(place, 2)
        checkpoint = rundir.start_from(found, dice.choice(("auto", str(place / "step-000002"))))
    except UserError as error:
        return one_line(error)
    if checkpoint is None:
        return None
    if not intact(checkpoint.path):
        raise NotRight(f"{checkpoint.path.name} was taken, and is not whole: {touched}")
    name = checkpoint.path.name
    for part in sorted((a_run() / "checkpoints" / name).rglob("*")):
        if part.is_file() and part.name != "manifest.json":
            mine = checkpoint.path / part.relative_to(a_run() / "checkpoints" / name)
            same = mine.is_file() and mine.read_bytes() == part.read_bytes()
            if not same and f"{name}/manifest.json" not in touched:
                raise NotRight(f"{mine} has another content: {touched}")
    found.begin(4)
    found.commit(4, {"step": 4})
    if found.latest() is None:
        raise NotRight("what was just written is not found")
    return None


def run_directory(dice: random.Random, folder: Path) -> Refused | None:
    """A broken run directory that is gone on with."""
    run = folder / "run"
    config = copied_run(run)
    kinds = (("*.jsonl",), ("*.jsonl",), ("*.jsonl", "*.yaml"), ("config.yaml",), ("*",))
    _spoil_files(dice, run, dice.choice(kinds))
    resume = dice.choice(("auto", "auto", "auto", "never", str(run / "checkpoints/step-000002")))
    return gone_on_with(run, config, resume)


def copied_run(run: Path) -> RunConfig:
    """A copy of a whole run, and its config, with one step more."""
    from tests.histories.history import DEFAULT, History
    from tests.histories.play import Process

    shutil.copytree(a_run(), run)
    config = Process(History(0, "grpo", {**DEFAULT, "steps": 4}), 0, run, [])._config()
    RunDir(run).describe(config)
    return config


def gone_on_with(run: Path, config: RunConfig, resume: str) -> Refused | None:
    """Why a run does not go on, None where it would come to where Ray starts."""
    from aligntune.online.trainer import OnlineTrainer
    from tests.histories.play import prompt_at

    trainer = OnlineTrainer(config)
    prompts = [prompt_at(position) for position in range(2)]
    source = mock.MagicMock(fingerprint="f", prompt_at=prompt_at)

    @contextlib.contextmanager
    def no_roles(*_: Any) -> Iterator[Any]:
        raise RunFailed(RAY_STARTS)
        yield

    def check(self: OnlineTrainer, resume: str = "auto") -> RunDir:
        made = RunDir(run)
        made.check(config, resume)
        return made

    with (
        mock.patch.object(OnlineTrainer, "_roles", no_roles),
        mock.patch.object(OnlineTrainer, "check", check),
        mock.patch.object(OnlineTrainer, "settle"),
        mock.patch.object(OnlineTrainer, "prompts", source),
        mock.patch.object(OnlineTrainer, "eval_prompts", prompts),
        mock.patch.object(type(trainer.inputs), "tried", create=True),
        mock.patch.object(type(trainer.inputs), "measure", ""),
        mock.patch.object(type(trainer.inputs), "thinks", False),
        mock.patch.object(type(trainer.inputs), "events", return_value=[]),
        mock.patch.object(type(trainer.inputs), "told", return_value=[]),
        mock.patch("os.fsync"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            trainer.train(resume)
        except (UserError, RunFailed, OSError) as error:  # the last is exit code 1
            if str(error) == RAY_STARTS:
                return None
            if "Error" in str(error).split(":")[0] or "traceback" in str(error):
                raise NotRight(f"an error nobody foresaw: {error}") from error
            return one_line(error)
    return None


def audited(dice: random.Random, folder: Path) -> Refused | None:
    """`aligntune audit` of a broken ledger."""
    from aligntune.online.ledger import LedgerError, audit

    path = folder / "ledger.jsonl"
    raw = (a_run() / "ledger.jsonl").read_text(encoding="utf-8")
    if dice.random() < 0.5:
        path.write_text(_mutated_json(dice, raw), encoding="utf-8")
    else:
        path.write_bytes(broken.spoil(dice, raw.encode()))
    try:
        books = audit(path)
    except LedgerError as error:
        return one_line(error)
    if not books.balanced:
        raise NotRight(f"the books do not balance, and nobody says so: {books}")
    return None
