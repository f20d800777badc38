"""Rows come out as they lie in the files, and every flaw of a file is named with its place."""

from __future__ import annotations

import csv
import gc
import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.data import sources
from aligntune.data.errors import DataError
from aligntune.data.sources import (
    AHEAD,
    ArrowRows,
    Rows,
    load_rows,
    many_rows,
    require_column,
)

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 3?", "answer": "5"},
    {"prompt": "naïve — 数学 🧮 \u2028 line separator", "answer": "ответ"},
    {"prompt": 'commas, "quotes"\nand\r\nline ends', "answer": ""},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_bytes("".join(lines).encode())
    return path


def contents(rows: Rows) -> list[dict[str, Any]]:
    return [rows[index] for index in range(len(rows))]


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_kind_gives_the_rows_that_were_written(tmp_path: Path, suffix: str) -> None:
    rows = load_rows(str(write(tmp_path / f"d{suffix}", ROWS)))
    assert contents(rows) == ROWS
    assert rows[1] == ROWS[1]
    assert rows.columns == ("prompt", "answer")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".jsonl.gz"])
@pytest.mark.parametrize(("most", "opened"), [(64, 3), (2, 4)])
def test_a_file_is_opened_once_for_all_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, most: int, opened: int
) -> None:
    """Of more than `MOST_OPEN` files one stays open."""
    every = [{"n": str(n)} for n in range(300)]
    for name, first in (("a", 0), ("b", 100), ("c", 200)):
        plain = write(tmp_path / "d" / f"{name}{suffix.removesuffix('.gz')}", every[first:][:100])
        if suffix.endswith(".gz"):
            plain.with_name(f"{name}{suffix}").write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
    rows = load_rows(str(tmp_path / "d"))
    monkeypatch.setattr(sources, "MOST_OPEN", most)
    gc.collect()  # or files of other tests' rows are closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    real, paths = os.open, list[Any]()

    def watched(path: Any, *args: Any, **options: Any) -> int:
        paths.append(path)
        return real(path, *args, **options)

    with monkeypatch.context() as watching:
        watching.setattr(os, "open", watched)
        assert contents(rows) == every
        assert rows[0] == every[0]
    assert len(paths) == opened
    assert len(os.listdir("/proc/self/fd")) - before == min(3, most - 1)
    other = pickle.loads(pickle.dumps(rows))
    del rows
    assert other[250] == every[250]


def test_rows_of_a_table_are_read_some_at_once_where_they_are_asked_for_in_order(
    tmp_path: Path,
) -> None:
    every = [{"n": n, "said": [{"role": "user", "content": str(n)}]} for n in range(300)]
    rows = load_rows(str(write(tmp_path / "d.parquet", every)))
    assert isinstance(rows, ArrowRows)
    table, asked = rows._dataset, list[Any]()

    class Table:
        def __getitem__(self, key: Any) -> Any:
            asked.append(key)
            return table[key]

        def __len__(self) -> int:
            return len(table)

    rows._dataset = Table()
    assert contents(rows) == every
    assert len(asked) == 1 + -(-299 // AHEAD)
    rows[299].pop("n")
    assert rows[299] == every[299]
    asked.clear()
    assert [rows[n] for n in (5, 200, 7, 100)] == [every[n] for n in (5, 200, 7, 100)]
    assert asked == [5, 200, 7, 100], "out of order, one at a time"
    assert contents(pickle.loads(pickle.dumps(load_rows(str(tmp_path / "d.parquet"))))) == every


def test_a_person_is_told_before_many_rows_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_rows(str(write(tmp_path / "d.jsonl", ROWS)))
    assert many_rows(rows) is None
    monkeypatch.setattr(sources, "MANY", 3)
    assert many_rows(rows) == f"checking 3 rows of {tmp_path / 'd.jsonl'}"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_is_its_files_in_order_of_name(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"b{suffix}", ROWS[1:])
    write(tmp_path / f"a{suffix}", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    write(tmp_path / ".cache" / f"c{suffix}", ROWS)
    assert contents(load_rows(str(tmp_path))) == ROWS


def test_paths_with_glob_characters_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "run [1]*" / "a,b.parquet", ROWS)
    assert contents(load_rows(str(path))) == ROWS
    assert contents(load_rows(str(path.parent))) == ROWS


def test_a_folder_with_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001.jsonl", ROWS[:2])
    write(tmp_path / "test" / "part.jsonl", ROWS[2:])
    assert contents(load_rows(str(tmp_path))) == ROWS[:2]
    assert contents(load_rows(str(tmp_path), split="test")) == ROWS[2:]
    message = refused(tmp_path, split="validation")
    assert "'validation'" in message
    assert "test, train" in message
    assert "not said" in refused(tmp_path, split=None)


def test_only_split_is_taken_where_none_is_named(tmp_path: Path) -> None:
    write(tmp_path / "one" / "test.jsonl", ROWS)
    assert len(load_rows(str(tmp_path / "one"), split=None)) == 3
    assert "take slices" in refused(write(tmp_path / "two" / "x.csv", ROWS).parent, split="test")


def test_split_words_are_whole_words(tmp_path: Path) -> None:
    write(tmp_path / "latest_contest.jsonl", ROWS)
    assert len(load_rows(str(tmp_path))) == 3


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:4]", range(0, 4)),
        ("train[4:]", range(4, 10)),
        ("train[-2:]", range(8, 10)),
        ("train[:90%]", range(0, 9)),
        ("train[90%:]", range(9, 10)),
        ("train[20%:-50%]", range(2, 5)),
    ],
)
def test_slices_of_a_split(tmp_path: Path, split: str, expected: range) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": str(n)} for n in range(10)])
    rows = load_rows(str(path), split=split)
    assert [int(row["prompt"]) for row in contents(rows)] == list(expected)
    assert rows.where(0).endswith(f"row {expected[0]} (line {expected[0] + 1})")


