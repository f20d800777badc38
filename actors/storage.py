"""Folders and fsspec URIs, read and written in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def upload(folder: Path, target: str) -> None:
    """Copy a folder to another folder or an fsspec URI, in place of what was there."""
    from pyarrow.fs import copy_files

    filesystem, path = filesystem_of(target)
    filesystem.create_dir(path, recursive=True)
    filesystem.delete_dir_contents(path)
    copy_files(str(folder), path, destination_filesystem=filesystem)


def filesystem_of(target: str) -> tuple[Any, str]:
    """The pyarrow file system of a folder or URI, and the path within it."""
    import fsspec
    from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

    if "://" not in target:
        return LocalFileSystem(), str(Path(target).absolute())
    try:
        found: tuple[Any, str] = FileSystem.from_uri(target)
        return found
    except ValueError:  # a scheme that pyarrow does not know itself
        spec, path = fsspec.core.url_to_fs(target)
        return PyFileSystem(FSSpecHandler(spec)), path
