"""One policy version's weights, as they cross from the policy to the rollout actors.

A bundle is plain numpy arrays by name: transformers' of the parameter, or the checkpoint's where
the receiver reads checkpoints. So it goes into the object store once per version and every receiver
on a node maps the same memory: nothing is copied by `ray.get`. Its arrays never change after
`pack`, whatever the optimiser does to the tensors they came from; those of `lend` are the tensors'
own memory where it can be, for who copies it out at once.

Tied weights appear once, under the name that the model's `named_parameters()` yields: the input
embedding, so `lm_head.weight` is absent where it is tied to it. A receiver whose model ties them
ignores a redundant `lm_head.weight`; one whose model does not refuses a bundle without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

# numpy has no bfloat16: its bits travel as uint16 and the bundle remembers what they are.
_CARRIERS = {torch.bfloat16: torch.uint16}


class WeightBundle:
    """The weights of policy `version`: read-only arrays by parameter name."""

    def __init__(
        self,
        version: int,
        arrays: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        digest: int | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap arrays that nobody else writes to; `pack` is the way to make a bundle from tensors.

        `dtypes` names the torch dtype of each array's bits, e.g. "bfloat16" for a uint16 array.
        `digest` is there where changes to these weights may follow. `where` is what
        `MemoryFile.write` says of arrays that lie in its file.
        """
        self.version = version
        self.digest = digest
        self.where = where
        self._arrays = dict(arrays)
        self._dtypes = dict(dtypes)

    @classmethod
    def pack(cls, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightBundle:
        """Copy `tensors` (name, tensor of any device) into a bundle, one after the other.

        Raises:
            ValueError: a name comes twice, or there is no tensor at all.
        """
        return cls._of(version, ((name, _copy(tensor)) for name, tensor in tensors))

    @classmethod
    def lend(cls, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightBundle:
        """`tensors` as a bundle, without a copy of those that lie in the host's memory.

        Pickle it before any of them changes: that copies them to where they go. Raises as `pack`.
        """
        return cls._of(version, ((name, on_host(tensor)) for name, tensor in tensors))

    @classmethod
    def _of(cls, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightBundle:
        arrays: dict[str, np.ndarray] = {}
        dtypes: dict[str, str] = {}
        for name, tensor in tensors:
            if name in arrays:
                raise ValueError(
                    f"weights of version {version}: {name!r} comes twice; yield each parameter once"
                )
            arrays[name] = as_array(tensor)
            dtypes[name] = dtype_name(tensor)
        if not arrays:
            raise ValueError(f"weights of version {version}: the policy exported no parameter")
        return cls(version, arrays, dtypes)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in packing order; views of read-only memory, never to be written into."""
        for name, array in self._arrays.items():
            yield name, as_tensor(array, self._dtypes[name])

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The arrays by name, in packing order; the bits of each are of the dtype in `dtypes`."""
        return MappingProxyType(self._arrays)

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The torch dtype of each array by name, e.g. "bfloat16"."""
        return MappingProxyType(self._dtypes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"WeightBundle(version={self.version}, {len(self)} arrays, {self.nbytes} bytes)"


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the host's memory, in one piece: itself where it lies there so."""
    return tensor.detach().to("cpu").contiguous()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return host.copy_(tensor.detach())


def dtype_name(tensor: torch.Tensor) -> str:
    """Its torch dtype, e.g. "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A host tensor's bits as a read-only array, without a copy."""
    array = tensor.view(_CARRIERS.get(tensor.dtype, tensor.dtype)).numpy()
    array.flags.writeable = False
    return array


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """`array` seen as a tensor of torch dtype `dtype`, without a copy."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; receivers only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(getattr(torch, dtype))
