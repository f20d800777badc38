"""Changed weights: they become the newer version bit for bit, or are refused."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.transfer.bundle import WeightBundle, as_tensor
from actors.transfer.delta import Change, Exports, WeightDelta, put, update, words
from actors.transfer.digest import PARTS, of_all, of_part
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
        assert bundle.arrays[name].tobytes() == array.tobytes()


@pytest.mark.slow
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
    assert delta.nbytes == 4 + 4 + 2  # a word, its block's count, its place there
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


def three_versions(size: int, seed: int) -> tuple[list[Any], list[Tensors]]:
    """A whole version and two of changes as they are sent, and what they make."""
    draw = np.random.default_rng(seed)
    numbers = draw.integers(0, 2**16, size, dtype=np.uint16)
    exports, made, wanted = Exports(), [], []
    for version in (1, 2, 3):
        tensors = as_tensors({"a": (numbers, torch.bfloat16), "b": (numbers[:9], torch.float16)})
        made.append(sent(exports.take(version, tensors.items(), version - 1 or None)))
        wanted.append(tensors)
        numbers[draw.integers(0, size, max(size // 50, 1))] ^= 7
    return made, wanted


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(64, 400), st.integers(0, 2**32 - 1), st.data())
def test_changes_that_arrive_with_any_bit_flipped_are_refused_and_nothing_is_put(
    size: int, seed: int, data: st.DataObject
) -> None:
    (one, two, three), wanted = three_versions(size, seed)
    assert isinstance(three, WeightDelta)
    held = Held()
    held.take([one, two])
    name = data.draw(st.sampled_from(sorted(three.changes)))
    change = three.changes[name]
    fields = {key: getattr(change, key).copy() for key in ("words", "counts", "offsets")}
    hit = fields[data.draw(st.sampled_from([key for key in fields if fields[key].size]))]
    most = 16 if hit is fields["counts"] else 8 * hit.nbytes  # not billions, were they believed
    flip(hit, data.draw(st.integers(0, most - 1)))
    bad = replace(three, changes={**three.changes, name: Change(**fields)})
    with pytest.raises(OtherBase, match="did not arrive as they were sent"):
        held.take([bad])
    assert_bits(held.take([two]), wanted[1])
    assert_bits(held.take([three]), wanted[2])
    held.close()


def flip(array: np.ndarray, bit: int) -> None:
    array.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.data())
def test_a_bit_that_flips_in_what_is_held_is_found_and_the_whole_cures_it(
    size: int, seed: int, data: st.DataObject
) -> None:
    draw = np.random.default_rng(seed)
    numbers = draw.integers(0, 2**16, size, dtype=np.uint16)
    tensors = as_tensors({"a": (numbers, torch.bfloat16), "b": (numbers, torch.int16)})
    exports, held = Exports(), Held()
    late = [sent(exports.take(1, tensors.items(), None))]
    held.take(late)
    bit = data.draw(st.integers(0, 16 * size - 1))
    flip(held._arrays[data.draw(st.sampled_from("ab"))], bit)
    with pytest.raises(OtherBase, match="is not what it should be"):  # noqa: PT012
        for version in range(2, PARTS + 2):
            late.append(sent(exports.take(version, tensors.items(), version - 1)))
            held.take(late[-1:])
    with pytest.raises(OtherBase, match="none is held"):
        held.take(late[-1:])
    assert_bits(held.take(late), tensors)
    held.close()


def test_a_whole_version_that_arrives_otherwise_is_refused() -> None:
    exports, held = Exports(), Held()
    one = sent(exports.take(1, weights(1).items(), None))
    arrays = {name: array.copy() for name, array in one.arrays.items()}
    arrays["b"][3] = 9
    with pytest.raises(OtherBase, match="version 1 did not arrive as it was sent"):
        held.take([WeightBundle(1, arrays, one.dtypes, one.digest)])
    assert_bits(held.take([one]), weights(1))


def test_a_policy_that_begins_again_sends_the_whole_and_goes_on_with_changes() -> None:
    held, first = Held(), Exports()
    held.take([sent(first.take(1, weights(1).items(), None))])
    held.take([sent(first.take(2, weights(2).items(), 1))])
    again = Exports()
    whole = sent(again.take(2, weights(2).items(), 1))
    assert isinstance(whole, WeightBundle)
    assert_bits(held.take([whole]), weights(2))
    changes = sent(again.take(3, weights(3).items(), 2))
    assert isinstance(changes, WeightDelta)
    assert_bits(held.take([changes]), weights(3))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(0, 9),
    more=st.integers(0, 65_535),
    item=st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]),
    share=st.sampled_from([0, 1e-5, 0.01, 0.3, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_array_of_any_size_becomes_the_new_one_and_says_what_has_changed(
    blocks: int, more: int, item: type, share: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    size = blocks * 65_536 + more
    old = draw.integers(0, 256, size * np.dtype(item).itemsize, dtype=np.uint8).view(item)
    new, copy = old.copy(), old.copy()
    words(new)[draw.random(words(new).size) < share] ^= 1
    before = new.tobytes()
    change = update(words(old), words(new))
    assert old.tobytes() == new.tobytes() == before
    if change is None:
        assert copy.tobytes() == before
    else:
        assert change.nbytes <= new.nbytes
        put(change, copy)
        assert copy.tobytes() == before
        if change.counts.size:
            assert change.words.size == change.offsets.size == change.counts.sum()


def test_a_version_costs_no_new_memory_on_either_side() -> None:
    exports, held = Exports(), Held()
    held.take([sent(exports.take(1, weights(1).items(), None))])
    kept = {name: array.ctypes.data for name, array in exports._arrays.items()}
    places = {name: array.ctypes.data for name, array in held._arrays.items()}
    bundle = held.take([sent(exports.take(2, weights(2).items(), 1))])
    assert {name: array.ctypes.data for name, array in exports._arrays.items()} == kept
    assert {name: array.ctypes.data for name, array in bundle.arrays.items()} == places
    assert bundle.where is not None


def test_a_digest_is_of_all_names_types_shapes_and_bits_in_any_order() -> None:
    a, b = np.arange(6, dtype=np.uint16), np.arange(6, 12, dtype=np.uint16)
    types = {"a": "bfloat16", "b": "bfloat16"}
    assert of_all({"a": a, "b": b}, types) == of_all({"b": b, "a": a}, types)
    others = [
        of_all({"a": a, "b": b}, types),
        of_all({"a": b, "b": a}, types),
        of_all({"a": a}, types),
        of_all({"a": a.reshape(2, 3), "b": b}, types),
        of_all({"a": a, "b": b}, {**types, "b": "float16"}),
    ]
    assert len(set(others)) == len(others)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data())
def test_the_parts_together_are_of_every_bit(sizes: list[int], data: st.DataObject) -> None:
    arrays = {f"w{index}": np.zeros(size, np.uint16) for index, size in enumerate(sizes)}
    before = [of_part(arrays, part) for part in range(PARTS)]
    name = data.draw(st.sampled_from(sorted(arrays)))
    if not arrays[name].size:
        return
    flip(arrays[name], data.draw(st.integers(0, 8 * arrays[name].nbytes - 1)))
    after = [of_part(arrays, part) for part in range(PARTS)]
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
