"""The rewards that read a text alone or against a column: known values, and laws of them all."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.children.code import import_function
from aligntune.rewards.catalogue import REWARDS
from aligntune.rewards.format import tags
from aligntune.rewards.json_form import json_valid
from aligntune.rewards.language import language
from aligntune.rewards.length import length_penalty
from aligntune.rewards.ngrams import diversity, repetition
from aligntune.rewards.overlap import bleu, chrf, rouge, token_f1
from aligntune.rewards.phrases import forbidden, required
from aligntune.rewards.readability import readability


def one(function: Callable[..., list[float]], text: Any, **options: Any) -> float:
    return function([text], **options)[0]


class TestNgrams:
    def test_repetition_by_hand(self) -> None:
        # "a b c a b c": abc bca cab abc, of which 3 of 4 are different.
        assert one(repetition, "a b c, A B C".replace(",", "")) == -0.25
        assert one(repetition, "a a a a a") == pytest.approx(1 / 3 - 1)
        assert one(repetition, "a b") == 0.0
        assert one(repetition, "aaaa", n=1) == 0.0
        assert one(repetition, "aaaa", n=1, unit="characters") == -0.75

    def test_diversity_by_hand(self) -> None:
        # abc bcd, abc bce, and none.
        assert diversity(["a b c d", "a b c e", "x"]) == [0.5, 0.5, 0.0]
        assert diversity(["a b c"]) == [1.0]
        assert diversity(["a b c"] * 4) == [0.0] * 4


class TestReadability:
    @pytest.mark.slow
    def test_within_beyond_and_far_beyond(self) -> None:
        easy = "The cat sat on the mat. It was warm."  # 28 characters, 9 words, 2 sentences
        index = 4.71 * 28 / 9 + 0.5 * 9 / 2 - 21.43
        assert one(readability, easy, low=-10, high=0) == 1.0
        assert one(readability, easy, low=index + 2, high=20) == pytest.approx(1 - 2 / 5)
        assert one(readability, easy, low=index + 2, high=20, margin=4) == pytest.approx(0.5)
        assert one(readability, easy, low=10, high=20) == 0.0
        assert one(readability, easy, low=4.5, high=4.5, index="lix") == 1.0

    @pytest.mark.slow
    def test_a_text_without_words_is_not_readable(self) -> None:
        assert readability(["", "...", " \n"], low=-100, high=100) == [0.0] * 3

    def test_bounds_that_are_swapped_are_refused(self) -> None:
        with pytest.raises(ValueError, match="low 9 is above high 5"):
            one(readability, "a", low=9, high=5)


class TestLanguage:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("This is a plain English sentence, and nobody doubts it.", "en"),
            ("Das ist ein deutscher Satz, und niemand zweifelt daran.", "de"),
            ("Ceci est une phrase en français, personne n'en doute.", "fr"),
            ("你好今天天气很好我们去公园散步吧", "zh"),
        ],
    )
    def test_a_sentence_is_in_its_language_and_no_other(self, text: str, code: str) -> None:
        assert one(language, text, language=code) > 0.8
        for other in {"en", "de", "fr", "zh"} - {code}:
            assert one(language, text, language=other) < 0.1
        assert one(language, text, language=code, among=["en", "de", "fr", "zh"]) > 0.99

    @pytest.mark.slow
    def test_a_text_without_letters_is_in_none(self) -> None:
        assert language(["", "123", "😀"], language="en") == [0.0] * 3

    @pytest.mark.slow
    def test_codes_that_are_not_known_are_named(self) -> None:
        with pytest.raises(ValueError, match="'language' is 'english', which py3langid does not"):
            one(language, "a", language="english")
        with pytest.raises(ValueError, match="'among' has 'xx'"):
            one(language, "a", language="en", among=["en", "xx"])
        with pytest.raises(ValueError, match="'en' is not in among"):
            one(language, "a", language="en", among=["de", "fr"])


class TestPhrases:
    def test_shares_of_what_is_found(self) -> None:
        text = "Dear Sir, thank you."
        assert one(required, text, phrases=["Dear", "thank you", "bye", "dear"]) == 0.5
        assert one(required, text, phrases=["dear"], ignore_case=True) == 1.0
        assert one(forbidden, text, phrases=["Sir", "Madam"]) == -0.5
        assert str(one(forbidden, text, phrases=["Madam"])) == "0.0"

    def test_a_word_is_not_found_inside_another_one_unless_it_may(self) -> None:
        assert one(forbidden, "the class", phrases=["ass"]) == -1.0
        assert one(forbidden, "the class", phrases=["ass"], whole_words=True) == 0.0
        assert one(forbidden, "an ass!", phrases=["ass"], whole_words=True) == -1.0

    def test_signs_of_regular_expressions_mean_themselves(self) -> None:
        assert one(required, "1+1", phrases=["1+1"], whole_words=True) == 1.0
        assert one(required, "111", phrases=["1+1"]) == 0.0

    def test_each_row_has_its_own_from_a_column(self) -> None:
        assert required(["ab", "ab"], column="words", words=[["a", "c"], "b"]) == [0.5, 1.0]

    def test_what_cannot_be_meant_is_refused(self) -> None:
        with pytest.raises(ValueError, match="either phrases or column"):
            one(required, "a")
        with pytest.raises(ValueError, match="either phrases or column"):
            one(required, "a", phrases=["a"], column="b", b=["c"])
        with pytest.raises(ValueError, match="none of them empty"):
            one(required, "a", column="b", b=[[]])


class TestTags:
    @pytest.mark.parametrize(
        ("text", "whole", "partial"),
        [
            ("<think>a</think>\n<answer>b</answer>", 1.0, 1.0),
            (" <think></think><answer></answer>\n", 1.0, 1.0),
            ("well <think>a</think><answer>b</answer>", 0.0, 1.0),
            ("<think>a</think> so <answer>b</answer>", 0.0, 1.0),
            ("<think>a</think><answer>b</answer> done", 0.0, 1.0),
            ("<answer>b</answer><think>a</think>", 0.0, 1.0),
            ("<think>a</think><answer>b", 0.0, 0.75),
            ("<think>a</think><think>a</think><answer>b</answer>", 0.0, 0.5),
            ("</think><think><answer>b</answer>", 0.0, 1.0),
            ("", 0.0, 0.0),
        ],
    )
    def test_the_form_and_the_marks(self, text: str, whole: float, partial: float) -> None:
        assert one(tags, text, tags=["think", "answer"]) == whole
        assert one(tags, text, tags=["think", "answer"], partial=True) == partial

    @pytest.mark.parametrize("wrong", [["<think>"], ["a", "a"], ["a b"]])
    def test_what_is_no_tag_is_refused(self, wrong: list[str]) -> None:
        with pytest.raises(ValueError, match="give names as in"):
            one(tags, "", tags=wrong)


class TestJson:
    SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ('{"age": 3}', 1.0),
            ('{"age": "3"}', 0.0),
            ("{}", 0.0),
            ("[1]", 0.0),
            ('{"age": 3} and more', 0.0),
            ('Here:\n```json\n{"age": 3}\n```\nthat is it', 1.0),
            ('```\n{"age": 3}\n```\n```\n{"age": null}\n```', 0.0),
            ('{"age": NaN}', 0.0),
            ("", 0.0),
            ("[" * 100_000, 0.0),
            ("9" * 10_000, 0.0),
        ],
    )
    def test_what_meets_a_schema(self, text: str, value: float) -> None:
        assert one(json_valid, text, schema=self.SCHEMA) == value

    def test_without_a_schema_whatever_parses(self) -> None:
        assert json_valid(["3", "[]", '"a"', "a", "{a: 1}"]) == [1.0, 1.0, 1.0, 0.0, 0.0]
        assert one(json_valid, "```json\n3\n```", fenced=False) == 0.0

    def test_a_block_of_another_language_is_no_json(self) -> None:
        text = "```python\nprint(3)\n```\nSo:\n```json\n{}\n```\nDone."
        assert one(json_valid, text) == 1.0
        assert one(json_valid, "```json\n{}\n```\nor\n```text\n3 4\n```\nDone.") == 1.0
        assert one(json_valid, "```json\n{\n```\nIt prints\n```\n3\n```") == 0.0

    def test_each_row_may_have_its_own_as_text_too(self) -> None:
        schemas = [json.dumps(self.SCHEMA), {"type": "array"}]
        assert json_valid(['{"age": 1}', "{}"], column="form", form=schemas) == [1.0, 0.0]

    def test_a_schema_that_names_itself_is_followed_only_so_deep(self) -> None:
        nested = {"type": "array", "items": {"$ref": "#"}}
        assert one(json_valid, "[" * 3 + "]" * 3, schema=nested) == 1.0
        assert one(json_valid, "[" * 900 + "]" * 900, schema=nested) == 0.0

    def test_no_schema_is_fetched(self) -> None:
        with pytest.raises(Exception, match="Unresolvable"):
            one(json_valid, "3", schema={"$ref": "http://127.0.0.1:9/schema.json"})

    @pytest.mark.parametrize("wrong", [{"type": "no such type"}, {"properties": 3}])
    def test_what_is_no_schema_fails(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match="the JSON schema is none"):
            one(json_valid, "{}", schema=wrong)


class TestOverlap:
    def test_bleu_by_hand(self) -> None:
        # One word of six, which is in the answer: brevity exp(1 - 6/1), precision 1.
        assert one(bleu, "the", answer=["the cat sat on the mat"]) == pytest.approx(math.exp(-5))
        assert one(bleu, "the cat sat on the mat", answer=["the cat sat on the mat"]) == 1.0
        assert one(bleu, "", answer=["a"]) == 0.0
        assert one(bleu, "a b", answer=[["x", "a b"]]) == 1.0

    def test_chrf_by_hand(self) -> None:
        assert one(chrf, "abc", answer=["abd"]) == pytest.approx(7 / 18)
        assert one(chrf, "你好", answer=["你好"]) == 1.0

    def test_rouge_by_hand(self) -> None:
        # the cat | sat against the cat was sitting: 2 of 3 and 2 of 4.
        said, answer = "the cat sat", ["the cat was sitting"]
        assert one(rouge, said, answer=answer) == pytest.approx(4 / 7)
        assert one(rouge, said, answer=answer, measure="recall") == 0.5
        assert one(rouge, said, answer=answer, kind="rouge2") == pytest.approx(2 / 5)
        assert one(rouge, "sit", answer=["sitting"], stemmer=True) == 1.0
        assert one(rouge, "b a", answer=[["a b", "b a"]]) == 1.0

    def test_rouge_refuses_an_answer_that_it_cannot_see(self) -> None:
        with pytest.raises(ValueError, match="use the reward 'chrf'"):
            one(rouge, "你好", answer=["你好"])

    def test_token_f1_is_that_of_squad(self) -> None:
        assert one(token_f1, "The cat!", answer=["a cat sat"]) == pytest.approx(2 / 3)
        assert one(token_f1, "42.", answer=[42]) == 1.0
        assert one(token_f1, "the", answer=["a"]) == 1.0
        assert one(token_f1, "", answer=["cat"]) == 0.0
        assert one(token_f1, "b", answer=[["a", "b"]]) == 1.0

    @pytest.mark.parametrize("function", [bleu, chrf, rouge, token_f1])
    def test_a_row_without_an_answer_fails(self, function: Any) -> None:
        for wrong in ([], "  ", None):
            with pytest.raises(ValueError, match="column 'answer'"):
                one(function, "a", answer=[wrong])

    def test_an_answer_may_be_messages(self) -> None:
        said = [{"role": "assistant", "content": "abc"}]
        assert one(chrf, said, answer=[said]) == 1.0


def test_length_may_be_in_words() -> None:
    assert one(length_penalty, "one two three", target=3, unit="words") == 0.0
    assert one(length_penalty, "one two three", target=2, unit="words") == -0.5


OPTIONS: dict[str, dict[str, Any]] = {
    "format": {"pattern": "a+"},
    "length": {"target": 5},
    "tags": {"tags": ["a"]},
    "required": {"phrases": ["a", "b"]},
    "forbidden": {"phrases": ["a", "b"]},
    "readability": {"low": 3, "high": 9},
    "language": {"language": "en", "among": ["en", "de"]},
}
COLUMNS = {"answer": "a b 1", "chosen": "a b", "rejected": "b"}
SLOW = {"math", "code", "judge", "embedding", "bertscore", "preference_embedding"}  # each its own
TEXTS = st.lists(st.text(max_size=12) | st.text("ab <>/`{}1", max_size=20), min_size=1, max_size=4)
BOUNDS = {"0 or 1": {0.0, 1.0}, "0 to 1": (0, 1), "-1 to 0": (-1, 0), "-1 to 1": (-1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REWARDS.keys() - SLOW))
@given(texts=TEXTS)
@settings(max_examples=20)
def test_any_text_has_a_score_within_the_range_and_always_the_same(
    name: str, texts: list[str]
) -> None:
    function = import_function(REWARDS[name].target)
    columns = {key: [value] * len(texts) for key, value in COLUMNS.items()}
    call = {"completions": texts, **OPTIONS.get(name, {}), **columns}
    scores = function(**call)
    assert scores == function(**call)
    bounds = BOUNDS[REWARDS[name].range]
    for score in scores:
        assert isinstance(score, float)
        if isinstance(bounds, set):
            assert score in bounds
        else:
            assert bounds[0] <= score <= bounds[1]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert function(**{**call, "completions": messages}) == scores


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_reward_says_its_range_its_formula_and_its_source(name: str) -> None:
    text = inspect.getdoc(import_function(REWARDS[name].target)) or ""
    assert f"Range: {REWARDS[name].range}" in text
    for part in ("Formula: ", "Source: "):
        assert f"\n{part}" in text
