"""Several sources as one data set: shares that are exact, an order that can be gone on with, and
faults that are told of the source they lie in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aligntune.data.errors import DataError
from aligntune.data.mixture import Sources, drawn, epoch_order, mixed, sources_shown, training_data
from aligntune.data.prompts import PromptSource, as_prompts, training_prompts
from aligntune.data.sources import load_rows
from aligntune.data.spec import DataSpec

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def lines(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, count: int, **more: Any) -> str:
    return lines(path, *({"prompt": f"{path.stem}{n}", **more} for n in range(count)))


def source_of(tokenizer: Any, seed: int = 0, **data: Any) -> PromptSource:
    spec = DataSpec.model_validate(data)
    rows = as_prompts(spec, training_data(spec), tokenizer)
    return training_prompts(spec, rows, tokenizer, max_prompt_length=64, seed=seed)


@pytest.mark.slow
@given(
    sizes=SIZES, weights=st.lists(st.floats(0.1, 9), min_size=4, max_size=4), seed=st.integers(0, 9)
)
def test_each_source_has_its_share_of_each_epoch_and_its_rows_come_equally_often(
    sizes: list[int], weights: list[float], seed: int
) -> None:
    weights, ends = weights[: len(sizes)], np.cumsum(sizes)
    counts, seen = drawn(sum(sizes), weights), Counter[int]()
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - sum(sizes) * weight / sum(weights)) < 1
    for epoch in range(4):
        order = epoch_order(epoch, seed, sizes, weights)
        assert np.bincount(np.searchsorted(ends, order, "right")).tolist() == [
            *np.trim_zeros(counts, "b")
        ]
        seen.update(order.tolist())
        for start, end in zip([0, *ends], ends, strict=False):
            often = [seen[row] for row in range(start, end)]
            assert max(often) - min(often) <= 1  # all of a source before any of it again
    straight = epoch_order(1, seed, sizes, weights, shuffle=False)
    assert Counter(np.searchsorted(ends, straight, "right").tolist()) == Counter(
        {source: count for source, count in enumerate(counts) if count}
    )


@pytest.mark.slow
@given(sizes=SIZES, seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_without_weights_every_row_comes_once_an_epoch(
    sizes: list[int], seed: int, epoch: int
) -> None:
    order = epoch_order(epoch, seed, sizes, [])
    assert sorted(order.tolist()) == [*range(sum(sizes))]
    assert order.tolist() == epoch_order(epoch, seed, [sum(sizes)], []).tolist()
    assert epoch_order(epoch, seed, sizes, [], shuffle=False).tolist() == [*range(sum(sizes))]


def test_a_mixture_goes_on_at_any_position_and_hangs_on_seed_and_weights(
    plain: Any, tmp_path: Path
) -> None:
    few, many = numbered(tmp_path / "few.jsonl", 3), numbered(tmp_path / "many.jsonl", 21)
    data = {"train": [{"path": few, "weight": 1}, {"path": many, "weight": 2}]}
    whole, again = source_of(plain, **data), source_of(plain, **data)
    texts = [whole.prompt_at(position).text for position in range(72)]
    assert [again.prompt_at(position).text for position in range(50, 72)] == texts[50:]
    assert again.fingerprint == whole.fingerprint
    for epoch in range(3):
        of_it = texts[24 * epoch : 24 * (epoch + 1)]
        assert sum(text.startswith("few") for text in of_it) == 8
    assert Counter(text for text in texts if text.startswith("few")) == dict.fromkeys(
        ("few0", "few1", "few2"), 8
    )
    other = {"train": [{"path": few, "weight": 2}, {"path": many, "weight": 1}]}
    assert source_of(plain, **other).fingerprint != whole.fingerprint
    assert [source_of(plain, seed=1, **data).prompt_at(p).text for p in range(24)] != texts[:24]


def test_sources_have_their_own_slices_counts_and_columns(plain: Any, tmp_path: Path) -> None:
    maths = lines(
        tmp_path / "maths.jsonl",
        *({"question": f"{n}+1", "reward_model": {"ground_truth": n + 1}} for n in range(9)),
    )
    chats = lines(
        tmp_path / "chats.jsonl",
        *(
            {
                "conversations": [
                    {"from": "human", "value": f"hi {n}"},
                    {"from": "gpt", "value": "yes"},
                ]
            }
            for n in range(4)
        ),
    )
    source = source_of(
        plain,
        train=[
            {
                "path": maths,
                "split": "train[3:]",
                "max_samples": 2,
                "columns": {"prompt": "question", "answer": "reward_model.ground_truth"},
            },
            {"path": numbered(tmp_path / "plain.jsonl", 2, answer=0)},
        ],
        shuffle=False,
    )
    made = [source.prompt_at(position) for position in range(len(source))]
    assert [prompt.text for prompt in made] == ["3+1", "4+1", "plain0", "plain1"]
    assert [prompt.columns["answer"] for prompt in made] == [4, 5, 0, 0]
    assert source.rows.where(1) == f"{maths}, row 4 (line 5)"

    renamed = training_data(
        DataSpec.model_validate(
            {"train": [{"path": chats, "columns": {"prompt": "conversations"}}]}
        )
    )
    assert renamed[3]["prompt"][0]["value"] == "hi 3"
    assert renamed.columns == ("prompt",)


def test_a_fault_of_one_source_is_told_with_its_file(plain: Any, tmp_path: Path) -> None:
    good = numbered(tmp_path / "good.jsonl", 20)
    other = lines(tmp_path / "other.jsonl", {"question": "1+1"})
    empty = lines(tmp_path / "empty.jsonl", {"prompt": " "})
    with pytest.raises(DataError, match=r"other\.jsonl: no column 'prompt'.*it has question"):
        source_of(plain, train=[{"path": good}, {"path": other}])
    with pytest.raises(DataError, match=r"no column 'quest' \(data\.train\.1\.columns\.prompt\)"):
        source_of(plain, train=[{"path": good}, {"path": other, "columns": {"prompt": "quest"}}])
    with pytest.raises(DataError, match=r"empty\.jsonl: no row of this source can be used"):
        source_of(plain, train=[{"path": good}, {"path": empty}])
    lines(tmp_path / "empty.jsonl", {"prompt": "p"}, {"prompt": ""})
    dropped = source_of(plain, train=[{"path": good}, {"path": empty}]).dropped
    assert dropped.reasons == {"empty": 1}
    assert f"{empty}, row 1 (line 2)" in dropped.examples["empty"][0]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({}, "path is missing"),
        ({"path": "a", "train": [{"path": "b"}]}, "path is given beside it"),
        ({"train": [{"path": "b"}], "max_samples": 3}, "max_samples is given beside it"),
        ({"train": [{"path": "a", "weight": 1}, {"path": "b"}]}, r"train\.1 has no weight"),
        ({"train": [{"path": "a"}], "eval_split": "test"}, "set eval_path"),
        ({"train": [{"path": "a", "weight": 0}]}, "greater than 0"),
    ],
)
def test_what_contradicts_itself_is_refused(data: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DataSpec.model_validate(data)


def test_a_job_over_one_table_has_the_shares_too(tmp_path: Path) -> None:
    parts = [load_rows(numbered(tmp_path / f"{n}.jsonl", n)) for n in (2, 8)]
    used = [0, 1, 2, 3, 4, 5, 6, 7]  # two of the second source were dropped
    order = mixed(Sources(parts, [3, 1]), used, seed=0)
    assert len(order) == 8
    assert Counter(order)[0] == Counter(order)[1] == 3
    assert mixed(Sources(parts, [3, 1]), used, seed=0) == order
    assert mixed(Sources(parts, [None, None]), used, seed=0) == used
    assert mixed(parts[1], [1, 5], seed=0) == [1, 5]
    assert [*sources_shown(Sources(parts, [3, 1]), used)] == [
        f"  {tmp_path}/2.jsonl: 2 rows, 2 used; weight 3, 6 of 8 an epoch (75.0 %)",
        f"  {tmp_path}/8.jsonl: 8 rows, 6 used; weight 1, 2 of 8 an epoch (25.0 %)",
    ]


def test_a_glob_is_its_files_in_order_and_one_that_matches_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a", "deep/c"):
        numbered(tmp_path / "data" / f"{name}.jsonl", 1)
    assert [row["prompt"] for row in load_rows("data/*.jsonl")] == ["a0", "b0"]  # type: ignore[attr-defined]
    assert len(load_rows("data/**/*.jsonl", split=None)) == 3
    with pytest.raises(DataError, match=r"data/\*\.json: matches no file here"):
        load_rows("data/*.json")
    with pytest.raises(DataError, match="it is not 'test'"):
        load_rows("data/*.jsonl", split="test")
    numbered(tmp_path / "data" / "test.jsonl", 1)
    numbered(tmp_path / "data" / "train.jsonl", 1)
    with pytest.raises(DataError, match=r"files of 2 splits \(test, train\)"):
        load_rows("data/*.jsonl")
    assert len(load_rows("data/tes*.jsonl", split="test")) == 1
    for name in ("train", "test"):  # a folder's name counts where the pattern leaves it open
        numbered(tmp_path / "test" / "parts" / name / "0.jsonl", 1)
    for pattern in ("test/parts/**/*.jsonl", "test/parts/*/0.jsonl"):
        with pytest.raises(DataError, match=r"files of 2 splits \(test, train\)"):
            load_rows(pattern)
    assert len(load_rows("test/parts/tr*/*.jsonl")) == 1
    assert len(load_rows("test/parts/train/*.jsonl")) == 1
    (tmp_path / "data" / "d.csv").write_text("prompt\nd\n")
    with pytest.raises(DataError, match="files of 2 kinds"):
        load_rows("data/[abd].*")


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": f"p{n}", "answer": n} for n in range(5)])
    rows.with_format("numpy").save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([4])).save_to_disk(tmp_path / "two")
    one = load_rows(str(tmp_path / "one"), split="train[1:3]")
    assert [one[index] for index in range(2)] == [rows[1], rows[2]]
    assert one.where(0) == f"{tmp_path}/one, row 1"
    assert len(load_rows(str(tmp_path / "two"))) == 5
    assert load_rows(str(tmp_path / "two"), split="test")[0]["prompt"] == "p4"
    assert len(load_rows(str(tmp_path), name="two")) == 5
    for folder, split, why in (
        ("two", "dev", "no split 'dev'; it has train, test"),
        ("two", None, "which split is not said"),
        ("one", "test", "holds one split"),
    ):
        with pytest.raises(DataError, match=why):
            load_rows(str(tmp_path / folder), split=split)
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(DataError, match="cannot be read as a folder of save_to_disk"):
        load_rows(str(tmp_path / "one"))


MANY = 1_000_000
BOUNDED = """
import resource, sys
import numpy as np
from aligntune.data.mixture import Sources, epoch_order, usable_sizes
from aligntune.data.sources import load_rows

def grown():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

path, few = sys.argv[1:]
before = grown()
rows = Sources([load_rows(path), load_rows(few)], [1.0, 1.0])
sizes = usable_sizes(rows, np.arange(len(rows)))
order = epoch_order(3, 0, sizes, rows.weights)
assert rows[sizes[0] - 1]["n"] == sizes[0] - 1
for index in order[::50_000].tolist():
    assert rows[index]["n"] == index % sizes[0]
assert f"(line {sizes[0]})" in rows.where(sizes[0] - 1)
print(grown() - before)
"""


@pytest.mark.long  # 5 to 11 s
def test_a_million_rows_are_drawn_in_bounded_memory(tmp_path: Path) -> None:
    path, few = tmp_path / "many.jsonl", tmp_path / "few.jsonl"
    pad = "x" * 100
    with path.open("w") as file:
        file.writelines(f'{{"n":{n},"pad":"{pad}"}}\n' for n in range(MANY))
    few.write_text('{"n": 0}\n')
    ran = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(path), str(few)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert path.stat().st_size > 110 * 2**20
    assert float(ran.stdout) < 100  # MiB: 16 bytes a row, and the order of one epoch
