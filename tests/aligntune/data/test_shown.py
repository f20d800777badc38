"""What `aligntune data` shows: tokens and their fate, lengths, drops, columns; no text acts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from aligntune import cli
from aligntune.data.dropped import RowRules
from aligntune.data.pair_tokens import tokenise_pairs
from aligntune.data.prompt_rows import PromptRows
from aligntune.data.prompts import PromptSource
from aligntune.data.row_tokens import RowTokens
from aligntune.data.shown import (
    WIDTH,
    Bound,
    histogram,
    pair_parts,
    pairs_shown,
    pieces,
    prompts_shown,
)
from tests.aligntune.data.conftest import TEMPLATE, byte_tokenizer
from tests.aligntune.data.test_preference import COLUMNS, Table, row

PLAIN, CHAT = byte_tokenizer(), byte_tokenizer(template=TEMPLATE)
PROMPTS = Bound("rollout.max_prompt_length", 64, "drop")
HOSTILE = "\x1b[31m\x1b]0;own\x07[red]x[/red]\r\u202e\u200b\x9b2J"


def prompts(*rows: dict[str, Any], system: str | None = None) -> list[str]:
    table, rules = Table(*rows), RowRules("drop", "drop", 0.9, PROMPTS.key)
    read = PromptRows(table, CHAT, system_prompt=system)
    source = PromptSource(read, CHAT, rules, max_prompt_length=PROMPTS.tokens, seed=3)
    return [*prompts_shown(source, CHAT, PROMPTS, 2, {"right": "answer"})]


def pairs(
    *rows: dict[str, Any], most: int = 64, long_rows: Any = "drop", kind: Any = "dpo"
) -> tuple[RowTokens, Bound, list[str]]:
    table = Table(*rows)
    rules = RowRules("drop", long_rows, 0.9, "data.max_length")
    read = tokenise_pairs(table, PLAIN, kind, **COLUMNS, apply_chat_template=False)
    made, bound = read.within(most, rules), Bound("data.max_length", most, long_rows)
    dropped = {"train": made.dropped}
    return made, bound, [*pairs_shown(table, made, PLAIN, bound, 2, dropped, {})]


def plain(lines: list[str]) -> str:
    """The tokens without what divides them."""
    return "".join(line.strip() for line in lines).replace("·", "")


def test_prompts_in_the_order_of_the_data_as_the_template_renders_them() -> None:
    lines = prompts(
        {"prompt": "a", "answer": 1}, {"prompt": "b\nc", "answer": 2}, {"prompt": "d", "answer": 3}
    )
    assert lines[:2] == ["Source: table, 3 rows", "Used: 3 prompts"]
    assert "  table, row 0: 25 tokens" in lines
    assert "<user>a</user><assistant>" in plain(lines)
    assert "<user>b⏎c</user><assistant>" in plain(lines)
    assert "<user>d</user>" not in plain(lines)
    assert "Dropped: nothing, every row is used whole" in lines
    assert lines[-3:] == ["Columns that rewards get:", "  answer = 1", "  reward right: answer"]


def test_the_system_prompt_is_seen() -> None:
    lines = prompts({"prompt": "a"}, system="Be short.")
    assert "<system>Be short.</system><user>a</user><assistant>" in plain(lines)
    assert "  prompt (not trained; what the model answers is), 51 tokens:" in lines


def test_a_row_that_is_too_long_is_counted_and_not_shown() -> None:
    lines = prompts({"prompt": "a"}, {"prompt": "z" * 90})
    assert "zzz" not in plain(lines)
    assert "  rollout.max_prompt_length=64: 1 is longer, and dropped" in lines
    assert "  train: 1 of 2 rows dropped: 1 too long" in lines
    assert sum(line.endswith("too long") and "█" in line for line in lines) == 1


def test_of_a_dpo_pair_the_prompt_is_masked_and_the_answers_are_trained() -> None:
    _, _, lines = pairs(row("p: ", "yes", "no"), row("q", "same", "same"))
    assert "  table, row 0:" in lines
    at = lines.index("  chosen (trained), 4 tokens:")
    assert lines[at - 2 : at + 2] == [
        "  prompt (masked, not trained), 3 tokens:",
        "    p·:· ·",
        "  chosen (trained), 4 tokens:",
        "    y·e·s·«<eos>»·",
    ]
    assert "  rejected (trained), 3 tokens:" in lines
    assert "  train: 1 of 2 rows dropped: 1 equal" in lines
    assert "Used: 1 pairs" in lines


def test_of_a_pair_for_a_reward_model_all_is_read() -> None:
    _, _, lines = pairs(row("p", "yes", "no"), kind="reward_model")
    assert "  chosen (read whole for one score; trained), 5 tokens:" in lines
    assert not any("masked" in line for line in lines)


@pytest.mark.slow  # TRL is imported
@given(
    st.lists(st.integers(0, 9), max_size=8),
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(1, 20),
    st.sampled_from(["keep_start", "keep_end"]),
)
def test_a_pair_is_cut_as_trls_collator_cuts_it(
    prompt: list[int], chosen: list[int], rejected: list[int], most: int, mode: Any
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    collate = DataCollatorForPreference(pad_token_id=0, max_length=most, truncation_mode=mode)
    batch = collate([pair])
    parts = pair_parts(pair, Bound("data.max_length", most, mode))
    shared = [part for part in parts if part.name == "prompt"]
    for index, name in enumerate(("chosen", "rejected")):
        own = [*shared, *(p for p in parts if p.name in (name, f"prompt of {name}"))]
        kept = [part for part in own if part.fate != "cut off"]
        real = batch["attention_mask"][index].bool()
        assert [i for p in kept for i in p.ids] == batch["input_ids"][index][real].tolist()
        trained = [p.fate == "trained" for p in kept for _ in p.ids]
        assert trained == batch["completion_mask"][index][real].bool().tolist()


@pytest.mark.slow
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 6000))
def test_a_histogram_counts_every_row_once_and_marks_those_above_the_bound(
    lengths: list[int], bound: int
) -> None:
    lines = histogram(lengths, bound)
    assert max(map(cell_len, lines)) <= WIDTH
    counts = [int(line.removesuffix("  too long").split()[-1]) for line in lines]
    assert sum(counts) == len(lengths)
    long = [n for n, line in zip(counts, lines, strict=True) if line.endswith("too long")]
    assert sum(long) == sum(length > bound for length in lengths)


def test_hostile_text_does_not_act() -> None:
    made = prompts({"prompt": HOSTILE, "a\x1b[1m": HOSTILE})
    made += pairs(row(HOSTILE, HOSTILE, "漢字" * 9), most=200)[2]
    assert all(line.isprintable() for line in made)
    assert "\\x1b·[·3·1·m" in "".join(line.strip() for line in made)
    assert "[red]x[/red]" in plain(made)
    assert max(cell_len(line) for line in made if line.startswith("    ")) <= WIDTH


def test_long_rows_keep_both_ends_and_say_what_is_not_shown() -> None:
    _, _, lines = pairs(row("a" + "b" * 300 + "c", "yes", "no"), most=400)
    assert "    [102 tokens are not shown]" in lines


def test_a_piece_of_a_character_is_not_hidden() -> None:
    ids = PLAIN("é", add_special_tokens=False)["input_ids"]
    assert all(text and "\ufffd" not in text for text in pieces(PLAIN, ids))


# The command


def _write(folder: Path, model: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"name": str(model)},
        "data": {"path": str(data)},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(json.dumps(tree | more))
    return folder / "config.yaml"


def _called(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", *arguments])
    return int(ended.value.code or 0)


def test_the_command_shows_prompts_and_starts_nothing(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1"}], "answer": n} for n in range(30)]
    config = _write(tmp_path, tiny_model, rows, algorithm="grpo", rewards=["math"])
    assert _called([str(config), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Source: {tmp_path / 'rows.jsonl'}, 30 rows\nUsed: ")
    assert "  reward math: answer" in out
    assert not (tmp_path / "run").exists()


def test_the_command_shows_pairs(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(f"{n}+1=", str(n + 1), str(n)) for n in range(20)]
    config = _write(tmp_path, tiny_model, rows, algorithm="dpo")
    assert _called([str(config)]) == 0
    out = capsys.readouterr().out
    assert "prompt of chosen (masked" not in out
    assert "masked, not trained" in out
    assert "Columns that rewards get: no reward is called" in out


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_the_command_shows_every_source_with_its_share(
    algorithm: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path, tiny_model, [row(f"{n}+1", f"{n}", "0") for n in range(1, 31)])
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps(row("9+9", "18", "9")) + "\n" + json.dumps(row("", "2", "1")) + "\n")
    weights = [{"path": f"{tmp_path}/row*.jsonl", "weight": 2}, {"path": str(few), "weight": 1}]
    changed = [f"algorithm={algorithm}", "data.path=null", f"data.train={json.dumps(weights)}"]
    assert _called([str(config), *changed, "rewards=null"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Source: 2 sources, 32 rows"
    assert (
        out[1] == f"  {tmp_path}/row*.jsonl: 30 rows, 30 used; weight 2, 21 of 31 an epoch (67.7 %)"
    )
    assert out[2] == f"  {few}: 2 rows, 1 used; weight 1, 10 of 31 an epoch (32.3 %)"
    assert "  train: 1 of 32 rows dropped: 1 empty" in out
    assert _called([str(config), *changed, f"data.train.0.path={tmp_path}/nothing*"]) == 2
    told = capsys.readouterr()
    assert (told.out, len(told.err.splitlines())) == ("", 1)
    assert "nothing*: matches no file here" in told.err


def test_a_wrong_column_is_one_line_and_exit_code_2(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path, tiny_model, [{"promt": "a"}], algorithm="grpo", rewards=["math"])
    assert _called([str(config)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert "no column 'prompt'" in told.err
