"""Bundles in a memory file: each is read as it was written, and the file is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.transfer.bundle import WeightBundle, as_tensor
from actors.transfer.memory_file import MemoryFile


def bundle(version: int, rows: int = 5) -> WeightBundle:
    draw = torch.Generator().manual_seed(version)
    return WeightBundle.pack(
        version,
        [
            ("a.weight", torch.randn(rows, 3, generator=draw)),
            ("b.weight", torch.randn(7, generator=draw).bfloat16()),
            ("c.weight", torch.randn((), generator=draw)),
        ],
    )


def read(where: dict[str, Any]) -> dict[str, torch.Tensor]:
    memory = np.memmap(where["path"], dtype=np.uint8, mode="r")
    found = {}
    for name, dtype, shape, offset in zip(
        where["names"], where["dtypes"], where["shapes"], where["offsets"], strict=True
    ):
        size = getattr(torch, dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        found[name] = as_tensor(memory[offset : offset + size], dtype).view(shape).clone()
    return found


def assert_reads(where: dict[str, Any], written: WeightBundle) -> None:
    wanted = dict(written.items())
    found = read(where)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(offset % 64 == 0 for offset in where["offsets"])


def test_every_version_is_written_over_the_last_into_the_same_file() -> None:
    file = MemoryFile()
    first = file.write(bundle(1))
    inode = os.stat(first["path"]).st_ino
    assert_reads(first, bundle(1))
    second = file.write(bundle(2))
    assert_reads(second, bundle(2))
    assert os.stat(second["path"]).st_ino == inode
    file.close()


def test_a_larger_bundle_gets_a_larger_file_and_a_smaller_one_fits() -> None:
    file = MemoryFile()
    for version, rows in ((1, 5), (2, 5000), (3, 6)):
        written = bundle(version, rows)
        assert_reads(file.write(written), written)
    file.close()


def test_nothing_is_left_open() -> None:
    def open_files() -> list[str]:
        there = Path("/proc/self/fd").iterdir()
        return [target for each in there if "weights" in (target := _target(each))]

    before = len(open_files())
    file = MemoryFile()
    counts = []
    for version, rows in ((1, 5), (2, 5000), (3, 50_000)):
        file.write(bundle(version, rows))
        counts.append(len(open_files()) - before)
    assert counts[0] > 0
    assert len(set(counts)) == 1
    file.close()
    file.close()
    assert len(open_files()) == before


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the folder's own
        return ""
