"""Digests of weights: what says that two sides hold the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xxhash


def digest(name: str, array: np.ndarray, dtype: str) -> int:
    """64 bits of a parameter: of its name, its torch dtype, its shape and its bits."""
    found = xxhash.xxh3_64(f"{name} {dtype} {array.shape} ".encode())
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.intdigest()


def of_all(digests: Mapping[str, int]) -> int:
    """64 bits of all of a version's parameters, whatever their order."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return xxhash.xxh3_64("".join(lines).encode()).intdigest()
