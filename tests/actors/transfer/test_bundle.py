"""WeightBundle: what goes in comes out, bit for bit, and nothing reaches in afterwards."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.transfer.bundle import WeightBundle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


@pytest.mark.slow
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    seed=st.integers(0, 1000),
)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype, shape, seed):
    original = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(7).to(dtype)
    packed = WeightBundle.pack(3, [("w", original)])
    bundle = pickle.loads(pickle.dumps(packed, protocol=5))
    ((name, tensor),) = bundle.items()
    assert (name, bundle.version, len(bundle)) == ("w", 3, 1)
    assert tensor.dtype == dtype
    assert tensor.shape == original.shape
    assert torch.equal(tensor, original)
    assert bundle.nbytes == original.numel() * original.element_size()


def test_items_keep_the_order_they_were_packed_in():
    names = ["z", "a", "model.layers.1", "model.layers.0"]
    bundle = WeightBundle.pack(1, [(name, torch.ones(1)) for name in names])
    assert [name for name, _ in bundle.items()] == names


def test_an_optimiser_step_after_packing_does_not_change_the_bundle():
    weight = torch.zeros(4)
    bundle = WeightBundle.pack(1, [("w", weight)])
    weight.add_(1)
    ((_, packed),) = bundle.items()
    assert torch.equal(packed, torch.zeros(4))


def test_a_lent_bundle_is_copied_once_when_it_is_pickled_and_is_its_own_then():
    weight, turned = torch.arange(6.0), torch.arange(6.0).view(2, 3).t()
    lent = WeightBundle.lend(1, [("w", weight), ("turned", turned), ("half", weight.bfloat16())])
    buffers = []
    data = pickle.dumps(lent, protocol=5, buffer_callback=buffers.append)
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), weight.view(torch.uint8).numpy())
    arrived = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
    weight.add_(1)
    tensors = dict(arrived.items())
    assert torch.equal(tensors["w"], weight - 1)
    assert torch.equal(tensors["turned"], turned)
    assert torch.equal(tensors["half"], (weight - 1).bfloat16())


def test_items_are_views_of_read_only_arrays():
    bundle = WeightBundle.pack(1, [("w", torch.arange(6, dtype=torch.bfloat16).view(2, 3))])
    array = bundle.arrays["w"]
    ((_, tensor),) = bundle.items()
    assert array.dtype == np.uint16
    assert bundle.dtypes == {"w": "bfloat16"}
    assert not array.flags.writeable
    assert np.shares_memory(array, tensor.view(torch.uint16).numpy())


def test_a_transposed_parameter_is_packed_by_value():
    weight = torch.arange(6.0).view(2, 3).t()
    ((_, tensor),) = WeightBundle.pack(1, [("w", weight)]).items()
    assert torch.equal(tensor, weight)
    assert tensor.is_contiguous()


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="'w' comes twice"):
        WeightBundle.pack(1, [("w", torch.ones(1)), ("w", torch.ones(1))])


def test_an_empty_export_is_refused():
    with pytest.raises(ValueError, match="no parameter"):
        WeightBundle.pack(1, [])
