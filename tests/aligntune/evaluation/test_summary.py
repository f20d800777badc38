"""From rows to figures: what passes, what is left out, and what majorities count."""

from __future__ import annotations

from typing import Any

import pytest

from actors.specs import RewardFunctionSpec
from aligntune.errors import UserError
from aligntune.evaluation.answers import WHOLE_TEXT, reader_of, whole_text
from aligntune.evaluation.summary import Success, figures, judged, read_success, sizes

MATH = Success(criterion="math", at_least=1.0)


def said(math: float | None, text: str = "a", **more: Any) -> dict[str, Any]:
    scores = {"math": math, "length": 0.5}
    reward = None if math is None else math + 0.5
    told = {"text": text, "tokens": 4, "finish_reason": "stop", "scores": scores, "reward": reward}
    return {**told, **more}


def row(number: int, *completions: dict[str, Any]) -> dict[str, Any]:
    asked = {"row": number, "prompt": f"{number}?", "source": f"{number}?"}
    return judged({**asked, "completions": list(completions)}, MATH, whole_text)


def test_greedy_completions_are_single_trials_with_wilsons_interval() -> None:
    found = figures([row(n, said(float(n < 6))) for n in range(10)])
    assert found["pass@1"].value == 0.6
    assert found["pass@1"].interval == "wilson"
    assert found["reward"].value == pytest.approx(1.1)
    assert found["reward/math"].interval == "bootstrap"
    assert "maj@1" not in found


def test_of_several_completions_passes_are_estimated_and_majorities_counted() -> None:
    rows = [
        row(0, said(1.0, "x"), said(1.0, " x"), said(0.0, "y"), said(0.0, "z")),
        row(1, said(1.0, "x"), said(0.0, "y"), said(0.0, "y"), said(0.0, "z")),
    ]
    found = figures(rows)
    assert found["pass@1"].value == pytest.approx((0.5 + 0.25) / 2)
    assert found["pass@2"].value == pytest.approx((1 - 1 / 6 + 0.5) / 2)
    assert found["pass@4"].value == 1.0
    assert found["maj@4"].value == 0.5, "blanks do not divide the votes for x"


def test_the_answer_of_an_episode_is_what_the_model_says_last() -> None:
    raw = "<tool_call>add</tool_call><tool_response>5</tool_response>"
    talk = [
        {"role": "user", "content": "2+3"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "5"},
    ]
    answers = ("6", "5", " 5")
    completions = [
        said(float("5" in answer), f"{raw} call {n}: {answer}", messages=[*talk, last])
        for n, answer in enumerate(answers)
        for last in [{"role": "assistant", "content": answer}]
    ]
    judged_row = row(0, *completions)
    assert [c["answer"] for c in judged_row["completions"]] == ["6", "5", "5"]
    assert figures([judged_row])["maj@3"].value == 1.0
    lost = row(0, said(1.0, messages=None, text=None))  # type: ignore[arg-type]
    assert lost["completions"][0]["answer"] is None


def test_what_stands_in_thoughts_that_the_prompt_opens_is_no_answer() -> None:
    reader, _ = reader_of(RewardFunctionSpec(function="math"))
    told = {
        "row": 0,
        "prompt": "0?<think>\n",
        "completions": [said(0.0, "4, or"), said(1.0, "5</think>6")],
    }
    assert [c["answer"] for c in judged(told, MATH, reader)["completions"]] == ["", "6"]
    assert [c["text"] for c in judged(told, MATH, reader)["completions"]] == ["4, or", "5</think>6"]


def test_what_failed_or_has_no_score_enters_no_figure() -> None:
    failed = judged({"row": 9, "prompt": "9?", "failed": "timeout"}, MATH, whole_text)
    found = figures([row(0, said(1.0)), row(1, said(None)), failed])
    assert (found["pass@1"].value, found["pass@1"].prompts) == (1.0, 1)
    assert (found["reward"].value, found["reward/length"].prompts) == (1.5, 2)
    assert figures([failed]) == {}


def test_the_share_that_was_cut_and_the_length_are_told() -> None:
    found = figures([row(0, said(1.0, finish_reason="length", tokens=8)), row(1, said(0.0))])
    assert found["completions/truncated"].value == 0.5
    assert found["completions/tokens"].value == 6.0


def test_what_passes_may_be_chosen() -> None:
    names = ["math", "length"]
    assert read_success(None, names) == MATH
    assert read_success("0.5", names) == Success(criterion="math", at_least=0.5)
    assert read_success("length=0.25", names) == Success(criterion="length", at_least=0.25)
    assert read_success("reward>=2", names) == Success(criterion="reward", at_least=2.0)
    with pytest.raises(UserError, match="no criterion 'maths'; there are math, length, and reward"):
        read_success("maths=1", names)
    with pytest.raises(UserError, match="'x' is no number"):
        read_success("math=x", names)


def test_a_reward_that_is_called_reward_is_not_taken_for_the_weighted_sum() -> None:
    """A model that is right and long: 1 by `reward`, 0 by the sum of it and `length` at -1."""
    names = ["reward", "length"]
    assert str(read_success(None, names)) == "reward/reward >= 1"
    assert read_success("0.5", names).criterion == "reward/reward"
    assert read_success("reward/reward=1", names) == read_success(None, names)
    assert read_success("reward/length=1", names).criterion == "length"
    assert read_success("reward=1", names).criterion == "reward"
    with pytest.raises(UserError, match="there are reward/reward, length, and reward for"):
        read_success("rewards=1", names)
    completion = said(None) | {"scores": {"reward": 1.0, "length": 1.0}, "reward": 0.0}
    asked = {"row": 0, "prompt": "?", "completions": [completion]}
    found = figures([judged(asked, read_success(None, names), whole_text)])
    assert (found["reward"].value, found["reward/reward"].value) == (0.0, 1.0)
    assert found["pass@1"].value == 1.0


def test_k_goes_by_powers_of_two_up_to_all() -> None:
    assert [sizes(most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_majority_counts_what_the_reward_reads() -> None:
    reader, what = reader_of(RewardFunctionSpec(function="math"))
    assert what == "the answer that reward 'math' reads"
    same = [
        "2+2 is 4. #### 4",
        "So \\boxed{4}",
        "The answer is 4.",
        "<answer>4.0</answer>",
        "$x = 2$, then the answer: 8/2",
    ]
    assert [reader(text) for text in same] == ["4"] * 5
    assert reader("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert reader("#### 1, 3") == reader("#### 3, 1")
    assert reader("") == ""
    reader, what = reader_of(RewardFunctionSpec(function="length"))
    assert (reader(" a\n b "), what) == ("a b", WHOLE_TEXT)
