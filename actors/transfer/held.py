"""The weights that a rollout actor holds for changes to be put on.

They lie in a memory file that is kept, so that a version costs what has changed in it, and what
loads them from there, in whatever process, reads them in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.transfer.bundle import WeightBundle
from actors.transfer.delta import WeightDelta, of_changes, put
from actors.transfer.digest import of_all, of_part
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
            OtherBase: they do not go with what is held, did not arrive as they were sent, or memory
                that is held has changed by itself; that is found within `PARTS` versions.
        """
        for each in weights:
            if isinstance(each, WeightDelta):
                self._bundle = self._changed(each)
            elif each.digest is not None:
                self._bundle = self._written(each)
            else:
                return each
        assert self._bundle is not None, "the last of them is held"
        return self._bundle

    def _written(self, bundle: WeightBundle) -> WeightBundle:
        self._bundle = None
        where = self._file.write(bundle)
        self._arrays = self._file.views(where, bundle)
        if of_all(self._arrays, bundle.dtypes) != bundle.digest:
            raise OtherBase(f"version {bundle.version} did not arrive as it was sent")
        return WeightBundle(bundle.version, self._arrays, bundle.dtypes, bundle.digest, where)

    def _changed(self, delta: WeightDelta) -> WeightBundle:
        held = self._bundle
        if held is None or held.digest is None:
            raise OtherBase(f"version {delta.version} changes {delta.base}, and none is held")
        if held.version == delta.version and held.digest == delta.digest:
            return held
        if held.digest != delta.base_digest:
            raise OtherBase(
                f"version {delta.version} changes {delta.base}, and {held.version} is held"
                + (", of other bits" if held.version == delta.base else "")
            )
        if of_changes(held.digest, delta.changes) != delta.digest:
            raise OtherBase(f"version {delta.version}: changes did not arrive as they were sent")
        self._bundle = None  # in pieces until the end
        for name, change in delta.changes.items():
            put(change, self._arrays[name])
        if of_part(self._arrays, delta.part) != delta.part_digest:
            raise OtherBase(f"version {delta.version}: part {delta.part} is not what it should be")
        return WeightBundle(delta.version, self._arrays, held.dtypes, delta.digest, held.where)

    def close(self) -> None:
        """Let go of the memory."""
        self._bundle, self._arrays = None, {}
        self._file.close()
