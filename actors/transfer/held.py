"""The weights that a rollout actor holds for changes to be put on.

They lie in a memory file that is kept, so that a version costs what has changed in it, and what
loads them from there, in whatever process, reads them in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.transfer.bundle import WeightBundle
from actors.transfer.delta import WeightDelta, put
from actors.transfer.digest import digest, of_all
from actors.transfer.memory_file import MemoryFile


class OtherBase(ValueError):
    """Changes do not go with the weights that are held; they need a whole version."""


class Held:
    """One version's weights, or none. Nobody may read them while `take` runs."""

    def __init__(self) -> None:
        self._file = MemoryFile()
        self._bundle: WeightBundle | None = None
        self._arrays: dict[str, np.ndarray] = {}  # of the bundle, to be written

    def take(self, weights: Sequence[WeightBundle | WeightDelta]) -> WeightBundle:
        """The newest version that `weights` make, one on top of the other.

        A bundle that no changes can follow is given back as it is, and not held. What is held
        already is not put on it again.

        Raises:
            OtherBase: they do not go with what is held, or do not become what they should.
        """
        for each in weights:
            if isinstance(each, WeightDelta):
                self._bundle = self._changed(each)
            elif each.digests:
                self._bundle = self._written(each)
            else:
                return each
        assert self._bundle is not None, "the last of them is held"
        return self._bundle

    def _written(self, bundle: WeightBundle) -> WeightBundle:
        self._bundle = None
        where = self._file.write(bundle)
        self._arrays = self._file.views(where, bundle)
        for name in self._arrays:
            self._check(name, bundle.dtypes[name], bundle.digests[name], bundle.version)
        return WeightBundle(bundle.version, self._arrays, bundle.dtypes, bundle.digests, where)

    def _changed(self, delta: WeightDelta) -> WeightBundle:
        held = self._bundle
        if held is None:
            raise OtherBase(f"version {delta.version} changes {delta.base}, and none is held")
        digests = {**held.digests, **delta.digests}
        if held.version == delta.version and digests == held.digests:
            return held
        if of_all(held.digests) != delta.base_digest:
            raise OtherBase(
                f"version {delta.version} changes {delta.base}, and {held.version} is held"
                + (", of other bits" if held.version == delta.base else "")
            )
        self._bundle = None  # in pieces until the end
        for name, change in delta.changes.items():
            put(change, self._arrays[name])
            self._check(name, held.dtypes[name], digests[name], delta.version)
        return WeightBundle(delta.version, self._arrays, held.dtypes, digests, held.where)

    def _check(self, name: str, dtype: str, wanted: int, version: int) -> None:
        if digest(name, self._arrays[name], dtype) != wanted:
            raise OtherBase(f"version {version}: {name!r} did not become what was sent")

    def close(self) -> None:
        """Let go of the memory."""
        self._bundle, self._arrays = None, {}
        self._file.close()
