"""Training data that nobody expects: as prompts and as pairs, in every kind of file."""

from __future__ import annotations

import csv
import functools
import io
import json
import random
from pathlib import Path
from typing import Any

from aligntune.errors import UserError
from tests.fuzz import broken
from tests.fuzz.trial import NotRight, Refused, one_line


@functools.cache
def tokenizers() -> list[Any]:
    """With a chat template, without, and with one that carries tools."""
    from aligntune.quickstart.agent import make_agent_tokenizer
    from tests.aligntune.data.conftest import TEMPLATE, byte_tokenizer

    tools = byte_tokenizer(template=make_agent_tokenizer().chat_template)
    return [byte_tokenizer(template=TEMPLATE), byte_tokenizer(), tools]


def rows_of(dice: random.Random) -> list[dict[str, Any]]:
    """Rows that are good, most of them."""
    count = dice.randint(1, 12)
    kind = dice.choice(("text", "chat", "pairs", "sharegpt", "tools"))
    rows: list[dict[str, Any]] = []
    for index in range(count):
        asked, said = f"{index}+1", f"{index + 1}"
        user = {"role": "user", "content": asked}
        row: dict[str, Any] = {
            "text": {"prompt": asked, "answer": said},
            "chat": {"prompt": [user], "answer": said},
            "pairs": {"prompt": asked, "chosen": said, "rejected": f"{said}0"},
            "sharegpt": {"conversations": [{"from": "human", "value": asked}]},
            "tools": {
                "prompt": [user],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            },
        }[kind]
        if dice.random() < 0.15:
            broken.mutate(dice, row)
        rows.append(row)
    return rows


def written(dice: random.Random, rows: list[dict[str, Any]], folder: Path) -> Path | None:
    """The rows as a file of some kind, spoilt here and there; None where they cannot be written."""
    kind = dice.choice(("jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz"))
    path = folder / f"train.{kind}"
    try:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
            raw = path.read_bytes()
        elif kind == "csv":
            text = io.StringIO()
            names = list(dict.fromkeys(str(name) for row in rows for name in row))
            out = csv.writer(text)
            out.writerows([names, *([str(row.get(name, "")) for name in names] for row in rows)])
            raw = text.getvalue().encode("utf-8", "surrogatepass")
        else:
            parts = [json.dumps(row, ensure_ascii=dice.random() < 0.5) for row in rows]
            text_of = "[" + ",\n".join(parts) + "]" if kind == "json" else "\n".join(parts) + "\n"
            raw = text_of.encode("utf-8", "surrogatepass")
    except Exception:  # noqa: BLE001 - of whatever cannot be written there is no file
        return None
    if dice.random() < 0.5:
        raw = broken.spoil(dice, raw)
    if kind.endswith(".gz"):
        import gzip

        raw = gzip.compress(raw)
        if dice.random() < 0.3:
            raw = broken.spoil(dice, raw)
    path.write_bytes(raw)
    return path


def data(dice: random.Random, folder: Path) -> Refused | None:
    """Training rows, as prompts: none is lost in silence."""
    from aligntune.data.mixture import training_data
    from aligntune.data.prompts import as_prompts, training_prompts
    from aligntune.data.spec import DataSpec

    path = written(dice, rows_of(dice), folder)
    if path is None:
        return None
    spec = DataSpec(
        path=str(path),
        max_dropped_fraction=dice.choice((0.1, 1.0, 1.0)),
        bad_rows=dice.choice(("drop", "drop", "error")),
        fold_duplicates=dice.random() < 0.2,
        long_rows=dice.choice(("drop", "error", "keep_end")),
        split=dice.choice(("train", "train", "train[:50%]", "train[2:]", "train[:3]")),
    )
    tokenizer = dice.choice(tokenizers())
    try:
        rows = as_prompts(spec, training_data(spec), tokenizer)
        source = training_prompts(spec, rows, tokenizer, max_prompt_length=64, seed=0)
        prompts = list(source.epoch())
    except UserError as error:
        return one_line(error)
    dropped = source.dropped
    if len(prompts) + dropped.count + dropped.folded != dropped.rows:
        raise NotRight(f"{len(prompts)} prompts of {dropped}")
    if len({prompt.row for prompt in prompts}) != len(prompts):
        raise NotRight("a row comes twice")
    for prompt in prompts:
        if not 0 < len(prompt.token_ids) <= 64:
            raise NotRight(f"a prompt has {len(prompt.token_ids)} tokens")
    for line in dropped.lines():
        one_line(ValueError(line.strip()))
    return None


def pairs(dice: random.Random, folder: Path) -> Refused | None:
    """Rows as pairs of answers, for DPO and reward models."""
    from aligntune.data.pair_tokens import tokenise_pairs
    from aligntune.data.sources import load_rows
    from aligntune.data.spec import RowRules

    rows = rows_of(dice)
    for row in rows:
        row.setdefault("chosen", "a")
        row.setdefault("rejected", "b")
        if dice.random() < 0.1:
            broken.mutate(dice, row)
    path = written(dice, rows, folder)
    if path is None:
        return None
    rules = RowRules("drop", "drop", 1.0, "data.max_length")
    try:
        read = load_rows(str(path))
        made = tokenise_pairs(
            read,
            dice.choice(tokenizers()),
            dice.choice(("dpo", "reward_model")),
            prompt_column="prompt",
            chosen_column="chosen",
            rejected_column="rejected",
            apply_chat_template=True,
            system_prompt=None,
        ).within(64, rules)
    except UserError as error:
        return one_line(error)
    if len(made) + made.dropped.count != len(read):
        raise NotRight(f"{len(made)} pairs and {made.dropped} of {len(read)} rows")
    return None