def test_max_rows_takes_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    assert contents(load_rows(str(path), max_rows=2)) == ROWS[:2]
    assert contents(load_rows(str(path), split="train[1:]", max_rows=1)) == ROWS[1:2]
    assert contents(load_rows(str(path), max_rows=99)) == ROWS


def test_mixed_types_stay_as_they_are(tmp_path: Path) -> None:
    mixed = [{"prompt": "a", "answer": value} for value in (3, "x", 0.5, None, [1], {"k": True})]
    for name in ("d.jsonl", "d.json"):
        got = contents(load_rows(str(write(tmp_path / name, mixed))))
        assert [(type(row["answer"]), row["answer"]) for row in got] == [
            (type(row["answer"]), row["answer"]) for row in mixed
        ]


def test_csv_cells_are_the_strings_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,answer\nq,007\nq,NA\nq,\nq,1e3\n\nq,true\n")
    answers = [row["answer"] for row in contents(load_rows(str(path)))]
    assert answers == ["007", "NA", "", "1e3", "true"]


def test_a_column_some_rows_lack_is_null_there(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "a"}, {"answer": 1, "prompt": "b"}])
    rows = load_rows(str(path))
    assert rows.columns == ("prompt", "answer")
    assert rows[0] == {"prompt": "a", "answer": None}


def test_byte_order_mark_blank_lines_and_no_last_line_end(tmp_path: Path) -> None:
    for name, text in {
        "a.jsonl": '\n{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}',
        "b.json": ' [{"prompt": "a"},\n{"prompt": "b"}]\n',
        "c.json": '{"prompt": "a"}\n{"prompt": "b"}\n',
        "d.csv": 'prompt\r\na\r\n"b"',
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        rows = load_rows(str(tmp_path / name))
        assert contents(rows) == [{"prompt": "a"}, {"prompt": "b"}], name


def test_places_of_rows(tmp_path: Path) -> None:
    jsonl = tmp_path / "d.jsonl"
    jsonl.write_text('{"prompt": 1}\n\n{"prompt": 2}\n')
    assert load_rows(str(jsonl)).where(1) == f"{jsonl}, row 1 (line 3)"
    table = tmp_path / "d.csv"
    table.write_text('prompt\n"two\nlines"\nb\n')
    assert load_rows(str(table)).where(1) == f"{table}, row 1 (line 4)"
    array = tmp_path / "d.json"
    array.write_text('[\n {"prompt": 1},\n {"prompt": 2}\n]')
    assert load_rows(str(array)).where(1) == f"{array}, row 1 (line 3)"
    parquet = write(tmp_path / "d.parquet", ROWS)
    assert load_rows(str(parquet)).where(1) == f"{parquet}, row 1"


def test_rows_can_be_pickled(tmp_path: Path) -> None:
    rows = load_rows(str(write(tmp_path / "d.csv", ROWS)))
    assert contents(pickle.loads(pickle.dumps(rows))) == ROWS


def test_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    message = refused(tmp_path / "trian.jsonl")
    assert "no such file" in message
    assert "did you mean" in message
    assert "train.jsonl" in message
    assert "nor is there a folder" in refused(tmp_path / "no" / "such" / "x.csv")
    assert "no such file" in refused("relative.jsonl")
    assert "no such file" in refused("./folder")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
@pytest.mark.parametrize("text", ["", "\n\n", "prompt,answer\n"])
def test_files_without_rows_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text if name == "d.csv" or "," not in text else "[]")
    message = refused(tmp_path / name)
    assert str(tmp_path / name) in message
    assert "empty" in message or name == "d.jsonl"


