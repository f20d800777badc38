"""Weights in a file without a name that processes of one node map, kept from version to version.

The pages of a new file cost ten times what copying into them does, so there is one file, and each
version is written over the last. Who calls `write` sees to it that nobody reads the last any more.
The file goes with the processes that have it open, whatever kills them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.transfer.bundle import WeightBundle

_ALIGNMENT = 64  # bytes; what vectorised copies like


class MemoryFile:
    """Room for one bundle, as large as the largest so far."""

    def __init__(self) -> None:
        self._file = -1
        self._memory: mmap.mmap | None = None

    def write(self, bundle: WeightBundle) -> dict[str, Any]:
        """Copy the bundle's bytes in; returns the file's path in this node's /proc, and names,
        torch dtypes, shapes and offsets of the arrays."""
        arrays = bundle.arrays
        offsets, size = [], 0
        for array in arrays.values():
            offsets.append(size)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = self._room(max(size, _ALIGNMENT))
        for offset, array in zip(offsets, arrays.values(), strict=True):
            target = np.frombuffer(memory, array.dtype, array.size, offset)
            target[:] = array.reshape(-1)
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._file}",
            "names": list(arrays),
            "dtypes": [bundle.dtypes[name] for name in arrays],
            "shapes": [list(array.shape) for array in arrays.values()],
            "offsets": offsets,
        }

    def views(self, where: Mapping[str, Any], bundle: WeightBundle) -> dict[str, np.ndarray]:
        """The arrays that `write(bundle)` put at `where`, to be read and written."""
        assert self._memory is not None, "nothing was written"
        return {
            name: np.frombuffer(self._memory, array.dtype, array.size, offset).reshape(array.shape)
            for (name, array), offset in zip(bundle.arrays.items(), where["offsets"], strict=True)
        }

    def _room(self, size: int) -> mmap.mmap:
        if self._memory is not None and len(self._memory) >= size:
            return self._memory
        self.close()
        self._file = os.memfd_create("weights")
        os.ftruncate(self._file, size)
        self._memory = mmap.mmap(self._file, size)
        return self._memory

    def close(self) -> None:
        """Let go of the file; one that was never written to has none."""
        if self._memory is not None:
            self._memory = None  # unmapped with the last array over it
            os.close(self._file)
