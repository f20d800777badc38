"""Preference pairs: three forms, whole transcripts, bad rows by their number, and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.models.loading import load_tokenizer
from actors.scoring.model import scored_ids
from actors.specs import ModelSpec
from aligntune.data.dropped import RowRules
from aligntune.data.errors import DataError
from aligntune.data.pair_tokens import tokenise_pairs
from aligntune.data.pairs import Pair, PairRows, split_transcripts, to_pair, turns
from aligntune.data.row_tokens import RowTokens
from tests.aligntune.data.conftest import byte_tokenizer

COLUMNS = {"prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected"}


class Table:
    """Rows in memory."""

    origin = "table"

    def __init__(self, *rows: dict[str, Any]) -> None:
        self._rows = rows
        self.columns = tuple(dict.fromkeys(name for row in rows for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict.fromkeys(self.columns) | self._rows[index]

    def where(self, index: int) -> str:
        return f"table, row {index}"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class TestForms:
    def test_strings_with_a_prompt_column(self) -> None:
        assert to_pair("p", "a", "b") == Pair("p", "a", "b")

    def test_messages_with_a_prompt_column_of_messages_or_text(self) -> None:
        expected = Pair([user("p")], [assistant("a")], [assistant("b")])
        assert to_pair([user("p")], [assistant("a")], [assistant("b")]) == expected
        assert to_pair("p", [assistant("a")], [assistant("b")]) == expected
        assert to_pair([user("p")], "a", "b") == expected

    def test_a_prompt_that_the_sides_repeat_is_taken_once(self) -> None:
        sides = [user("p"), assistant("a")], [user("p"), assistant("b")]
        expected = Pair([user("p")], [assistant("a")], [assistant("b")])
        for prompt in (None, "p", [user("p")]):
            assert to_pair(prompt, *sides) == expected

    @pytest.mark.parametrize("opener", ["user", "system"])
    def test_another_prompt_than_the_columns_is_none_of_the_pairs(self, opener: str) -> None:
        other = {"role": opener, "content": "B"}
        with pytest.raises(DataError, match=f"chosen opens with a {opener} message"):
            to_pair([user("A")], [other, assistant("x")], [assistant("y")])
        with pytest.raises(DataError, match=f"rejected opens with a {opener} message"):
            to_pair([user("A")], [assistant("x")], [other, assistant("y")])

    def test_a_prompt_that_one_side_alone_repeats_is_refused(self) -> None:
        with pytest.raises(DataError, match="one side repeats the prompt"):
            to_pair([user("A")], [user("A"), assistant("x")], [assistant("y")])
        start = "\n\nHuman: A\n\nAssistant:"
        with pytest.raises(DataError, match="one side repeats the prompt"):
            to_pair(start, start + " x", " y")

    def test_strings_that_repeat_the_prompt_have_it_once_where_most_rows_do(self) -> None:
        joined = [row(f"Q {i}:", f"Q {i}: a", f"Q {i}: b") for i in range(3)]
        pairs = PairRows(Table(*joined))
        assert pairs.pair(2) == Pair("Q 2:", " a", " b")
        assert pairs.repeating == 1
        with pytest.raises(DataError, match="most rows repeat the prompt"):
            PairRows(Table(*joined, row("p", "a", "b"))).pair(3)
        empty = row("Q 3:", "Q 3:", "Q 3: b")
        found = PairRows(Table(*joined, empty))
        assert [found.pair(index).prompt for index in range(3)] == ["Q 0:", "Q 1:", "Q 2:"]
        with pytest.raises(DataError, match="chosen is empty"):
            found.pair(3)

    def test_an_answer_may_begin_like_its_question(self) -> None:
        rows = row("Hello", "Hello! What is it?", "Hello."), row("p", "a", "b"), row("q", "a", "b")
        assert PairRows(Table(*rows)).pair(0) == Pair("Hello", "Hello! What is it?", "Hello.")

    def test_an_implicit_prompt_ends_where_the_messages_part_or_an_answer_begins(self) -> None:
        start = [user("p"), assistant("same")]
        pair = to_pair(
            None, [*start, user("q"), assistant("a")], [*start, user("q"), assistant("b")]
        )
        assert pair.prompt == [*start, user("q")]
        pair = to_pair(None, start, [*start, user("q"), assistant("b")])
        assert (pair.prompt, pair.chosen) == ([user("p")], [assistant("same")])

    def test_text_without_markers_is_split_at_a_word(self) -> None:
        assert to_pair(None, "The sky is blue.", "The sky is black.") == Pair(
            "The sky is", " blue.", " black."
        )

    def test_null_fields_of_messages_are_left_out(self) -> None:
        padded = [{**assistant("a"), "name": None}]
        assert to_pair("p", padded, [assistant("b")]).chosen == [assistant("a")]


word = st.text(st.sampled_from("ab é.\n:"), min_size=1, max_size=12).filter(str.strip)
openings = st.sampled_from(["\n\nHuman:", "Human:", "Be brief.\n\nHuman:", " \nHuman:"])
speakers = st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), word), max_size=5)


class TestTranscripts:
    def test_the_prompt_reaches_up_to_and_including_the_last_shared_assistant_marker(self) -> None:
        start = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
        pair = split_transcripts(start + " same start, four", start + " same start, five")
        assert pair.prompt == start
        assert pair.chosen == " same start, four"

    def test_completions_may_hold_more_turns(self) -> None:
        start = "\n\nHuman: one\n\nAssistant:"
        pair = split_transcripts(start + " a\n\nHuman: b\n\nAssistant: c", start + " d")
        assert pair.prompt == start
        messages = pair.as_messages()
        assert messages.prompt == [user("one")]
        assert messages.chosen == [assistant("a"), user("b"), assistant("c")]
        assert messages.rejected == [assistant("d")]

    @pytest.mark.slow
    @given(openings, speakers, st.booleans(), speakers, speakers)
    def test_joined_again_a_transcript_is_the_input(
        self, opening: str, shared: Any, opens: bool, one: Any, other: Any
    ) -> None:
        def text(said: Any) -> str:
            return "".join(f"\n\n{who}: {what}" for who, what in said)

        start = f"{opening} hi" + text([*shared, ("Human", "?")]) + "\n\nAssistant:"
        chosen, rejected = start + " x" + text(one), start + " y" * opens + text(other)
        assume(chosen != rejected and rejected[len(start) :].strip())
        pair = to_pair(None, chosen, rejected)
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)
        assert pair.prompt.endswith("\n\nAssistant:")
        assert chosen.startswith(pair.prompt)
        assert rejected.startswith(pair.prompt)
        messages = pair.as_messages()
        assert messages.prompt + messages.chosen == turns(chosen)
        assert messages.prompt + messages.rejected == turns(rejected)
        for blank in ("", " "):
            again = to_pair(pair.prompt + blank, pair.chosen, pair.rejected).as_messages()
            assert again == messages

    @pytest.mark.parametrize("opening", ["Human:", "Be nice.\n\nHuman:"])
    def test_answers_that_begin_alike_stay_whole_whatever_opens_the_transcript(
        self, opening: str
    ) -> None:
        start = f"{opening} hi\n\nAssistant:"
        pair = to_pair(None, f"{start} Yes I can", f"{start} Yes you may")
        assert (pair.prompt, pair.chosen, pair.rejected) == (start, " Yes I can", " Yes you may")
        assert pair.as_messages().prompt[-1] == user("hi")

    def test_transcripts_beside_a_prompt_column_have_its_question(self) -> None:
        sides = [f"\n\nHuman: hi\n\nAssistant: {answer}" for answer in "ab"]
        expected = Pair([user("hi")], [assistant("a")], [assistant("b")])
        assert to_pair("hi", *sides).as_messages() == expected
        assert to_pair("\n\nHuman: hi\n\nAssistant:", *sides).as_messages() == expected
        answers = [side.removeprefix("\n\nHuman: hi") for side in sides]
        assert to_pair("\n\nHuman: hi", *answers).as_messages() == expected
        with pytest.raises(DataError, match="is not what chosen and rejected begin with"):
            to_pair("bye", *sides)

    def test_what_stands_before_the_first_turn_is_the_systems(self) -> None:
        assert turns("Be brief.\n\nHuman: hi")[0] == {"role": "system", "content": "Be brief."}


BAD = {
    "chosen is missing": row("p", None, "b"),  # type: ignore[arg-type]
    "rejected is empty": row("p", "a", " "),
    "chosen is empty": {
        "prompt": None,
        "chosen": "\n\nHuman: a\n\nAssistant:",
        "rejected": "\n\nHuman: a\n\nAssistant: b",
    },
    "are equal": row("p", "a", "a"),
    "the prompt is empty": row(" ", "a", "b"),
    "one side is a string": {"prompt": "p", "chosen": "a", "rejected": [assistant("b")]},
    "is a int": {"prompt": "p", "chosen": 1, "rejected": "b"},
    "their prompts differ": {
        "prompt": None,
        "chosen": "\n\nHuman: a\n\nAssistant: x",
        "rejected": "\n\nHuman: b\n\nAssistant: y",
    },
    "no turn is before the Assistant's": {
        "prompt": None,
        "chosen": "\n\nAssistant: a",
        "rejected": "\n\nAssistant: b",
    },
    "begin with different messages": {
        "prompt": None,
        "chosen": [user("a"), assistant("x")],
        "rejected": [user("b"), assistant("x")],
    },
    "must be an object with a role": {
        "prompt": "p",
        "chosen": [{"role": "robot", "content": "x"}],
        "rejected": [assistant("y")],
    },
}


class TestBadRows:
    @pytest.mark.parametrize("reason", BAD)
    def test_each_is_named_by_its_row_or_dropped_and_counted(
        self, reason: str, tokenizer: Any
    ) -> None:
        rows = row("1", "2", "3"), BAD[reason], row("4", "5", "6")
        with pytest.raises(DataError, match=f"table, row 1: .*{reason}") as refused:
            tokens(tokenizer, "dpo", *rows)
        assert "\n" not in str(refused.value)
        kept = tokens(tokenizer, "dpo", *rows, bad_rows="drop")
        assert (len(kept), kept.dropped.count) == (2, 1)
        ((shown,),) = kept.dropped.examples.values()
        assert shown.startswith("table, row 1: ")
        assert reason in shown

    def test_several_are_counted_in_one_line(self, tokenizer: Any) -> None:
        rows = *(row("p", "a", "a") for _ in range(9)), row("p", "a", "b")
        with pytest.raises(DataError, match=r"row 0: .*rows 1, 2, 3, 4, \.\.\. too \(9 of 10\)"):
            tokens(tokenizer, "dpo", *rows)

    def test_prompts_alone_are_no_pairs(self) -> None:
        with pytest.raises(DataError, match="holds no preference pairs; its columns are prompt"):
            PairRows(Table({"prompt": "p", "answer": "1"}))

    def test_a_missing_column_is_met_with_the_nearest(self) -> None:
        with pytest.raises(DataError, match="did you mean 'reject'"):
            PairRows(Table({"prompt": "p", "chosen": "a", "reject": "b"}))
        with pytest.raises(DataError, match="did you mean 'question'"):
            PairRows(Table({"question": "p", **row("", "a", "b")}), prompt_column="questoin")

    def test_nothing_left_is_an_error(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match=r"1 of 1 rows .* \(1 equal\), none is left"):
            tokens(tokenizer, "dpo", row("p", "a", "a"), bad_rows="drop")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelSpec(name=str(tiny_model)))


def tokens(tokenizer: Any, kind: Any, *rows: dict[str, Any], **changes: Any) -> RowTokens:
    rules = RowRules(
        bad_rows=changes.pop("bad_rows", "error"),
        long_rows=changes.pop("long_rows", "error"),
        max_dropped_fraction=1.0,
        length_key="data.max_length",
    )
    options: dict[str, Any] = {"apply_chat_template": True, **changes}
    return tokenise_pairs(Table(*rows), tokenizer, kind, **COLUMNS, **options).within(40, rules)


def columns_of(tokenizer: Any, kind: Any, pair: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The columns of one row, each with its tokens."""
    columns = tokens(tokenizer, kind, pair, **changes).columns
    assert {ids[0].dtype for ids in columns.values()} == {np.dtype("int32")}  # 4 bytes a token
    return {name: ids[0].tolist() for name, ids in columns.items()}


