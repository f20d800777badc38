"""The preference rewards on examples whose values are worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.rewards.preference import preference, preference_embedding, preference_overlap
from tests.e2e.page import byte_tokenizer

words = st.text("ab c.", max_size=12)
answers = words.filter(str.strip)


def one(function: Any, text: Any, chosen: Any, rejected: Any, **options: Any) -> float:
    (value,) = function([text], chosen=[chosen], rejected=[rejected], **options)
    return float(value)


class TestCharacters:
    def test_the_chosen_answer_itself(self) -> None:
        # Of "abc" in "abd": 2 of 3 characters, 1 of 2 pairs, 0 of 1 triple, both ways:
        # precision = recall = F = (2/3 + 1/2 + 0) / 3 = 7/18.
        assert one(preference, "abc", "abc", "abd") == pytest.approx(1 - 7 / 18)
        assert one(preference, "abd", "abc", "abd") == pytest.approx(7 / 18 - 1)

    def test_recall_counts_twice(self) -> None:
        # "ab" of "abcd": precision (2/2 + 1/1) / 2 = 1, recall (2/4 + 1/3) / 2 = 5/12, taken over
        # the orders that both have; F2 = 5PR / (4P + R) = (25/12) / (53/12) = 25/53.
        assert one(preference, "ab", "abcd", "x") == pytest.approx(25 / 53)

    def test_white_space_and_blanks_around_do_not_count(self) -> None:
        assert one(preference, " a  b c\n", "abc", "abd") == one(preference, "abc", "abc", "abd")

    def test_a_completion_like_neither_or_empty_has_none(self) -> None:
        assert one(preference, "xyz", "abc", "abd") == 0.0
        assert one(preference, "", "abc", "abd") == 0.0


class TestWords:
    def test_by_hand(self) -> None:
        # "The cat sat." has the, cat, sat and the full stop. Of the chosen answer's five words
        # (the, dog, sat, down, full stop) three are common: 2*3 / (4 + 5). Of the rejected one's
        # two (no, full stop) one is: 2*1 / (4 + 2).
        value = one(preference_overlap, "The cat sat.", "the dog sat down.", "No.")
        assert value == pytest.approx(6 / 9 - 2 / 6)

    def test_a_word_counts_as_often_as_both_have_it(self) -> None:
        assert one(preference_overlap, "a a a", "a a", "b") == pytest.approx(2 * 2 / 5)


@pytest.mark.parametrize("function", [preference, preference_overlap])
class TestBoth:
    @pytest.mark.slow
    @given(text=words, chosen=answers, rejected=answers)
    def test_within_one_and_changed_in_sign_where_the_answers_change_places(
        self, function: Any, text: str, chosen: str, rejected: str
    ) -> None:
        value = one(function, text, chosen, rejected)
        assert -1 <= value <= 1
        assert value == -one(function, text, rejected, chosen)

    def test_messages_are_read_as_their_text(self, function: Any) -> None:
        said = [{"role": "assistant", "content": "abc"}]
        assert one(function, said, said, "abd") == one(function, "abc", "abc", "abd")

    def test_each_completion_has_its_own_answers(self, function: Any) -> None:
        values = function(["a b", "a b"], chosen=["a b", "c"], rejected=["c", "a b"], answer=[1, 2])
        assert values == [1.0, -1.0]

    @pytest.mark.parametrize("text", ["<think>\na b", "c</think><think>a b", "<think>a b</think> "])
    def test_thoughts_are_near_to_nothing(self, function: Any, text: str) -> None:
        assert one(function, text, "a b", "c") == 0.0

    @pytest.mark.parametrize("text", ["<think>c c</think>\n\na b", "c c</think>a b"])
    def test_what_is_written_behind_them_counts_alone(self, function: Any, text: str) -> None:
        assert one(function, text, "a b", "c") == 1.0
        assert one(function, "a b", text, "<think>a b</think>c") == 1.0

    def test_data_without_answers_are_named(self, function: Any) -> None:
        with pytest.raises(ValueError, match="'chosen', which the data lack"):
            function(["a"], rejected=["b"])


class TestEmbedding:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        import torch
        from transformers import BertConfig, BertModel

        folder = tmp_path_factory.mktemp("encoder")
        tokenizer = byte_tokenizer(template=None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            BertModel(
                BertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=16,
                    max_position_embeddings=24,
                )
            ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def test_the_chosen_answer_is_nearest_to_itself_and_a_long_text_is_read_whole(
        self, model: Path
    ) -> None:
        assert one(preference_embedding, "abc", "abc", "xyz", model=str(model)) > 0
        assert one(preference_embedding, "xyz", "abc", "xyz", model=str(model)) < 0
        long = "a" * 50  # of a model with 24 positions
        assert one(preference_embedding, long + "b", long + "b", long, model=str(model)) > 0
        unfinished = "<think>abc"
        assert one(preference_embedding, unfinished, "abc", "xyz", model=str(model)) == 0.0

    def test_a_model_that_is_not_there_is_named_with_the_cure(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"could not be loaded .* give option 'model'"):
            one(preference_embedding, "a", "b", "c", model=str(tmp_path / "no"))
