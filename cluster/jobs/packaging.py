"""Packs the working directory of a job: what git would not ignore, within Ray's limit.

Invariant: the same files give the same archive, byte for byte, so that a directory that has not
changed is not uploaded twice. Nothing is left out but what git ignores: what .gitignore names, and
the excludes that the user has set for git. Nothing travels from outside of the directory, nor a
secret that the user has not allowed by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.jobs.private_files import why_private

SHOWN = 5  # files named in a message
CHECKPOINTS = "/checkpoints/step-"  # in the path of what a run's folder has
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can say


class PackagingError(ValueError):
    """The working directory cannot be packed; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """The files of a working directory, and the archive of them."""

    directory: Path
    files: tuple[str, ...]  # relative to the directory, with '/'
    archive: Path
    nbytes: int  # of the archive, which is what Ray's limit is about

    def __contains__(self, path: object) -> bool:
        """Whether the file, or something below the folder, is packed; relative, with '/'."""
        name = str(path).rstrip("/")
        return name in (".", "") or any(
            file == name or file.startswith(f"{name}/") for file in self.files
        )

    def listing(self) -> list[str]:
        """Each file with its size, for a person."""
        sizes = [(self.directory / name).stat().st_size for name in self.files]
        return [f"{size:12,d}  {name}" for size, name in zip(sizes, self.files, strict=True)]

    def describe(self) -> str:
        """One line for a person."""
        runs = sorted(
            {name.rpartition(CHECKPOINTS)[0] for name in self.files if CHECKPOINTS in name}
        )
        heavy = f"; with checkpoints of {', '.join(runs[:SHOWN])}: .gitignore can leave them out"
        packed = f"{len(self.files)} files of {self.directory}, {mib(self.nbytes)} packed"
        return packed + heavy * bool(runs)


def limit_bytes() -> int:
    """The largest archive that a Jobs server of this Ray takes: the body of one request."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return int(min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE))


def mib(nbytes: float) -> str:
    """A size in MiB for a person."""
    return f"{nbytes / 2**20:.1f} MiB"


@contextmanager
def packed(
    directory: Path, limit: int | None = None, allowed: Collection[str] = ()
) -> Iterator[Package]:
    """The package of `directory`; its archive is there while this is entered.

    `limit` in bytes is `limit_bytes()` unless given; `allowed` are files, relative to the
    directory, that may travel though they look like secrets.

    Raises:
        PackagingError: no directory, no way to read its .gitignore, over the limit, a link that
            leads out, or a secret.
    """
    directory = directory.absolute()
    if not directory.is_dir():
        raise PackagingError(f"the working directory {directory} is not a folder")
    most = limit_bytes() if limit is None else limit
    files = chosen_files(directory)
    _check_inside(directory, files)
    _check_secrets(directory, files, {os.path.normpath(name) for name in allowed})
    with tempfile.TemporaryDirectory(prefix="aligntune-") as folder:
        archive = Path(folder) / "working_dir.zip"
        # Compression seldom halves twice: what is four times over is not compressed to find out.
        total = sum((directory / name).stat().st_size for name in files)
        nbytes = total if total >= 4 * most else _write(directory, files, archive)
        if nbytes >= most:
            raise PackagingError(_too_large(directory, files, nbytes, most))
        yield Package(directory, files, archive, nbytes)


def chosen_files(directory: Path) -> tuple[str, ...]:
    """The files to pack, relative to `directory`, sorted: tracked by git, or not ignored.

    Links are followed, but not into a folder that they lie in.

    Raises:
        PackagingError: a .gitignore is there, but no git to read it.
    """
    return tuple(sorted(_below(directory, "", frozenset())))


def _check_inside(directory: Path, files: Sequence[str]) -> None:
    """Raises PackagingError where a link leads out of the directory."""
    root = os.path.join(os.path.realpath(directory), "")
    leads = {name: os.path.realpath(directory / name) for name in files}
    out = [f"{name} -> {to}" for name, to in leads.items() if not to.startswith(root)]
    if out:
        raise PackagingError(
            f"{len(out)} files of {directory} are links that lead out of it: {_some(out)}. Put "
            "what the job needs on storage that every node sees and give its absolute path, copy "
            "it in, or name the links in .gitignore"
        )


def _check_secrets(directory: Path, files: Sequence[str], allowed: Collection[str]) -> None:
    """Raises PackagingError for what looks like a secret and is not allowed, or is not there."""
    if unknown := sorted(set(allowed) - set(files)):
        raise PackagingError(f"--allow {unknown[0]}: no such file travels from {directory}")
    seen = {name: why_private(directory, name) for name in files if name not in allowed}
    if secret := [f"{name} ({why})" for name, why in seen.items() if why]:
        raise PackagingError(
            f"{len(secret)} files of {directory} look like secrets: {_some(secret)}. Every node "
            "would have them: name them in .gitignore and pass values by --env NAME, or say "
            "--allow FILE for each that may travel"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _below(directory: Path, prefix: str, around: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(directory)
    if real in around:
        return
    for name in _listed(directory):
        path = directory / name
        if path.is_dir():  # another repository or a submodule, which git does not look into
            yield from _below(path, f"{prefix}{name.rstrip('/')}/", around | {real})
        elif path.is_file():  # neither a tracked file that was removed nor a broken link
            yield f"{prefix}{name}"


def _listed(directory: Path) -> list[str]:
    if shutil.which("git") is None:
        return _walked(directory)
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = _git(["-C", str(directory), *listing])
    if done.returncode:  # no repository, or one that git refuses: read .gitignore files alone
        with tempfile.TemporaryDirectory(prefix="aligntune-") as empty:
            _git(["init", "--quiet", "--bare", empty])
            place = ["--git-dir", empty, "--work-tree", str(directory)]
            done = _git(["-C", str(directory), *place, *listing])
    if done.returncode:
        raise PackagingError(
            f"git cannot list {directory}: {done.stderr.decode(errors='replace').strip()}"
        )
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _git(arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], capture_output=True, check=False)


def _walked(directory: Path) -> list[str]:
    """Every file, where there is no git; a .gitignore cannot be obeyed then."""
    names = []
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if name != ".git"]
        if ".gitignore" in files:
            raise PackagingError(
                f"{folder}/.gitignore says what to leave out, but there is no git here to read it; "
                "install git"
            )
        names += [os.path.relpath(os.path.join(folder, name), directory) for name in files]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        names += [os.path.relpath(os.path.join(folder, name), directory) for name in links]
    return names


def _write(directory: Path, files: Sequence[str], archive: Path) -> int:
    """Write the archive; returns its size in bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as target:
        for name in files:
            source = directory / name
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = (source.stat().st_mode & 0xFFFF) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            with source.open("rb") as data, target.open(info, "w", force_zip64=True) as packing:
                shutil.copyfileobj(data, packing, 2**20)
    return archive.stat().st_size


def _too_large(directory: Path, files: Sequence[str], nbytes: int, limit: int) -> str:
    sizes = sorted(((directory / name).stat().st_size, name) for name in files)
    largest = ", ".join(f"{name} ({mib(size)})" for size, name in reversed(sizes[-SHOWN:]))
    return (
        f"the working directory {directory} is {mib(nbytes)}, and Ray takes less than "
        f"{mib(limit)}; the largest of {len(files)} files: {largest}. Put data and models on "
        "storage that every node sees, name what is not needed in .gitignore, or give a smaller "
        "--working-dir"
    )
