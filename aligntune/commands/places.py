"""Models, data and code that a config names by their places, and whether a job would have them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.config.code import code_files, code_names
from aligntune.data.folders import KINDS, has_magic, kind_of
from aligntune.errors import UserError
from aligntune.rewards.catalogue import REWARDS

if TYPE_CHECKING:
    from cluster.jobs.packaging import Package

# By their place in a config tree, but for those of roles; each a folder or file, or a name on the
# hub.
PLACES = (
    "model.name",
    "data.path",
    "data.eval_path",
)


def models_and_data(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(place in the tree, name) of every model and data set that the run reads."""
    from aligntune.online.role_table import ROLES  # heavy: it knows the algorithms

    of_roles = (f"{role.name}.{key}" for role in ROLES.values() for key in role.models)
    for place in (*PLACES, *of_roles):
        section, key = place.split(".")
        if name := (tree.get(section) or {}).get(key):
            yield place, name
    for index, source in enumerate((tree.get("data") or {}).get("train") or []):
        yield f"data.train.{index}.path", source["path"]
    for index, reward in enumerate(tree.get("rewards") or []):
        if model := reward.get("model"):
            yield f"rewards.{index}.model", model
        known = REWARDS.get(reward.get("function") or "")
        encoder = (reward.get("options") or {}).get("model")
        if known and not known.remote and isinstance(encoder, str):
            yield f"rewards.{index}.options.model", encoder


def not_here(tree: Mapping[str, Any], package: Package) -> list[tuple[str, str]]:
    """(place in the tree, name) of what the run reads and is to lie on the cluster alone. Raises
    UserError where something is here, and the job would have a part of it at most.

    The current folder is the package's.
    """
    return [
        (key, name)
        for key, name in (
            *models_and_data(tree),
            *code_files(tree),
            *_modules(tree),
            *_of_command(tree),
        )
        if not _travels(key, name, package)
        and os.path.isabs(os.path.expanduser(name))
        and not is_here(name)
    ]


def _modules(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(place in the tree, file) of the modules of the user's own code that are found from the
    current folder."""
    algorithm = (tree.get("algorithm") or {}).get("name") or ""
    for key, text in (("algorithm.name", algorithm), *code_names(tree)):
        path = text.rpartition(":")[0].replace(".", "/")
        files = (f"{path}.py", f"{path}/__init__.py") if path else ()
        if file := next(filter(os.path.isfile, files), None):
            yield key, file


def _of_command(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(place in the tree, file) of what an agent's command names in the current folder."""
    agent = tree.get("agent")
    command = (agent.get("command") or []) if isinstance(agent, Mapping) else []
    for index, part in enumerate(command):
        if not os.path.isabs(part) and os.path.isfile(part):
            yield f"agent.command.{index}", part


def _travels(key: str, name: str, package: Package) -> bool:
    """Whether what `name` says comes with the package. Raises UserError where a file of it would
    be lost."""
    if os.path.isabs(os.path.expanduser(name)) or "://" in name or not is_here(name):
        return False  # on the cluster, or a name on the hub
    packed = set(package.files)
    for file in _files(name, data=key.startswith("data.")):
        relative = os.path.relpath(file)
        if relative not in packed:
            raise _lost(key, name, relative, package)
    return True


def _lost(key: str, name: str, relative: str, package: Package) -> UserError:
    """`relative` is the file that does not travel, from the working directory."""
    outside = relative.split(os.sep)[0] == os.pardir
    part = "" if outside or os.path.normpath(name) == relative else f": {relative}"
    where = (
        f"is outside of the working directory {package.directory}"
        if outside
        else "is not packed, for .gitignore names it"
    )
    cure = "" if outside else "take it out there, or "
    return UserError(
        f"{key} {name}{part} {where}, so the job would not find it; {cure}put it on storage that "
        "every node sees and give its absolute path"
    )


def is_here(name: str) -> bool:
    """Whether a file or folder of this name, or of a name that it is a pattern of, is here."""
    path = os.path.expanduser(name)
    return os.path.exists(path) or (has_magic(path) and bool(glob.glob(path, recursive=True)))


def _files(name: str, data: bool) -> Iterator[str]:
    """The files that `name` stands for, hidden ones left out; of a folder of `data` those that can
    hold rows."""
    if not os.path.isdir(name):
        matched = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        yield from (file for file in matched if os.path.isfile(file))
        return
    for folder, folders, files in os.walk(name):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            rows = kind_of(Path(file)) in KINDS or file.endswith(".arrow")
            if not file.startswith(".") and (rows or not data):
                yield os.path.join(folder, file)
