"""The registered rewards, the registry, and the argument and value rules of the child process."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.scoring.calling import arguments, checked
from actors.scoring.criteria import RewardFailed, RewardFailure
from actors.scoring.said import text_of
from actors.specs import RewardFunctionSpec
from aligntune.rewards.catalogue import REWARDS
from aligntune.rewards.format import format_match
from aligntune.rewards.length import length_penalty
from aligntune.rewards.limited import judged
from aligntune.rewards.math import answer_place, math_equal
from aligntune.rewards.registry import (
    check_columns,
    from_callable,
    resolve,
    resolve_all,
)
from aligntune.rewards.text import contains, exact_match
from aligntune.rewards.trial import Group, called


def score_math(completion: str, answer: Any) -> float:
    return math_equal([completion], answer=[answer])[0]


class TestMath:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("completion", "answer"),
        [
            ("42", "42"),
            ("7 + 8 = 15.", 15),
            ("so the answer is \\boxed{42}, not 41", "42"),
            ("it is \\boxed{\\frac{2}{4}}", "\\frac{1}{2}"),
            ("half, that is 0.5", "1/2"),
            ("1200", "1,200"),
            ("we get 3 and then\n#### 7", "she has 3+4=7\n#### 7"),
            ("#### 7\nQuestion: what is 8?", "7"),
            ("thus \\boxed{3\\sqrt{2}}", "3\\sqrt{2}"),
            ("$x = 2x+1$, so \\boxed{1+2x}", "2x+1"),
            ("-3", "-3"),
            ("first 1, then 2, at last 3", "3"),
            (r"\boxed{3,5,7}", "3,5,7"),
            (r"\boxed{7, 3, 5}", "3,5,7"),
            (r"\boxed{\{3,5,7\}}", "3,5,7"),
            ("we get 3,5,7", "3,5,7"),
            ("The answer is 3, 5, and 7.", "3,5,7"),
            (r"\boxed{-2,1}", "-2,1"),
            (r"\boxed{1,2}", "1,2"),
            (r"\boxed{0,1}", "0,1"),
            (r"$x = \boxed{1}$ or $\boxed{2}$", "1,2"),
            (r"\boxed{1,234}", "1234"),
            (r"\boxed{12\,345}", "12345"),
            ("1,234,567", "1234567"),
            ("In 2023, 5 of them", "5"),
            ("<think>first I had 5, so one more</think>\n<answer>6</answer>", "6"),
            ("I had 5, so one more</think>6", "6"),
            ("<answer>3, 5</answer>", "5,3"),
            (r"<answer>\boxed{6}</answer> (not 5)", "6"),
            ("<answer>5</answer> no: <answer>6</answer>", "6"),
            ("<answer>6", "6"),
            ("Answer:12", "12"),
            ("**Answer:**12", "12"),
            ("*12*", "12"),
            ("it is **12**", "12"),
            ("0.333333", "1/3"),
            ("50%", "50%"),
            ("It is 3. 500 people", "500"),
            ("(3+2)/3.", "5/3"),
            ("We get 7/3. So x = 5/3.", "5/3"),
            ("#### 5/3.", "5/3"),
            ("#### Step 1: count 2 sheep\nThe answer is 18.", "18"),
            ("#### **2. Add**\n\nThe answer is 18.", "18"),
            ("#### 2) Add\n3 more\nThe answer is 18.", "18"),
            ("#### 18\n#### Checked twice\nof 2 ways", "18"),
            ("#### Answer\n18", "18"),
            ("I had 5 answers.\n#### Total: 18", "18"),
            (r"The answer is \$12.", "12"),
            (r"\$5 and \$7 make -\$12.", "-12"),
            (r"#### \$12", "12"),
            ("The answer is `18`.", "18"),
            ("The answer is [18].", "18"),
            ("Answer:(18)", "18"),
            ('The answer is "18."', "18"),
            ("The answer is \u201c18\u201d.", "18"),
            ("so `5/3`.", "5/3"),
            ("It is 18 [1].", "18"),
            ("Answer: \u22125", "-5"),
            ("Answer: -5/3.", "\u22125/3"),
        ],
    )
    def test_an_equal_answer_scores_one(self, completion: str, answer: Any) -> None:
        assert score_math(completion, answer) == 1.0

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("completion", "answer"),
        [
            ("41", "42"),
            ("", "42"),
            ("\\boxed{}", "42"),
            ("I do not know", "42"),
            ("42 is wrong, it is \\boxed{41}", "42"),
            ("\\boxed{41} or \\boxed{42}", "42"),
            ("#### ", "42"),
            ("3", "3\\sqrt{2}"),
            ("-3", "3"),
            ("1", "2x+1"),
            ("first 3, then 2, at last 1", "3"),
            (r"\boxed{3.5}", "3,5,7"),
            (r"\boxed{3,5}", "3,5,7"),
            (r"\boxed{3,5,7,7}", "3,5,7"),
            ("3,5,7", "3.5"),
            ("Answer: 3,5,7", "3.5"),
            ("7", "3,5,7"),
            (r"\boxed{1,2}", "12"),
            ("<think>first I had 5, so one more</think>\n<answer>6</answer>", "5"),
            (r"<think>perhaps \boxed{5}</think> 6", "5"),
            ("<think>it is 5", "5"),
            (r"<answer>6</answer> or \boxed{5}", "5"),
            ("Answer:12", "1"),
            ("#### Step 1: count 2 sheep\nThe answer is 18.", "1"),
            ("#### 2. Add\nThe answer is 18.", "2"),
            ("x = 2*(3)", "3"),
        ],
    )
    def test_another_answer_scores_zero(self, completion: str, answer: Any) -> None:
        assert score_math(completion, answer) == 0.0

    @given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
    def test_integers_score_one_exactly_when_equal(self, left: int, right: int) -> None:
        assert score_math(f"The answer is {left}", str(right)) == float(left == right)

    @pytest.mark.slow
    @given(st.integers(-200, 200), st.integers(2, 60), st.sampled_from(["The answer is", "So x ="]))
    @settings(max_examples=30)
    def test_a_fraction_at_the_end_of_a_sentence_is_no_decimal(
        self, above: int, below: int, start: str
    ) -> None:
        answer = f"{above}/{below}"
        said = [f"{start} {answer}.", f"{start} {answer}. That is all."]
        assert math_equal(said, answer=[answer] * 2) == [1.0, 1.0]

    @pytest.mark.slow
    def test_an_expected_answer_that_cannot_be_read_is_an_error_not_a_zero(self) -> None:
        with pytest.raises(ValueError, match="'answer' holds ''"):
            score_math("42", "")

    @pytest.mark.slow
    def test_what_takes_too_long_scores_zero_and_costs_the_others_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aligntune.rewards.math.ANSWER_SECONDS", 0.5)
        slow, right = r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2x}"
        completions = [slow, right, slow, r"\boxed{(x+1)^{5000}}", right]
        assert math_equal(completions, answer=["x+x"] * 5) == [0.0, 1.0, 0.0, 0.0, 1.0]

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("before", ["", "Answer: "])
    @pytest.mark.parametrize("group", ["000,", "-1,", "1, ", "$1,000.5/3, and "])
    def test_a_long_list_that_ends_in_a_word_is_read_at_once(self, before: str, group: str) -> None:
        assert answer_place(f"{before}{group * 300}000x").endswith(("000x", "1}"))

    @pytest.mark.slow
    def test_an_expected_answer_that_takes_too_long_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aligntune.rewards.math.EXPECTED_SECONDS", 0.5)
        with pytest.raises(ValueError, match=r"9\^.*processor time"):
            score_math("x+1", "9^{9^{9^{9}}}")

    @pytest.mark.slow
    def test_time_that_is_not_spent_computing_does_not_count(self) -> None:
        def judge(made: int, item: float) -> bool:
            time.sleep(item)
            return True

        assert judged(lambda: 1, judge, [0.3, 0.0], 0.1, 0.1) == [True, True]

    @pytest.mark.slow
    def test_what_ends_the_process_that_judges_it_is_false_and_what_fails_there_is_an_error(
        self,
    ) -> None:
        def judge(made: int, item: str) -> bool:
            if item == "killed":
                os.kill(os.getpid(), signal.SIGTERM)
            return {"yes": True, "no": False}[item]

        assert judged(lambda: 1, judge, ["yes", "killed", "no", "yes"], 1, 1) == [
            True,
            False,
            False,
            True,
        ]
        with pytest.raises(RuntimeError, match="ended"):
            judged(lambda: 1, judge, ["what"], 1, 1)

    def test_rows_are_scored_against_their_own_answers(self) -> None:
        assert math_equal(["1", "2", "3"], answer=["1", "3", "3"]) == [1.0, 0.0, 1.0]


class TestText:
    def test_exact_match_ignores_white_space_around_and_nothing_else(self) -> None:
        completions = [" yes\n", "yes", "Yes", "yes.", ""]
        assert exact_match(completions, answer=["yes"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]

    def test_exact_match_can_ignore_case_and_read_another_column(self) -> None:
        assert exact_match(["YES"], column="gold", ignore_case=True, gold=["yes "]) == [1.0]

    def test_exact_match_compares_numbers_as_written(self) -> None:
        assert exact_match(["42", "42.0"], answer=[42, 42]) == [1.0, 0.0]

    def test_contains_finds_the_text_anywhere(self) -> None:
        assert contains(["a cat!", "A CAT", "dog"], answer=["cat"] * 3) == [1.0, 0.0, 0.0]
        assert contains(["A CAT"], ignore_case=True, answer=["cat"]) == [1.0]

    def test_contains_refuses_an_empty_answer_that_everything_contains(self) -> None:
        with pytest.raises(ValueError, match="empty in column 'answer'"):
            contains(["cat"], answer=["  "])

    @pytest.mark.parametrize("reward", [exact_match, contains, math_equal])
    def test_a_missing_column_is_named_with_those_that_exist(self, reward: Any) -> None:
        with pytest.raises(ValueError, match=r"column 'answer'.*\(columns: 'gold', 'level'\)"):
            reward(["a"], prompts=["p"], level=[1], gold=["a"])

    @pytest.mark.parametrize("reward", [exact_match, contains, math_equal])
    def test_a_row_without_a_value_is_an_error(self, reward: Any) -> None:
        with pytest.raises(ValueError, match="no value in column 'answer'"):
            reward(["None"], answer=[None])

    def test_messages_are_read_as_their_content(self) -> None:
        message = [{"role": "assistant", "content": "yes"}]
        assert exact_match([message], answer=["yes"]) == [1.0]
        assert text_of([*message, *message]) == "yesyes"

    def test_of_a_conversation_the_last_words_are_scored(self) -> None:
        call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
        told = {"role": "tool", "name": "add", "content": "3"}
        said = {"role": "assistant", "content": "5"}
        assert text_of([said, call, told, said]) == "5"
        assert text_of([said, call]) == "5"
        assert text_of([call, told]) == ""
        assert exact_match([[call, told, said]], answer=["5"]) == [1.0]


class TestFormat:
    def test_full_match_spans_lines_and_the_whole_completion(self) -> None:
        pattern = r"<think>.*</think>\s*\d+"
        completions = ["<think>a\nb</think>\n4\n", "well <think></think>4", "<think></think>4 ok"]
        assert format_match(completions, pattern=pattern) == [1.0, 0.0, 0.0]

    def test_search_matches_anywhere(self) -> None:
        assert format_match(["ab12c", "abc"], pattern=r"\d+", match="search") == [1.0, 0.0]

    def test_a_bad_pattern_or_mode_is_named(self) -> None:
        with pytest.raises(ValueError, match="'pattern', '\\(', is no regular expression"):
            format_match(["a"], pattern="(")
        with pytest.raises(ValueError, match="'match' is 'exact'"):
            format_match(["a"], pattern="a", match="exact")  # type: ignore[arg-type]


class TestLength:
    @pytest.mark.parametrize(
        ("length", "options", "expected"),
        [
            (10, {}, 0.0),
            (15, {}, -0.5),
            (5, {}, -0.5),
            (0, {}, -1.0),
            (20, {}, -1.0),
            (500, {}, -1.0),
            (5, {"side": "over"}, 0.0),
            (15, {"side": "over"}, -0.5),
            (15, {"side": "under"}, 0.0),
            (5, {"side": "under"}, -0.5),
            (13, {"tolerance": 3}, 0.0),
            (14, {"tolerance": 3}, -0.1),
        ],
    )
    def test_values_worked_by_hand(
        self, length: int, options: dict[str, Any], expected: float
    ) -> None:
        assert length_penalty(["x" * length], target=10, **options) == [pytest.approx(expected)]

    @pytest.mark.slow
    @given(st.integers(0, 300), st.integers(1, 100), st.integers(0, 20))
    def test_it_stays_in_range_and_falls_with_distance(
        self, length: int, target: int, tolerance: int
    ) -> None:
        here, further = length_penalty(
            ["x" * (target + length), "x" * (target + length + 1)],
            target=target,
            tolerance=tolerance,
        )
        assert -1.0 <= further <= here <= 0.0

    def test_impossible_options_are_named(self) -> None:
        with pytest.raises(ValueError, match="target 0 must be positive"):
            length_penalty(["a"], target=0)
        with pytest.raises(ValueError, match="'side' is 'left'"):
            length_penalty(["a"], target=1, side="left")  # type: ignore[arg-type]


def spec(function: str, **rest: Any) -> RewardFunctionSpec:
    return RewardFunctionSpec(function=function, **rest)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module into the current folder and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    written: list[str] = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


class TestRegistry:
    @pytest.mark.parametrize("name", sorted(REWARDS))
    def test_every_registered_name_resolves_and_is_described_in_one_line(self, name: str) -> None:
        model = {"model": "a/b"}
        needed: dict[str, dict[str, Any]] = {
            "format": {"pattern": "a"},
            "tags": {"tags": ["think"]},
            "length": {"target": 3},
            "readability": {"low": 5, "high": 9},
            "language": {"language": "en"},
            "judge": {**model, "url": "http://127.0.0.1:9/v1", "rubric": "r"},
            **dict.fromkeys(("embedding", "bertscore", "preference_embedding"), model),
        }
        options = needed.get(name, {})
        criterion = resolve(spec(name, options=options, timeout_s=70))
        assert (criterion.name, criterion.target) == (name, REWARDS[name].target)
        assert (criterion.options, criterion.timeout_s) == (options, 70)
        assert "\n" not in REWARDS[name].description

    @pytest.mark.slow
    def test_listing_rewards_loads_neither_torch_nor_a_reward(self) -> None:
        code = (
            "import sys, aligntune.rewards.registry; heavy = {'torch', 'ray', 'math_verify'}; "
            "print(sorted(heavy & sys.modules.keys()))"
        )
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == "[]"

    def test_an_unknown_name_offers_the_nearest(self) -> None:
        with pytest.raises(ValueError, match="unknown reward 'exact_mach': did you mean 'exact_ma"):
            resolve(spec("exact_mach"))

    @pytest.mark.parametrize("named", ["org/rm", "models/rm", "folder"])
    def test_a_reward_model_that_is_given_as_a_function_is_told_how_it_is_given(
        self, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path)
        said = (
            rf"unknown reward '{named}': a reward model is given as \{{model: NAME\}}, by --reward-"
        )
        with pytest.raises(ValueError, match=said):
            resolve(spec(named))

    def test_a_function_in_the_current_folder_is_found(self, module: Any) -> None:
        module("my_rewards", "def ones(completions, **kw): return [1.0] * len(completions)")
        criterion = resolve(spec("my_rewards:ones"))
        assert criterion.name == "ones"
        assert criterion.search_path[-1] == os.getcwd()
        assert os.getcwd() not in sys.path

    def test_a_function_is_named_by_its_file_too(self, module: Any, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        module("mine/filed_rewards", "def ones(completions, gold): return [1.0] * len(completions)")
        for file in ("mine/filed_rewards.py", str(tmp_path / "mine" / "filed_rewards.py")):
            criterion = resolve(spec(f"{file}:ones"))
            assert (criterion.name, criterion.target) == ("ones", "filed_rewards:ones")
            assert criterion.search_path[0] == str(tmp_path / "mine")
            with pytest.raises(ValueError, match="needs column 'gold'"):
                check_columns(criterion, [])
        with pytest.raises(ValueError, match=r"has no 'one' \(did you mean 'ones'"):
            resolve(spec("mine/filed_rewards.py:one"))
        sys.modules.pop("filed_rewards")

    def test_a_file_below_the_current_folder_is_found_where_a_node_has_that_folder(
        self, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "head" / "mine").mkdir(parents=True)
        module("head/mine/noded_rewards", "def ones(completions): return [1.0] * len(completions)")
        monkeypatch.chdir(tmp_path / "head")
        criterion = resolve(spec("mine/noded_rewards.py:ones"))
        (tmp_path / "head").rename(tmp_path / "node")
        monkeypatch.chdir(tmp_path / "node")  # as a job's actor starts there
        group = Group("p", ("a", "b"), {})
        assert asyncio.run(called(criterion, [group])) == [[1.0, 1.0]]
        sys.modules.pop("noded_rewards")

    def test_a_file_that_cannot_be_imported_by_its_name_is_refused(
        self, module: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"there is no file .*absent\.py"):
            resolve(spec("absent.py:f"))
        for name, reason in (("a-b", "no name of a module"), ("math", "another module")):
            (tmp_path / f"{name}.py").write_text("def f(completions): ...")
            with pytest.raises(ValueError, match=reason):
                resolve(spec(f"{name}.py:f"))

    def test_a_missing_module_says_where_it_looked(
        self, module: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "my_reward", raising=False)  # of another test
        module("my_rewards", "")
        with pytest.raises(
            ValueError, match=r"no module 'my_reward' \(did you mean 'my_rewards"
        ) as e:
            resolve(spec("my_reward:ones"))
        assert os.getcwd() in str(e.value)

    def test_a_missing_function_offers_the_nearest(self, module: Any) -> None:
        module("my_rewards", "def ones(completions): ...")
        with pytest.raises(ValueError, match=r"my_rewards.py has no 'one' \(did you mean 'ones'"):
            resolve(spec("my_rewards:one"))

    @pytest.mark.parametrize(
        "source", ["1 / 0", "import no_such_dependency", "raise SystemExit(3)"]
    )
    def test_an_error_inside_the_module_is_told_from_a_missing_module(
        self, module: Any, source: str
    ) -> None:
        module("broken_rewards", f"x = 1\n{source}\n")
        with pytest.raises(
            ValueError, match=r"(?s)importing module 'broken_rewards' failed.*line 2"
        ):
            resolve(spec("broken_rewards:f"))

    @pytest.mark.parametrize("target", ["os:", ":f"])
    def test_half_a_path_is_refused(self, target: str) -> None:
        with pytest.raises(ValueError, match="not of the form"):
            resolve(spec(target))

    def test_what_cannot_be_called_is_refused(self) -> None:
        with pytest.raises(ValueError, match="is a str, not a function"):
            resolve(spec("os:sep"))

    def test_an_option_the_function_would_ignore_is_refused(self, module: Any) -> None:
        with pytest.raises(ValueError, match="no option 'colum'; did you mean 'column'"):
            resolve(spec("math", options={"colum": "gold"}))
        module("my_rewards", "def f(completions, scale=1): ...\ndef g(completions, **kw): ...")
        with pytest.raises(ValueError, match="no option 'scales'; did you mean 'scale'"):
            resolve(spec("my_rewards:f", options={"scales": 2}))
        assert resolve(spec("my_rewards:g", options={"scales": 2})).options == {"scales": 2}

    def test_a_required_option_is_asked_for(self) -> None:
        with pytest.raises(ValueError, match="'format' needs option 'pattern'"):
            resolve(spec("format"))

    def test_two_criteria_of_one_name_are_refused(self) -> None:
        with pytest.raises(ValueError, match="2 rewards are named 'math'"):
            resolve_all([spec("math"), spec("math", options={"column": "gold"})])
        named = resolve_all([spec("math"), spec("math", name="gold")])
        assert [criterion.name for criterion in named] == ["math", "gold"]

    def test_a_column_may_be_a_field_of_objects(self) -> None:
        criterion = resolve(spec("exact_match", options={"column": "reward_model.gold.text"}))
        check_columns(criterion, ["reward_model"])
        with pytest.raises(ValueError, match=r"needs column 'reward_model\.gold\.text'"):
            check_columns(criterion, ["other"])
        held = [{"gold": {"text": "5"}, "style": "rule"}]
        column = "reward_model.gold.text"
        assert exact_match(["5"], column=column, reward_model=held) == [1.0]
        assert exact_match(["5"], column=column, **{column: ["6"], "reward_model": held}) == [0.0]
        for broken in [{"gold": None}], [{"gold": "5"}], [None], [{}]:
            with pytest.raises(ValueError, match=r"no value in column 'reward_model\.gold\.text'"):
                exact_match(["5"], column=column, reward_model=broken)

    def test_a_missing_column_is_found_before_the_run(self, module: Any) -> None:
        check_columns(resolve(spec("math")), ["answer"])
        check_columns(resolve(spec("length", options={"target": 3})), [])
        with pytest.raises(ValueError, match=r"'math' needs column 'gold'.* are 'answer', 'level'"):
            check_columns(resolve(spec("math", options={"column": "gold"})), ["level", "answer"])
        module("my_rewards", "def f(completions, gold, scale, prompts=None, **kw): ...")
        criterion = resolve(spec("my_rewards:f", options={"scale": 2}))
        check_columns(criterion, ["gold"])
        with pytest.raises(ValueError, match="'f' needs column 'gold'"):
            check_columns(criterion, [])

    def test_a_column_that_clashes_with_every_reward_is_found_before_the_run(self) -> None:
        with pytest.raises(ValueError, match=r"column 'completions'.*rename the column"):
            check_columns(resolve(spec("math")), ["answer", "completions"])

    def test_a_registered_reward_cannot_be_told_to_read_its_own_option(self) -> None:
        criterion = resolve(spec("contains", options={"column": "ignore_case"}))
        with pytest.raises(ValueError, match="'ignore_case', which is the name of one of its"):
            check_columns(criterion, ["ignore_case"])

    def test_a_closure_travels_by_value(self) -> None:
        offset = 3.0
        criterion = from_callable(
            lambda completions: [offset for _ in completions], spec("python", name="offset")
        )
        assert isinstance(criterion.target, bytes)
        assert pickle.loads(criterion.target)(completions=["a"]) == [3.0]


class TestArguments:
    def test_plain_prompts_give_plain_completions_and_columns_are_repeated(self) -> None:
        got = arguments(lambda **kw: None, "p", ["a", "b"], {"answer": "x"}, {"scale": 2})
        assert got == {
            "prompts": ["p", "p"],
            "completions": ["a", "b"],
            "answer": ["x", "x"],
            "scale": 2,
        }

    def test_message_prompts_give_message_completions_each_its_own(self) -> None:
        source = [{"role": "user", "content": "hi"}]
        got = arguments(lambda prompts, completions: None, source, ["a", "b"], {}, {})
        assert got["completions"] == [
            [{"role": "assistant", "content": "a"}],
            [{"role": "assistant", "content": "b"}],
        ]
        got["prompts"][0].append("changed")
        assert got["prompts"][1] == source == [{"role": "user", "content": "hi"}]

    def test_a_function_without_kwargs_gets_what_it_names(self) -> None:
        def reward(completions: Any, level: Any, scale: int = 1) -> None: ...

        got = arguments(reward, "p", ["a"], {"level": 3, "answer": "x"}, {})
        assert got == {"completions": ["a"], "level": [3]}

    def test_a_name_nobody_gives_is_reported_with_the_columns(self) -> None:
        with pytest.raises(ValueError, match=r"needs 'gold'.* columns are 'answer'"):
            arguments(lambda completions, gold: None, "p", ["a"], {"answer": "x"}, {})

    @pytest.mark.parametrize(
        ("columns", "options"),
        [({"completions": 1}, {}), ({}, {"prompts": 1})],
    )
    def test_a_name_with_two_meanings_is_refused(self, columns: Any, options: Any) -> None:
        with pytest.raises(ValueError, match="rename it"):
            arguments(lambda **kw: None, "p", ["a"], columns, options)

    def test_an_option_stands_before_a_data_column_of_its_name(self) -> None:
        got = arguments(lambda completions, scale: None, "p", ["a"], {"scale": 1}, {"scale": 2})
        assert got["scale"] == 2


class TestChecked:
    @pytest.mark.parametrize(
        "values",
        [
            [1, 0.5],
            (True, Fraction(1, 2)),
            np.array([1, 0.5], dtype=np.float32),
            torch.tensor([1.0, 0.5]),
            [np.float64(1), torch.tensor(0.5)],
        ],
    )
    def test_numbers_of_any_kind_become_floats(self, values: Any) -> None:
        assert checked("c", values, 2) == [1.0, 0.5]

    def test_none_abstains(self) -> None:
        assert checked("c", [None, 0.5], 2) == [None, 0.5]

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ([1.0], RewardFailure.WRONG_COUNT),
            ([1.0, 2.0, 3.0], RewardFailure.WRONG_COUNT),
            (1.0, RewardFailure.WRONG_COUNT),
            (None, RewardFailure.WRONG_COUNT),
            ("ab", RewardFailure.WRONG_COUNT),
            ({1: 1, 2: 2}, RewardFailure.WRONG_COUNT),
            ({1.0, 2.0}, RewardFailure.WRONG_COUNT),
            (np.array(1.0), RewardFailure.WRONG_COUNT),
            ([1.0, "2"], RewardFailure.NOT_A_NUMBER),
            ([1.0, 2j], RewardFailure.NOT_A_NUMBER),
            (torch.zeros(2, 2), RewardFailure.NOT_A_NUMBER),
            ([1.0, float("nan")], RewardFailure.NOT_FINITE),
            ([1.0, -float("inf")], RewardFailure.NOT_FINITE),
            ([1.0, 10**400], RewardFailure.NOT_FINITE),
            (np.array([0.0, np.nan]), RewardFailure.NOT_FINITE),
        ],
    )
    def test_anything_else_is_a_failure_with_its_reason(
        self, values: Any, reason: RewardFailure
    ) -> None:
        with pytest.raises(RewardFailed) as failure:
            checked("c", values, 2)
        assert failure.value.reason is reason

    def test_a_failure_survives_pickling(self) -> None:
        failure = RewardFailed("c", RewardFailure.TIMEOUT, "no answer within 1 s")
        again = pickle.loads(pickle.dumps(failure))
        assert (again.criterion, again.reason, again.detail) == (
            "c",
            failure.reason,
            failure.detail,
        )
        assert str(again) == str(failure)
