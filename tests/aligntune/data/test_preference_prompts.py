"""Preference data as prompts: what the sides share is asked, the answers are columns."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from actors.scoring.model import ModelScorer, RewardModelCriterion, scored_ids
from actors.specs import ModelSpec
from aligntune.commands import rewards_shown
from aligntune.data.dropped import RowRules
from aligntune.data.errors import DataError
from aligntune.data.pair_tokens import tokenise_pairs
from aligntune.data.pairs import to_pair
from aligntune.data.prompt_rows import PromptRows
from aligntune.data.prompts import PromptSource
from tests.aligntune.data.conftest import byte_tokenizer
from tests.aligntune.data.test_preference import COLUMNS, Table, assistant, row, user

RULES = RowRules("error", "error", 1.0, "rollout.max_prompt_length")
PLAIN = byte_tokenizer()
START = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"


def prompts(*rows: dict[str, Any], tokenizer: Any = PLAIN, **options: Any) -> PromptRows:
    return PromptRows(Table(*rows), tokenizer, **options)


def transcript(chosen: str, rejected: str, start: str = START) -> dict[str, str]:
    return {"chosen": start + chosen, "rejected": start + rejected}


class TestAsked:
    def test_a_transcript_is_asked_as_messages_where_there_is_a_template(self, chat: Any) -> None:
        read = prompts(transcript(" yes", " no"), tokenizer=chat)
        source, text, columns = read.prompt(0)
        assert source == [user("one"), assistant("two"), user("three")]
        assert text == "<user>one</user><assistant>two</assistant><user>three</user><assistant>"
        assert columns == {"chosen": "yes", "rejected": "no"}
        assert read.pairs

    def test_without_one_it_is_the_text_up_to_the_answer(self) -> None:
        source, text, _ = prompts(transcript(" yes", " no")).prompt(0)
        assert source == text == START

    def test_messages_and_prompt_columns_are_read_as_dpo_reads_them(self, chat: Any) -> None:
        rows = (
            {
                "prompt": None,
                "chosen": [user("p"), assistant("a")],
                "rejected": [user("p"), assistant("b")],
            },
            {"prompt": "q", "chosen": "a", "rejected": "b"},
        )
        read = prompts(*rows, tokenizer=chat)
        for index, asked in enumerate(("p", "q")):
            source, text, columns = read.prompt(index)
            assert text == f"<user>{asked}</user><assistant>"
            pair = to_pair(rows[index]["prompt"], rows[index]["chosen"], rows[index]["rejected"])
            assert source == pair.prompt
            assert columns == {"chosen": pair.chosen, "rejected": pair.rejected}

    def test_other_columns_stay_and_other_names_are_settings(self) -> None:
        rows = {"better": "a", "worse": "b", "question": "q", "answer": 7}
        read = prompts(
            rows, prompt_column="question", chosen_column="better", rejected_column="worse"
        )
        assert read.prompt(0) == ("q", "q", {"answer": 7, "chosen": "a", "rejected": "b"})

    def test_one_of_the_two_columns_alone_makes_no_pair(self) -> None:
        read = prompts({"prompt": "p", "chosen": "a"})
        assert not read.pairs
        assert read.prompt(0) == ("p", "p", {"chosen": "a"})
        with pytest.raises(DataError, match=r"no column 'prompt' \(data.prompt_column\)"):
            prompts({"chosen": "a"})

    def test_a_prompt_column_that_is_named_and_missing_is_told(self) -> None:
        with pytest.raises(DataError, match="no column 'question'"):
            prompts(row("p", "a", "b"), prompt_column="question")

    @pytest.mark.parametrize("sees", [True, False], ids=["policy with a template", "without"])
    @pytest.mark.parametrize("reads", [True, False], ids=["scorer with a template", "without"])
    def test_a_reward_model_is_asked_about_a_transcript_as_it_was_trained_on_it(
        self, chat: Any, sees: bool, reads: bool
    ) -> None:
        rows = Table(transcript(" yes", " no"))
        policy, tokenizer = (chat if template else PLAIN for template in (sees, reads))
        (trained,) = tokenise_pairs(
            rows, tokenizer, "reward_model", apply_chat_template=True, **COLUMNS
        ).sides.values()
        read = PromptRows(rows, policy)
        (prompt,) = PromptSource(read, policy, RULES, max_prompt_length=99, seed=0).epoch()
        said = "yes" if sees else " yes"  # a template begins the answer
        (group,) = rewards_shown._groups(rows, "chosen", ())
        tried = replace(prompt, source=group.prompt, transcript=group.transcript)
        scorer = ModelScorer(RewardModelCriterion("rm", ModelSpec(name="m"), 1, 1.0))
        scorer._tokenizer = tokenizer
        for asked, answer in ((prompt, said), (tried, *group.completions)):
            pairs = scorer._pairs(pickle.loads(pickle.dumps(asked)), [answer], None)
            (ids,) = scored_ids(tokenizer, pairs, True)
            assert ids == trained["chosen_ids"].tolist()


class TestLineEnds:
    @pytest.mark.parametrize(
        "written",
        [
            lambda text: text.replace("\n", "\r\n"),
            lambda text: text.replace("\n", "\r"),
            lambda text: text.replace("\n\n", "\n"),
            lambda text: text.replace("\n\n", "\r\n"),
            lambda text: text.strip().replace("\n\n", "\n"),
            lambda text: "Be kind.\n" + text.strip().replace("\n\n", "\n"),
        ],
    )
    def test_a_transcript_is_read_alike_whatever_they_are(self, written: Any, chat: Any) -> None:
        plain = transcript(" yes,\nand", " no")
        other = {side: written(text) for side, text in plain.items()}
        expected, found = (prompts(rows, tokenizer=chat).prompt(0) for rows in (plain, other))
        said = [message for message in found[0] if message["role"] != "system"]  # type: ignore[index]
        assert said == expected[0]
        assert found[2] == expected[2] == {"chosen": "yes,\nand", "rejected": "no"}

    def test_a_line_of_an_answer_that_looks_like_a_turn_stays_in_it(self) -> None:
        answer = " a play:\nHuman: hi\nAssistant: ho"
        assert to_pair(None, START + answer, START + " no").chosen == answer

    def test_text_that_is_no_transcript_keeps_its_line_ends(self) -> None:
        assert to_pair("p\r\nq", "a\r\nb", "c").chosen == "a\r\nb"
        assert to_pair("p", "say\nHuman: a", "c").chosen == "say\nHuman: a"


class TestRows:
    def test_each_row_is_measured_or_wrong_with_a_reason(self) -> None:
        read = prompts(
            transcript(" yes", " no"),
            transcript(" same", " same"),
            transcript(" yes", " "),
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        )
        assert (list(read.usable), list(read.lengths)) == ([0], [len(START)])
        assert {row: why.reason.value for row, why in read.wrong.items()} == {
            1: "equal",
            2: "empty",
            3: "unreadable",
        }

    def test_rows_of_one_prompt_fold_into_the_first_where_asked(self) -> None:
        other = "\n\nHuman: else\n\nAssistant:"
        rows = transcript(" a", " b"), transcript(" c", " d"), transcript(" e", " f", other)
        assert len(prompts(*rows).usable) == 3
        folded = prompts(*rows, fold_duplicates=True)
        assert list(folded.usable) == [0, 2]
        assert folded.folded == 1
        assert folded.prompt(0)[2] == {"chosen": "a", "rejected": "b"}

    def test_the_fingerprint_knows_the_answers(self) -> None:
        marks = {prompts(transcript(" a", side)).fingerprint for side in (" b", " c", " b", " d")}
        assert len(marks) == 3