def test_empty_parquet_folder_and_slice_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "d.parquet")
    assert "empty" in refused(tmp_path / "d.parquet")
    (tmp_path / "folder").mkdir()
    assert "no data file" in refused(tmp_path / "folder")
    message = refused(write(tmp_path / "d.jsonl", ROWS), split="train[5:]")
    assert "no rows (3 in all)" in message
    assert "train[90%:]" in refused(tmp_path / "d.jsonl", split="train[a]")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("d.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', 2),
        ("d.jsonl", '{"prompt": "a"}\n\n\nnonsense\n', 4),
        ("d.jsonl", '{"prompt": "a"} {"prompt": "b"}\n', 1),
        ("d.json", '[{"prompt": "a"},\n{"prompt": }]', 2),
        ("d.json", '[{"prompt": "a"}\n{"prompt": "b"}]', 2),
        ("d.json", '[{"prompt": "a"},\n', 2),
        ("d.json", '[{"prompt": "a"}]\n\n]', 3),
        ("d.json", '{"prompt": "a"}\n{"prompt": ', 2),
    ],
)
def test_broken_json_names_file_and_line(tmp_path: Path, name: str, text: str, line: int) -> None:
    (tmp_path / name).write_text(text)
    message = refused(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}, line {line}: broken JSON")


@pytest.mark.parametrize(
    ("name", "text", "line", "kind"),
    [
        ("d.jsonl", '{"prompt": "a"}\n["b"]\n', 2, "array"),
        ("d.jsonl", '"a"\n', 1, "string"),
        ("d.json", '[{"prompt": "a"},\n3]', 2, "number"),
        ("d.json", "[\nnull]", 2, "null"),
    ],
)
def test_rows_that_are_not_objects(
    tmp_path: Path, name: str, text: str, line: int, kind: str
) -> None:
    (tmp_path / name).write_text(text)
    message = refused(tmp_path / name)
    assert f"line {line}: a JSON {kind}" in message


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("prompt,answer\na,1\nb\n", 3, "1 cells where the header has 2"),
        ("prompt,answer\na,1,2\n", 2, "3 cells"),
        ('prompt\n"a\nb\n', 2, "broken CSV"),
        ('prompt\n"a"b\n', 2, "broken CSV"),
        ("prompt,prompt\na,b\n", 1, "'prompt' twice"),
        ("prompt,\na,b\n", 1, "without a name"),
    ],
)
def test_broken_csv_names_file_and_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    message = refused(tmp_path / "d.csv")
    assert f"line {line}: " in message
    assert what in message


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_files_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    text = {"d.jsonl": b'{"a": 1}\n"\xe9"', "d.json": b'[\n"\xe9"]', "d.csv": b"a\n\xe9"}[name]
    (tmp_path / name).write_bytes(text)
    assert "line 2: not UTF-8 (byte 0xe9)" in refused(tmp_path / name)


