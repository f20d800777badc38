"""How a user's function or class is found by its name, and how it is told that it cannot be had.

Standard library only: a child imports this.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pickle
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRACEBACK_CHARACTERS = 2000


class FunctionNotFound(ValueError):
    """A function cannot be had from its import path; the message says what failed and where."""


def import_function(target: str) -> Callable[..., Any]:
    """The callable that `package.module:function` names.

    Raises:
        FunctionNotFound: no such module (with the nearest name and where it looked), an error
            inside the module (with its traceback), no such attribute (with the nearest), or an
            attribute that cannot be called.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise FunctionNotFound(f"{target!r} is not of the form package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise FunctionNotFound(
                f"{target!r}: there is no module {missing!r}{_did_you_mean_module(missing)}; "
                f"looked in {_listed(_search_folders())}"
            ) from error
        raise FunctionNotFound(
            f"{target!r}: importing module {module_name!r} failed: {traceback_tail(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            if module_name == "__main__":
                raise FunctionNotFound(
                    f"{target!r} is in a script or notebook, and this is another program; name its "
                    f"file in the config, as in rewards.0.function=FILE.py:{attribute}, or call "
                    "the trainer there"
                )
            names = [name for name in dir(found) if not name.startswith("_")]
            where = getattr(found, "__file__", None) or module_name
            raise FunctionNotFound(
                f"{target!r}: {where} has no {part!r}{_did_you_mean(part, names)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise FunctionNotFound(f"{target!r} is a {type(found).__name__}, not a function")
    return found


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _did_you_mean_module(missing: str) -> str:
    package, _, leaf = missing.rpartition(".")
    path = getattr(sys.modules.get(package), "__path__", None) if package else None
    return _did_you_mean(leaf, (module.name for module in pkgutil.iter_modules(path)))


def _listed(folders: list[str], most: int = 6) -> str:
    """The first of the folders, and how many more there are: the reason is read, not the list."""
    more = len(folders) - most
    return ", ".join(folders[:most]) + (f" and {more} more" if more > 0 else "")


def _search_folders() -> list[str]:
    """The folders of `sys.path`, without the interpreter's own library."""
    library = os.path.dirname(os.__file__)
    own = {library, os.path.join(library, "lib-dynload")}
    return [path for path in sys.path if os.path.isdir(path) and path not in own]


def search_path() -> tuple[str, ...]:
    """`sys.path` without relative entries, and the current folder, where a user's file may lie.

    The current folder is last, so that a file there shadows no installed module.
    """
    # Entries that are no path are marks of import hooks and stay as they are.
    paths = (
        os.path.abspath(entry) if os.path.exists(entry or ".") else entry for entry in sys.path
    )
    return tuple(dict.fromkeys((*paths, os.getcwd())))


def in_file(file: str, name: str, path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """`module:name` and search path of what `file.py:name` means. Raises ValueError.

    The file's folder is in the path by its place on this machine and, below the current folder, by
    its place there too: a job's files lie elsewhere on every node, and actors start among them.
    """
    place = Path(file).absolute()
    if not place.is_file():
        raise ValueError(f"'{file}:{name}': there is no file {place}")
    if not place.stem.isidentifier():
        raise ValueError(f"'{file}:{name}': {place.stem!r} is no name of a module; rename the file")
    here = os.path.relpath(place.parent)
    below = () if here.startswith(os.pardir) or here == os.curdir else (here,)
    path = tuple(dict.fromkeys((str(place.parent), *below, *path)))
    with searching(path):
        found = importlib.util.find_spec(place.stem)
    if found is None or found.origin is None or not place.samefile(found.origin):
        raise ValueError(
            f"'{file}:{name}': {place.stem!r} is already the name of another module "
            f"({found.origin if found else 'none'}); rename the file"
        )
    return f"{place.stem}:{name}", path


def load(code: str | bytes) -> Any:
    """What `package.module:name` names, or cloudpickle pickled. Raises whatever importing does."""
    return pickle.loads(code) if isinstance(code, bytes) else import_function(code)


@contextmanager
def searching(path: Sequence[str]) -> Iterator[None]:
    """Import from `path` alone, inside."""
    before = sys.path[:]
    sys.path[:] = path
    try:
        yield
    finally:
        sys.path[:] = before


def traceback_tail(error: BaseException) -> str:
    """The end of `error`'s traceback, without the frames of this package and of importlib."""
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(package)
        and not frame.filename.startswith("<frozen importlib")
    ]
    lines = traceback.format_exception_only(type(error), error)
    return "".join([*traceback.format_list(frames), *lines]).strip()[-TRACEBACK_CHARACTERS:]