class TestTokens:
    def test_dpo_pairs_are_the_chat_templates_rendering(self, tokenizer: Any) -> None:
        columns = columns_of(tokenizer, "dpo", row("1+1", "2", "31"))
        assert {name: tokenizer.decode(ids) for name, ids in columns.items()} == {
            "prompt_ids": "<|user|>1+1<|assistant|>",
            "chosen_ids": "2<|end|>",
            "rejected_ids": "31<|end|>",
        }

    def test_a_system_prompt_comes_first(self, tokenizer: Any) -> None:
        columns = columns_of(tokenizer, "dpo", row("1", "2", "3"), system_prompt="s")
        assert tokenizer.decode(columns["prompt_ids"]) == "<|system|>s<|user|>1<|assistant|>"

    def test_without_the_template_text_is_joined_and_ended(self, tokenizer: Any) -> None:
        columns = columns_of(tokenizer, "dpo", row("1+1=", "2", "31"), apply_chat_template=False)
        assert tokenizer.decode(columns["prompt_ids"] + columns["chosen_ids"]) == "1+1=2<|end|>"

    @pytest.mark.parametrize("kind", ["dpo", "reward_model"])
    def test_text_that_begins_a_sequence_itself_begins_it_once(self, kind: Any) -> None:
        pair = row("<bos>1+1=", "2", "31")
        columns = columns_of(byte_tokenizer(bos=True), kind, pair, apply_chat_template=False)
        whole = columns.get("prompt_ids", []) + columns["chosen_ids"]
        assert byte_tokenizer().decode(whole) == "<bos>1+1=2<eos>"

    @pytest.mark.slow
    def test_dpo_tokens_are_those_trl_makes_of_the_same_conversation(self, tokenizer: Any) -> None:
        from trl.data_utils import _tokenize

        columns = columns_of(tokenizer, "dpo", row("12+34", "46", "45"))
        asked = _tokenize(tokenizer, [user("12+34")], add_generation_prompt=True)["input_ids"]
        whole = _tokenize(tokenizer, [user("12+34"), assistant("46")])["input_ids"]
        assert columns["prompt_ids"] == asked
        assert columns["prompt_ids"] + columns["chosen_ids"] == whole

    @pytest.mark.parametrize("template", [True, False])
    def test_a_reward_model_is_trained_on_what_it_is_asked_about(
        self, tokenizer: Any, template: bool
    ) -> None:
        columns = columns_of(
            tokenizer, "reward_model", row("1+1", "2", "31"), apply_chat_template=template
        )
        asked = scored_ids(tokenizer, [("1+1", "2"), ("1+1", "31")], template)
        assert [columns["chosen_ids"], columns["rejected_ids"]] == asked

    def test_a_pair_over_the_limit_is_refused_dropped_or_kept_for_cutting(
        self, tokenizer: Any
    ) -> None:
        rows = row("1", "2", "3"), row("1", "2", "3" * 50)
        with pytest.raises(DataError, match="table, row 1: the pair has 54 tokens"):
            tokens(tokenizer, "dpo", *rows)
        dropped = tokens(tokenizer, "dpo", *rows, long_rows="drop")
        assert (len(dropped), dropped.longest) == (1, 54)
        assert dropped.dropped.reasons == {"too long": 1}
        assert len(tokens(tokenizer, "dpo", *rows, long_rows="keep_end")) == 2

    def test_a_prompt_that_leaves_no_room_is_a_bad_pair(self, tokenizer: Any) -> None:
        rows = row("1", "2", "3"), row("1" * 50, "2", "3")
        with pytest.raises(DataError, match="row 1: the prompt alone fills"):
            tokens(tokenizer, "dpo", *rows, long_rows="keep_start")

    def test_sides_that_are_the_same_tokens_are_a_bad_pair(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match="row 0: the tokenizer makes chosen and"):
            tokens(tokenizer, "dpo", row("1", "é", "è"))

    @pytest.mark.parametrize("policy", ["keep_start", "keep_end"])
    def test_sides_that_are_the_same_once_cut_are_a_bad_pair(
        self, tokenizer: Any, policy: str
    ) -> None:
        same, other = "2" * 60, "3" * 60
        ends = (same + "4", same + "5") if policy == "keep_start" else ("4" + same, "5" + same)
        rows = row("1", "2", "3"), row("1", *ends), row("1", same, other)
        with pytest.raises(DataError, match=r"row 1: cut to data\.max_length=40"):
            tokens(tokenizer, "dpo", *rows, long_rows=policy)
        kept = tokens(tokenizer, "dpo", *rows, long_rows=policy, bad_rows="drop")
        assert (len(kept), kept.dropped.reasons) == (2, {"equal": 1})

    @pytest.mark.parametrize("kind", ["dpo", "reward_model"])
    def test_a_row_that_the_chat_template_refuses_is_named_or_left_out(
        self, chat: Any, kind: str
    ) -> None:
        tool = {"role": "tool", "content": "4"}
        rows = row("1", "2", "3"), {"prompt": [user("2+2"), tool], "chosen": "4", "rejected": "5"}
        with pytest.raises(DataError, match=r"row 1: the chat template refuses .*no tools") as said:
            tokens(chat, kind, *rows)
        assert "\n" not in str(said.value)
        kept = tokens(chat, kind, *rows, bad_rows="drop")
        assert (len(kept), kept.dropped.reasons) == (1, {"unreadable": 1})
        with pytest.raises(DataError, match="none is left"):
            tokens(chat, kind, rows[1], bad_rows="drop")

    def test_a_row_with_a_system_message_of_its_own_is_named(self, tokenizer: Any) -> None:
        own = [{"role": "system", "content": "s"}, user("1")]
        rows = row("1", "2", "3"), {"prompt": own, "chosen": "2", "rejected": "3"}
        with pytest.raises(DataError, match="row 1: a prompt has a system message"):
            tokens(tokenizer, "dpo", *rows, system_prompt="s")
        assert len(tokens(tokenizer, "dpo", *rows, system_prompt="s", bad_rows="drop")) == 1
