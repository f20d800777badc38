"""Rows that are trained on and held out too are counted by where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.data.errors import DataError
from aligntune.data.held_out import ReadData, shared_rows
from aligntune.data.mixture import held_out_data, training_data
from aligntune.data.sources import ArrowRows, Slice, load_rows
from aligntune.data.spec import DatasetSpec
from tests.aligntune.data.test_sources import write

TEN = [{"prompt": "the same"}] * 10


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten rows that are all equal, as files, a folder with splits, and folders of save_to_disk."""
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "d.parquet", "splits/train.jsonl", "splits/test.jsonl"):
        write(tmp_path / name, TEN)
    rows = datasets.Dataset.from_list(TEN)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    return tmp_path


def shared(**spec: Any) -> int:
    given_ = DatasetSpec.model_validate(spec)
    held_out = held_out_data(given_)
    assert held_out is not None
    return shared_rows(training_data(given_), held_out)


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ({"path": "d.jsonl", "eval_split": "train[80%:]"}, 2),
        ({"path": "d.jsonl", "split": "train[:80%]", "eval_split": "train[80%:]"}, 0),
        ({"path": "d.jsonl", "split": "train[:6]", "eval_split": "train[4:]"}, 2),
        ({"path": "d.jsonl", "split": "train[4:]", "eval_split": "train[:6]"}, 2),
        ({"path": "d.jsonl", "eval_path": "./d.jsonl"}, 10),
        ({"path": "d.jsonl", "eval_path": "d.jsonl", "eval_samples": 3}, 3),
        ({"path": "d.jsonl", "max_samples": 8, "eval_split": "train[80%:]"}, 0),
        ({"path": "d.jsonl", "max_samples": 9, "eval_split": "train[80%:]"}, 1),
        ({"path": "d.jsonl", "eval_path": "d.parquet"}, 0),
        ({"path": "d.parquet", "eval_split": "train[7:]"}, 3),
        ({"path": "splits", "eval_split": "test"}, 0),
        ({"path": "splits", "eval_path": "splits/train.jsonl"}, 10),
        ({"path": "spl*/tr*.jsonl", "eval_path": "splits", "eval_split": "train[:1]"}, 1),
        ({"path": "saved", "eval_split": "test"}, 0),
        ({"path": "saved", "eval_split": "train[:4]"}, 4),
        ({"train": [{"path": "splits"}, {"path": "d.jsonl"}], "eval_path": "d.jsonl"}, 10),
        (
            {
                "train": [
                    {"path": "d.jsonl", "split": "train[:3]", "columns": {"q": "prompt"}},
                    {"path": "d.jsonl", "split": "train[2:5]"},
                ],
                "eval_path": "d.jsonl",
            },
            5,
        ),
        (
            {
                "train": [{"path": "splits"}, {"path": "d.jsonl", "split": "train[:8]"}],
                "eval_path": "d.jsonl",
                "eval_split": "train[8:]",
            },
            0,
        ),
    ],
    ids=str,
)
def test_rows_of_one_place_are_counted(data: Path, spec: dict[str, Any], count: int) -> None:
    assert shared(**spec) == count


MATHS = {"question": "1+1", "reward_model": {"ground_truth": "2"}}
NAMES = {"prompt": "question", "answer": "reward_model.ground_truth"}


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        (MATHS, {"prompt": "1+1", "answer": "2", "reward_model": {"ground_truth": "2"}}),
        ({"question": "1+1", "answer": "2"}, {"prompt": "1+1", "answer": "2"}),
        ({**MATHS, "prompt": "p", "answer": "3"}, {**MATHS, "prompt": "p", "answer": "3"}),
        ({"prompt": "p", "answer": "3"}, {"prompt": "p", "answer": "3"}),
    ],
)
def test_held_out_columns_get_the_names_that_training_gives_them(
    tmp_path: Path, row: dict[str, Any], seen: dict[str, Any]
) -> None:
    write(tmp_path / "train.jsonl", [MATHS])
    write(tmp_path / "test.jsonl", [row])
    train = [{"path": str(tmp_path / "train.jsonl"), "columns": NAMES}] * 2
    spec = {"train": train, "eval_path": str(tmp_path / "test.jsonl")}
    held_out = held_out_data(DatasetSpec.model_validate(spec))
    assert held_out is not None
    assert held_out[0] == seen


def test_two_held_out_columns_that_would_get_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [{"question": "1+1", "problem": "2+2"}])
    path = str(tmp_path / "d.jsonl")
    train = [{"path": path, "columns": {"prompt": of}} for of in ("question", "problem")]
    said = r"'prompt' of 'question' and of 'problem', .* have both; give them a column 'prompt'"
    with pytest.raises(DataError, match=said):
        held_out_data(DatasetSpec.model_validate({"train": train, "eval_path": path}))


def test_splits_on_the_hub_are_places_of_their_own() -> None:
    rows = datasets.Dataset.from_list(TEN)
    train, test, again = (
        ArrowRows(rows, "hub/name", ("hub/name", "main", None, split))
        for split in ("train", "test", "train")
    )
    assert shared_rows(train, test) == 0
    assert shared_rows(train, Slice(again, 6, 10)) == 4


BOUNDS = st.tuples(st.integers(0, 11), st.integers(1, 12)).map(sorted).filter(lambda b: b[0] < b[1])


@settings(max_examples=50)
@given(trained=BOUNDS, held_out=BOUNDS)
def test_slices_of_several_files_share_what_their_numbers_do(
    tmp_path_factory: pytest.TempPathFactory, trained: list[int], held_out: list[int]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "three"
    for number in range(3):
        write(folder / f"{number}.jsonl", TEN[:4])
    one, other = (
        load_rows(str(folder), split=f"train[{start}:{stop}]")
        for start, stop in (trained, held_out)
    )
    assert shared_rows(one, other) == len({*range(*trained)} & {*range(*held_out)})


def test_the_refusal_names_the_split_to_set(data: Path) -> None:
    ReadData(DatasetSpec(path="d.jsonl")).check_apart()
    with pytest.raises(DataError, match=r"2 of the 2 .* train\[:95%\] \(data.split\) and train\["):
        ReadData(DatasetSpec(path="d.jsonl", eval_split="train[8:]")).check_apart()
    sources = DatasetSpec.model_validate({"train": [{"path": "d.jsonl"}], "eval_path": "d.jsonl"})
    with pytest.raises(DataError, match=r"\(split of that source in data.train\)"):
        ReadData(sources).check_apart()
    shutil.copy("d.jsonl", "e.jsonl")
    ReadData(DatasetSpec(path="d.jsonl", eval_path="e.jsonl")).check_apart()
