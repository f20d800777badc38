"""Changed weights: they become the newer version bit for bit, or are refused."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.transfer.bundle import WeightBundle, as_tensor
from actors.transfer.delta import Change, Exports, WeightDelta, bits
from actors.transfer.digest import of_all
from actors.transfer.held import Held, OtherBase

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool]
Tensors = dict[str, torch.Tensor]


def sent(thing: Any) -> Any:
    """As it arrives: other memory, which nobody writes to."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(each) for each in buffers])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, draw: np.random.Generator) -> Any:
    """Any bits at all: NaNs of every payload, infinities, both zeros."""
    most = 1 if dtype == torch.bool else 2 ** (8 * dtype.itemsize) - 1
    size = np.dtype(f"u{dtype.itemsize}")
    return np.asarray(draw.integers(0, most, shape, dtype=size, endpoint=True), dtype=size)


def as_tensors(raw: Mapping[str, tuple[np.ndarray, torch.dtype]]) -> Tensors:
    return {
        name: as_tensor(array.copy(), str(dtype).removeprefix("torch."))
        for name, (array, dtype) in raw.items()
    }


def assert_bits(bundle: WeightBundle, wanted: Tensors) -> None:
    """Same names, dtypes, shapes and bits as a whole transfer of `wanted`."""
    full = WeightBundle.pack(bundle.version, wanted.items())
    assert bundle.dtypes == full.dtypes
    for name, array in full.arrays.items():
        assert bundle.arrays[name].shape == array.shape
        assert bits(bundle.arrays[name]).tobytes() == bits(array).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=4, max_size=4),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_changes_make_what_a_whole_transfer_makes_bit_for_bit(
    dtypes: list[torch.dtype],
    shapes: list[tuple[int, ...]],
    fractions: list[float],
    seed: int,
) -> None:
    draw = np.random.default_rng(seed)
    raw = {
        f"w{index}": (random_bits(shape, dtype, draw), dtype)
        for index, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=False))
    }
    exports, held, late = Exports(), Held(), []
    since = None
    for version, fraction in enumerate([0.0, *fractions]):
        for array, dtype in raw.values():
            moved = np.asarray(draw.random(array.shape) < fraction)
            array[moved] = random_bits(array.shape, dtype, draw)[moved]
        tensors = as_tensors(raw)
        made = sent(exports.take(version, tensors.items(), since))
        late = [made] if isinstance(made, WeightBundle) else [*late, made]
        whole = sum(tensor.nbytes for tensor in tensors.values())
        assert made.nbytes <= whole
        assert_bits(held.take([made]), tensors)
        assert_bits(held.take([made]), tensors)  # a call that is made again
        since = version
    joined = Held()
    assert_bits(joined.take(late), tensors)
    held.close()
    joined.close()


def weights(*numbers: float) -> Tensors:
    return {"a": torch.tensor([*numbers, *[0.0] * 40]), "b": torch.ones(50)}


def test_what_has_not_changed_is_not_sent_and_a_change_of_all_is_a_whole_version() -> None:
    exports = Exports()
    assert isinstance(exports.take(1, weights(1, 2).items(), None), WeightBundle)
    delta = exports.take(2, weights(1, 3).items(), 1)
    assert isinstance(delta, WeightDelta)
    assert delta.changes.keys() == {"a"}
    assert delta.nbytes == 4 + 4
    same = exports.take(3, weights(1, 3).items(), 2)
    assert same.nbytes == 0
    other = {name: tensor + 1 for name, tensor in weights(1, 3).items()}
    assert isinstance(exports.take(4, other.items(), 3), WeightBundle)


def test_changes_of_other_weights_than_asked_for_are_never_made() -> None:
    exports = Exports()
    exports.take(1, weights(1).items(), None)
    assert isinstance(exports.take(3, weights(2).items(), 2), WeightBundle)
    longer = {"a": torch.ones(60), "b": torch.ones(50)}
    assert isinstance(exports.take(4, longer.items(), 3), WeightBundle)
    assert isinstance(exports.take(5, {"a": torch.ones(60)}.items(), 4), WeightBundle)
    with pytest.raises(ValueError, match="'a' comes twice"):
        exports.take(6, [("a", torch.ones(1)), ("a", torch.ones(1))], 5)
    assert isinstance(exports.take(7, longer.items(), 5), WeightBundle)


def test_changes_go_on_nothing_but_their_base_and_a_whole_version_cures() -> None:
    exports, held, behind = Exports(), Held(), Held()
    one = sent(exports.take(1, weights(1).items(), None))
    two = sent(exports.take(2, weights(2).items(), 1))
    three = sent(exports.take(3, weights(3).items(), 2))
    with pytest.raises(OtherBase, match="changes 2, and none is held"):
        behind.take([three])
    behind.take([one])
    with pytest.raises(OtherBase, match="changes 2, and 1 is held"):
        behind.take([three])
    assert_bits(behind.take([two]), weights(2))  # it was left as it was
    twin = Exports()
    held.take([sent(twin.take(1, weights(7).items(), None))])
    held.take([sent(twin.take(2, weights(8).items(), 1))])
    with pytest.raises(OtherBase, match="changes 2, and 2 is held, of other bits"):
        held.take([three])
    assert_bits(held.take([one, two, three]), weights(3))


def test_a_result_that_is_not_what_was_sent_is_refused_and_nothing_is_held_after_it() -> None:
    exports, held = Exports(), Held()
    one = sent(exports.take(1, weights(1).items(), None))
    two = sent(exports.take(2, weights(2).items(), 1))
    held.take([one])
    wrong = Change(two.changes["a"].values ^ 1, two.changes["a"].indices)
    bad = WeightDelta(2, 1, two.base_digest, {"a": wrong}, two.digests)
    with pytest.raises(OtherBase, match="'a' did not become what was sent"):
        held.take([bad])
    with pytest.raises(OtherBase, match="none is held"):
        held.take([two])
    held.take([one])
    held._arrays["a"][5] = 9  # a bit of the memory flips where nothing is written
    with pytest.raises(OtherBase, match="did not become"):
        held.take([two])
    assert_bits(held.take([one, two]), weights(2))


def test_a_version_costs_no_new_memory_on_either_side() -> None:
    exports, held = Exports(), Held()
    held.take([sent(exports.take(1, weights(1).items(), None))])
    kept = {name: array.ctypes.data for name, array in exports._arrays.items()}
    places = {name: array.ctypes.data for name, array in held._arrays.items()}
    bundle = held.take([sent(exports.take(2, weights(2).items(), 1))])
    assert {name: array.ctypes.data for name, array in exports._arrays.items()} == kept
    assert {name: array.ctypes.data for name, array in bundle.arrays.items()} == places
    assert bundle.where is not None


def test_a_digest_is_of_all_names_and_arrays_in_any_order() -> None:
    assert of_all({"a": 1, "b": 2}) == of_all({"b": 2, "a": 1})
    assert len({of_all({"a": 1, "b": 2}), of_all({"a": 2, "b": 1}), of_all({"a": 1})}) == 3
