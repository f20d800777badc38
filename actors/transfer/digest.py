"""Digests of weights: what says that two sides hold the same bits.

A whole version has a digest of all its bits, and each version that is made of changes one of the
digest before and of the changes. So equal digests mean the same bits, without another pass over
what has not changed. What goes wrong in the memory of either side afterwards is found piece by
piece: changes come with a digest of one part of all weights as they become, the next part each
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import xxhash

PARTS = 16  # so a sixteenth of the weights is read for each version that changes make


def digest(pieces: Iterable[tuple[str, np.ndarray]], before: int = 0) -> int:
    """64 bits (XXH3) of named arrays in one piece each, in this order, and of another digest."""
    found = xxhash.xxh3_64(before.to_bytes(8))
    for name, array in pieces:
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.intdigest()


def of_all(arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> int:
    """Of a whole version: names, torch dtypes, shapes and bits."""
    return digest((f"{name} {dtypes[name]}", arrays[name]) for name in sorted(arrays))


def of_part(arrays: Mapping[str, np.ndarray], part: int) -> int:
    """Of the bits in the `part`-th of `PARTS` pieces of each array; all of them cover all bits."""

    def pieces() -> Iterable[tuple[str, np.ndarray]]:
        for name in sorted(arrays):
            raw = arrays[name].reshape(-1).view(np.uint8)
            yield name, raw[raw.size * part // PARTS : raw.size * (part + 1) // PARTS]

    return digest(pieces())
