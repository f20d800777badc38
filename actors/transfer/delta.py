"""What has changed in the weights from one version to the next, bit for bit.

In bfloat16 an update of RL moves few of the weights to another number, so what has changed is a
fraction of the whole. It is made of bits, not of numbers: whatever they mean (NaNs, signed zeros),
the result is the newer version exactly. Digests say which weights it is made from and what it is,
so that nothing is put on top of other weights, or wrongly.

Arrays are compared by words of 4 bytes, so two weights in bfloat16 at a time. That costs a pass
over both versions, and the rest goes by what has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from actors.transfer.bundle import WeightBundle, as_array, dtype_name, on_host
from actors.transfer.digest import PARTS, digest, of_all, of_part

_WORD = 4  # bytes
_COMPARED = 1 << 18  # words at a time: what is done with them then finds them in a core's cache
_BLOCK = 1 << 16  # words: a place in a block takes 2 bytes


@dataclass(frozen=True)
class Change:
    """New words of one array: `counts[b]` of them in its block `b` of 65,536 words, at `offsets`
    from that block's first, ascending; or (no counts, no offsets) all of its words, where that is
    less."""

    words: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray

    @property
    def nbytes(self) -> int:
        """Of all three."""
        return self.words.nbytes + self.counts.nbytes + self.offsets.nbytes


@dataclass(frozen=True)
class WeightDelta:
    """What makes the weights of `version` from those of `base`."""

    version: int
    base: int
    base_digest: int
    digest: int  # as `of_changes` gives it
    changes: Mapping[str, Change]  # by parameter; the others are as they were
    part: int
    part_digest: int  # of that part of all weights, as they become

    @property
    def nbytes(self) -> int:
        """Bytes of all changes."""
        return _nbytes(self.changes)


def of_changes(base_digest: int, changes: Mapping[str, Change]) -> int:
    """The digest of the weights that `changes` make of those with `base_digest`."""
    pieces = (
        (name, piece)
        for name, change in changes.items()
        for piece in (change.words, change.counts, change.offsets)
    )
    return digest(pieces, base_digest)


def words(array: np.ndarray) -> np.ndarray:
    """An array's memory, flat, as unsigned integers of 4 bytes; of 2 or 1 where it cannot be cut
    into these."""
    return array.reshape(-1).view(f"u{math.gcd(array.nbytes, _WORD)}")


def update(old: np.ndarray, new: np.ndarray) -> Change | None:
    """Make `old` of the bits of `new`, both as `words` gives them, and tell what has changed; None:
    nothing.

    The change may share the memory of `new`.
    """
    blocks = -(-new.size // _BLOCK)
    a_change, a_block = new.itemsize + 2, 4
    most = (new.nbytes - blocks * a_block - 1) // a_change  # that take less than all words do
    differs = np.empty(-(-min(new.size, _COMPARED) // 8) * 8, bool)
    places: list[np.ndarray] = []
    found: list[np.ndarray] = []
    count = 0
    for start in range(0, new.size, _COMPARED):
        before, after = old[start : start + _COMPARED], new[start : start + _COMPARED]
        np.not_equal(before, after, out=differs[: after.size])
        differs[after.size :] = False
        here = int(np.count_nonzero(differs))
        if not here:
            continue
        if dense := 2 * here > after.size:  # then all of them take less time, and few more bytes
            here = after.size
        count += here
        if count > most:
            np.copyto(old, new)
            return Change(new, np.empty(0, np.uint32), np.empty(0, np.uint16))
        where = np.arange(here) if dense else _true(differs)
        moved = after.copy() if dense else after.take(where)
        before[slice(None) if dense else where] = moved
        found.append(moved)
        places.append(where + start)
    if not count:
        return None
    every = np.concatenate(places)
    edges = np.searchsorted(every, np.arange(blocks + 1) * _BLOCK)
    counts = np.diff(edges).astype(np.uint32)
    return Change(np.concatenate(found), counts, every.astype(np.uint16))


def _true(flags: np.ndarray) -> np.ndarray:
    """Where `flags` are, eight times some number of them: `np.flatnonzero`, which takes twice as
    long where a few in a hundred are set."""
    eights = flags.view(np.uint64)
    some = np.flatnonzero(eights != 0)
    inside = np.flatnonzero(eights[some].view(bool))
    return (some[inside >> 3] << 3) | (inside & 7)


def put(change: Change, array: np.ndarray) -> None:
    """Write a change into the array that it was made for."""
    flat = words(array)
    if change.counts.size:
        starts = np.arange(change.counts.size) * _BLOCK
        flat[np.repeat(starts, change.counts) + change.offsets] = change.words
    else:
        flat[:] = change.words


def _nbytes(changes: Mapping[str, Change]) -> int:
    return sum(change.nbytes for change in changes.values())


class Exports:
    """The last exported weights of a policy rank, in memory that is kept, and what has changed
    since."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._arrays: dict[str, np.ndarray] = {}
        self._dtypes: dict[str, str] = {}
        self._digest = 0
        self._part = 0  # that comes with the next changes

    def take(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]], since: int | None
    ) -> WeightBundle | WeightDelta:
        """`tensors`, the weights of `version`, as changes of those of version `since`.

        All of them instead, in a bundle, where `since` is not what was exported last, or where
        they are no less. Memory is lent as by `WeightBundle.lend`. Raises as that does.
        """
        whole = since is None or since != self._version
        base, self._version = self._version, None  # in pieces until the end
        seen: set[str] = set()
        changes: dict[str, Change] = {}
        for name, array, dtype in _arrays(version, tensors, seen):
            old = self._arrays.get(name)
            if old is None or old.shape != array.shape or self._dtypes[name] != dtype:
                whole = True
                self._arrays[name], self._dtypes[name] = array.copy(), dtype
            elif whole:
                np.copyto(words(old), words(array))
            elif (change := update(words(old), words(array))) is not None:
                changes[name] = change
        if not seen:
            raise ValueError(f"weights of version {version}: the policy exported no parameter")
        for gone in self._arrays.keys() - seen:
            whole = True
            del self._arrays[gone], self._dtypes[gone]
        self._version = version
        if base is not None and not whole and _nbytes(changes) < self.nbytes:
            before, self._digest = self._digest, of_changes(self._digest, changes)
            part, self._part = self._part, (self._part + 1) % PARTS
            of_it = of_part(self._arrays, part)
            return WeightDelta(version, base, before, self._digest, changes, part, of_it)
        self._digest = of_all(self._arrays, self._dtypes)
        return WeightBundle(version, self._arrays, self._dtypes, self._digest)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self._arrays.values())


def _arrays(
    version: int, tensors: Iterable[tuple[str, torch.Tensor]], seen: set[str]
) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, bits, torch dtype) of each of `tensors`; its name is put into `seen`."""
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(
                f"weights of version {version}: {name!r} comes twice; yield each parameter once"
            )
        seen.add(name)
        yield name, as_array(on_host(tensor)), dtype_name(tensor)
