"""Folders and fsspec URIs, read and written in the same way."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from actors.disk import sync, sync_below

WRITING = ".writing"  # the name of a file that is not whole yet


class Store:
    """A folder or an fsspec URI; what is below it goes by relative names."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    @cached_property
    def place(self) -> tuple[Any, str]:
        """The pyarrow file system, and the path within it."""
        return filesystem_of(self.uri)

    def _at(self, name: str) -> tuple[Any, str]:
        filesystem, root = self.place
        return filesystem, f"{root}/{name}" if name else root

    def read(self, name: str) -> bytes | None:
        """A file's content, or None where there is no such file."""
        from pyarrow.fs import FileType

        filesystem, path = self._at(name)
        if filesystem.get_file_info(path).type != FileType.File:
            return None
        with filesystem.open_input_stream(path) as file:
            content: bytes = file.read()
            return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file whose folder exists, in place of what was there: a reader sees the old or
        the new content. An object store does that by itself."""
        from pyarrow.fs import LocalFileSystem

        filesystem, path = self._at(name)
        in_parts = isinstance(filesystem, LocalFileSystem)
        target = self._at(WRITING)[1] if in_parts else path
        with filesystem.open_output_stream(target) as file:
            file.write(content)
        if in_parts:
            filesystem.move(target, path)

    def make_folder(self, name: str) -> None:
        """Make a folder, and those above it, where there is none."""
        filesystem, path = self._at(name)
        filesystem.create_dir(path, recursive=True)

    def has_folder(self, name: str = "") -> bool:
        """Whether there is such a folder."""
        from pyarrow.fs import FileType

        filesystem, path = self._at(name)
        return bool(filesystem.get_file_info(path).type == FileType.Directory)

    def names(self, name: str = "") -> list[str]:
        """What is in a folder, in order of names."""
        from pyarrow.fs import FileSelector

        filesystem, path = self._at(name)
        return sorted(item.base_name for item in filesystem.get_file_info(FileSelector(path)))

    def put(self, folder: Path, name: str = "") -> None:
        """Copy a folder there, in place of what was there."""
        from pyarrow.fs import copy_files

        filesystem, path = self._at(name)
        filesystem.create_dir(path, recursive=True)
        filesystem.delete_dir_contents(path)
        copy_files(str(folder), path, destination_filesystem=filesystem)

    def get(self, name: str, target: Path) -> None:
        """Copy a folder from there into `target`, which is made."""
        from pyarrow.fs import copy_files

        filesystem, path = self._at(name)
        target.mkdir(parents=True)
        copy_files(path, str(target), source_filesystem=filesystem)

    def to_disk(self, name: str = "") -> None:
        """Force a folder to disk, as the function of that name does."""
        to_disk(*self._at(name))

    def remove_file(self, name: str) -> None:
        """Remove a file."""
        filesystem, path = self._at(name)
        filesystem.delete_file(path)

    def remove(self, name: str) -> None:
        """Remove a folder with all that is in it."""
        filesystem, path = self._at(name)
        filesystem.delete_dir(path)


def to_disk(filesystem: Any, path: str) -> None:
    """Force a folder of a pyarrow file system, and its name, to disk where it is mounted here; what
    an object store has taken it keeps."""
    from pyarrow.fs import LocalFileSystem

    if isinstance(filesystem, LocalFileSystem):
        sync_below(Path(path))
        sync(Path(path).parent)


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
