"""Weights in the object store: one put per version, mapped by every receiver."""

from __future__ import annotations

import os

import numpy as np
import pytest
import ray
import torch

from actors.transfer.bundle import WeightBundle


@ray.remote(num_cpus=0)
class _Receiver:
    """Stands where a rollout actor stands: gets the bundle as a call argument."""

    def look(self, bundle: WeightBundle) -> tuple[bool, bool, str, float]:
        array = bundle.arrays["bf16"]
        tensors = dict(bundle.items())
        return (
            array.flags.writeable,
            _in_object_store(array),
            str(tensors["bf16"].dtype),
            float(tensors["f32"].sum()),
        )


def _in_object_store(array: np.ndarray) -> bool:
    """Whether the array's bytes lie in the object store's mapping rather than on the heap."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, rest = line.partition(" ")
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                return "/dev/shm" in rest or "plasma" in rest
    return False


@pytest.mark.slow
def test_a_receiver_maps_the_bundle_without_a_copy(ray_session):
    bundle = WeightBundle.pack(
        7, [("bf16", torch.ones(512, 512, dtype=torch.bfloat16)), ("f32", torch.ones(1000))]
    )
    reference = ray.put(bundle)
    receiver = _Receiver.remote()
    writeable, mapped, dtype, total = ray.get(receiver.look.remote(reference), timeout=60)
    assert (writeable, mapped, dtype, total) == (False, True, "torch.bfloat16", 1000.0)

    here = ray.get(reference, timeout=60)
    again = ray.get(reference, timeout=60)
    assert here.version == 7
    assert np.shares_memory(here.arrays["bf16"], again.arrays["bf16"])
    assert not _in_object_store(bundle.arrays["bf16"]), f"pid {os.getpid()}: the check is blind"