def test_broken_and_unequal_parquet(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_text("no parquet")
    assert "cannot be read as Parquet" in refused(tmp_path / "d.parquet")
    folder = tmp_path / "folder"
    write(folder / "a.parquet", [{"prompt": "a", "answer": 3}])
    write(folder / "b.parquet", [{"prompt": "b", "answer": "x"}])
    assert "same columns" in refused(folder)


def test_kinds_that_are_mixed_or_unknown(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.csv", ROWS)
    assert ".csv, .jsonl" in refused(tmp_path)
    (tmp_path / "d.txt").write_text("a")
    assert "not a data file" in refused(tmp_path / "d.txt")


def test_hub_options_are_refused_for_local_data(tmp_path: Path) -> None:
    assert "data.name" in refused(write(tmp_path / "d.jsonl", ROWS), name="main")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    rows = load_rows(str(path))
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(DataError, match="changed"):
        rows[1]


def test_missing_column_lists_the_columns_and_offers_the_nearest(tmp_path: Path) -> None:
    rows = load_rows(str(write(tmp_path / "d.jsonl", [{"prompts": "a", "gold": 1}])))
    with pytest.raises(DataError) as caught:
        require_column(rows, "prompt", "data.prompt_column")
    message = str(caught.value)
    assert str(tmp_path / "d.jsonl") in message
    assert "prompts, gold" in message
    assert "did you mean 'prompts'" in message


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_clear_error() -> None:
    code = (
        "import sys\n"
        "from aligntune.data.sources import load_rows, DataError\n"
        "assert 'datasets' not in sys.modules\n"
        "for split in 'train', None:\n"
        "    try: load_rows('no-such-owner/no-such-name', split=split)\n"
        "    except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("no-such-owner/no-such-name: neither a local file")
        assert "network" in line


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": values, "other": values}), min_size=1),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_json_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    indent: int | None,
    ascii_only: bool,
) -> None:
    folder = tmp_path_factory.mktemp("json")
    array = folder / "d.json"
    array.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    lines = folder / "d.jsonl"
    lines.write_bytes(
        "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode("utf-8")
    )
    assert contents(load_rows(str(array))) == rows
    assert contents(load_rows(str(lines))) == rows


@pytest.mark.slow
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {name: st.text(st.characters(exclude_categories=["Cs"])) for name in ("prompt", "b")}
        ),
        min_size=1,
    )
)
def test_csv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "d.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "b"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert contents(load_rows(str(path))) == rows


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv"])
def test_packed_files_are_read(tmp_path: Path, kind: str) -> None:
    plain = write(tmp_path / f"d{kind}", ROWS)
    packed = tmp_path / "packed" / f"d{kind}.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in packed, packed.parent:
        rows = load_rows(str(path))
        assert contents(rows) == ROWS
        assert contents(pickle.loads(pickle.dumps(rows))) == ROWS
    assert "row 1 (line" in load_rows(str(packed)).where(1)


def test_broken_packed_files_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(write(tmp_path / "d.jsonl", ROWS).read_bytes())
    for number, held in enumerate((b"no gzip", whole[:-9], whole[:12] + b"\xff" + whole[13:])):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(held)
        assert "broken gzip" in refused(tmp_path / f"{number}.jsonl.gz")
    assert "not a data file" in refused(write(tmp_path / "d.jsonl", ROWS).rename(tmp_path / "d.gz"))


def test_a_lone_file_has_one_split(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    for split in "test", "test[:2]", "validation":
        assert "a lone file has one split" in refused(path, split=split)
    held_out = path.rename(tmp_path / "my_test.jsonl")
    for name in "train", "test", None:
        assert len(load_rows(str(held_out), split=name)) == 3


def test_configurations_of_a_folder_are_never_put_together(tmp_path: Path) -> None:
    for place, rows in {"main": ROWS[:1], "socratic": ROWS[1:]}.items():
        write(tmp_path / place / "train-00000-of-00001.parquet", rows)
        write(tmp_path / place / "test" / "0.parquet", rows)
    assert "the config name is missing: main, socratic; set data.name" in refused(tmp_path)
    for split in "train", "test":
        assert contents(load_rows(str(tmp_path), name="main", split=split)) == ROWS[:1]
    assert "it has main, socratic" in refused(tmp_path, name="mian")


def test_subfolders_that_are_no_configurations_are_read_together(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-0.jsonl", ROWS[:1])
    write(tmp_path / "data" / "train-1.jsonl", ROWS[1:])
    write(tmp_path / "held" / "test.jsonl", ROWS)
    assert contents(load_rows(str(tmp_path))) == ROWS
    assert contents(load_rows(str(tmp_path), name="data")) == ROWS


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    path = write(tmp_path / "d.parquet", ROWS)
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    message = refused(path)
    assert f"the cache of datasets, {cache}, cannot be written" in message
    assert "HF_DATASETS_CACHE" in message
    assert "same columns" not in message


def test_objects_over_many_lines_are_named(tmp_path: Path) -> None:
    pretty = json.dumps({"version": 1, "data": ROWS}, indent=2)
    (tmp_path / "d.json").write_text(pretty)
    message = refused(tmp_path / "d.json")
    assert "is one JSON object over many lines (keys 'version', 'data')" in message
    (tmp_path / "d.jsonl").write_text(pretty)
    assert "this one goes on; write each on one line" in refused(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").write_text('{"prompt": nonsense}\n')
    assert "goes on" not in refused(tmp_path / "e.jsonl")
