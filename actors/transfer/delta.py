"""What has changed in the weights from one version to the next, bit for bit.

In bfloat16 an update of RL moves few of the weights to another number, so what has changed is a
fraction of the whole. It is made of bits, not of numbers: whatever they mean (NaNs, signed zeros),
the result is the newer version exactly. A digest says which weights it is made from and another
one what becomes of each array, so that nothing is put on top of other weights, or wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from actors.transfer.bundle import WeightBundle, as_array, dtype_name, on_host
from actors.transfer.digest import digest, of_all

_BLOCK = 1 << 19  # elements compared at a time: they stay in a core's cache
_INDEX = np.dtype(np.uint32)


@dataclass(frozen=True)
class Change:
    """New bits of one array, as flat unsigned integers: those at `indices`, ascending, or (None)
    all of them, where that is less."""

    values: np.ndarray
    indices: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.values.nbytes + (0 if self.indices is None else self.indices.nbytes)


@dataclass(frozen=True)
class WeightDelta:
    """What makes the weights of `version` from those of `base`."""

    version: int
    base: int
    base_digest: int
    changes: Mapping[str, Change]  # by parameter; the others are as they were
    digests: Mapping[str, int]  # of the arrays that changed, as they become

    @property
    def nbytes(self) -> int:
        """Bytes of all changes."""
        return sum(change.nbytes for change in self.changes.values())


def bits(array: np.ndarray) -> np.ndarray:
    """An array's memory, flat, as unsigned integers of its item size."""
    return array.reshape(-1).view(f"u{array.dtype.itemsize}")


def changed(old: np.ndarray, new: np.ndarray) -> Change | None:
    """What makes `new` of `old`, both as `bits` gives them; None: they are the same.

    It may share the memory of `new`.
    """
    most = 0  # changes that take less than all values do
    if new.size <= np.iinfo(_INDEX).max:
        most = -(-new.nbytes // (_INDEX.itemsize + new.itemsize)) - 1
    found: list[np.ndarray] = []
    count = 0
    for start in range(0, new.size, _BLOCK):
        where = np.flatnonzero(old[start : start + _BLOCK] != new[start : start + _BLOCK])
        count += where.size
        if count > most:
            return Change(new, None)
        if where.size:
            found.append((where + start).astype(_INDEX))
    if not count:
        return None
    indices = np.concatenate(found)
    return Change(new[indices], indices)


class Exports:
    """The last exported weights of a policy rank, in memory that is kept, and what has changed
    since."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._arrays: dict[str, np.ndarray] = {}
        self._dtypes: dict[str, str] = {}
        self._digests: dict[str, int] = {}

    def take(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]], since: int | None
    ) -> WeightBundle | WeightDelta:
        """`tensors`, the weights of `version`, as changes of those of version `since`.

        All of them instead, in a bundle, where `since` is not what was exported last, or where
        they are no less. Memory is lent as by `WeightBundle.lend`. Raises as that does.
        """
        whole = since is None or since != self._version
        base, self._version = self._version, None  # in pieces until the end
        base_digest = of_all(self._digests)
        seen: set[str] = set()
        changes: dict[str, Change] = {}
        for name, array, dtype in _arrays(version, tensors, seen):
            old = self._arrays.get(name)
            if old is None or old.shape != array.shape or self._dtypes[name] != dtype:
                whole = True
                self._arrays[name], self._dtypes[name] = array.copy(), dtype
            elif whole:
                np.copyto(bits(old), bits(array))
            elif (change := changed(bits(old), bits(array))) is not None:
                put(change, old)
                changes[name] = change
            else:
                continue
            self._digests[name] = digest(name, self._arrays[name], dtype)
        if not seen:
            raise ValueError(f"weights of version {version}: the policy exported no parameter")
        for gone in self._arrays.keys() - seen:
            whole = True
            del self._arrays[gone], self._dtypes[gone], self._digests[gone]
        self._version = version
        if base is not None and not whole:
            ours = {name: self._digests[name] for name in changes}
            delta = WeightDelta(version, base, base_digest, changes, ours)
            if delta.nbytes < self.nbytes:
                return delta
        return WeightBundle(version, self._arrays, self._dtypes, self._digests)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self._arrays.values())


def put(change: Change, array: np.ndarray) -> None:
    """Write a change into the array that it was made for."""
    flat = bits(array)
    if change.indices is None:
        flat[:] = change.values
    else:
        flat[change.indices] = change.values


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
