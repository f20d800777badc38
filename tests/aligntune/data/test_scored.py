"""Pairs from scored texts: what is preferred, what is a tie, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle

from actors.specs import RewardFunctionSpec
from aligntune.config.load import load_config
from aligntune.config.preference import PreferenceConfig
from aligntune.data.dropped import RowRules
from aligntune.data.errors import DataError
from aligntune.data.scored_pairs import ScoredPairs, rank, scored_pairs
from aligntune.data.sources import load_rows
from aligntune.errors import UserError
from aligntune.preference.trainer import PreferenceTrainer
from aligntune.rewards.registry import resolve_all
from aligntune.trainers import create_rl_trainer

TEXTS = [
    {"prompt": "1+1", "completion": "2", "answer": "2"},
    {"prompt": "1+2", "completion": "4", "answer": "3"},
    {"prompt": "1+1", "completion": "3", "answer": "2"},
    {"prompt": "1+1", "completion": "4", "answer": "2"},
    {"prompt": "1+2", "completion": "3", "answer": "3"},
    {"prompt": "2+2", "completion": "4", "answer": "4"},
]


def pairs_of(
    rows: list[dict[str, Any]],
    folder: Path,
    bad_rows: Any = "error",
    function: str = "exact_match",
) -> ScoredPairs:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    specs = [
        RewardFunctionSpec(function=function),
        RewardFunctionSpec(function="length", weight=0.0, options={"target": 1}),
    ]
    return scored_pairs(
        load_rows(str(path)),
        resolve_all(specs),  # type: ignore[arg-type]  # functions alone
        [spec.weight for spec in specs],
        RowRules(bad_rows, "error", max_dropped_fraction=1.0, length_key="data.max_length"),
        prompt_column="prompt",
        completion_column="completion",
    )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=12))
@settings(deadline=None, max_examples=50)
def test_every_two_texts_of_a_prompt_are_a_pair_or_a_tie(rows: list[tuple[str, int]]) -> None:
    prompts, scores = [p for p, _ in rows], [float(s) for _, s in rows]
    ranked = rank(prompts, scores)
    for better, worse in ranked.pairs:
        assert prompts[better] == prompts[worse]
        assert scores[better] > scores[worse]
    assert len(set(map(frozenset, ranked.pairs))) == len(ranked.pairs)
    of_each = [prompts.count(prompt) for prompt in set(prompts)]
    assert len(ranked.pairs) + ranked.ties == sum(n * (n - 1) // 2 for n in of_each)


@pytest.mark.slow
def test_the_higher_score_is_chosen_and_ties_are_counted(tmp_path: Path) -> None:
    pairs = pairs_of(TEXTS, tmp_path)
    found = {(p["prompt"], p["chosen"], p["rejected"]) for p in (pairs[i] for i in range(3))}
    assert found == {("1+1", "2", "3"), ("1+1", "2", "4"), ("1+2", "3", "4")}
    assert (len(pairs), pairs.ties) == (3, 1)
    assert "row 4 (line 5) over" in pairs.where(2)
    assert "make 3 pairs; 1 ties left out" in pairs.describe()


@pytest.mark.slow
def test_a_text_without_a_score_is_reported_with_its_row(tmp_path: Path) -> None:
    broken = [*TEXTS, {"prompt": "1+1", "completion": " ", "answer": "2"}]
    with pytest.raises(DataError, match=r"row 6 \(line 7\): completion is empty"):
        pairs_of(broken, tmp_path)
    assert pairs_of(broken, tmp_path, "drop").dropped.reasons == {"empty": 1}
    unscored = [*TEXTS, {"prompt": "1+1", "completion": "2", "answer": None}]
    with pytest.raises(DataError, match=r"row 6 \(line 7\): reward 'exact_match' failed"):
        pairs_of(unscored, tmp_path)


@pytest.mark.slow
def test_a_text_that_only_a_reward_of_weight_0_scores_is_in_no_pair(tmp_path: Path) -> None:
    unscored = [*TEXTS, {"prompt": "1+1", "completion": "5", "answer": None}]
    pairs = pairs_of(unscored, tmp_path, "drop", "tests.e2e.rewards:of_answered")
    assert (len(pairs), pairs.ties) == (3, 1)
    assert pairs.dropped.count == 1


@pytest.mark.slow
def test_texts_that_no_reward_tells_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing is preferred to anything.*several completions"):
        pairs_of(TEXTS[:1] + TEXTS[5:], tmp_path)


@pytest.mark.slow
def test_a_reward_model_config_may_name_texts_and_rewards(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS), encoding="utf-8")
    trainer = create_rl_trainer(
        model_name=str(tiny_model),
        dataset_name=str(path),
        algorithm="reward_model",
        reward_functions=["exact_match"],
        output_dir=str(tmp_path / "run"),
    )
    assert isinstance(trainer, PreferenceTrainer)
    assert len(trainer.pairs) == 3
    assert "scored texts: 6" in trainer.summary()

    def longer(completions: list[str], **columns: Any) -> list[float]:
        return [-float(completion) for completion in completions]

    own = create_rl_trainer(
        model_name=str(tiny_model),
        dataset_name=str(path),
        algorithm="reward_model",
        reward_functions=[longer],
    )
    assert isinstance(own, PreferenceTrainer)
    assert len(own.pairs) == 4
    path.write_text('{"prompt": "a", "completion": "b", "sum": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"needs column 'answer'.* their columns are 'sum'"):
        create_rl_trainer(config=trainer.config.model_dump(mode="json")).check()


def test_two_functions_of_one_name_are_refused_and_with_names_each_scores_for_itself(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS), encoding="utf-8")

    def named_score(sign: float) -> Any:
        def score(completions: list[str], **columns: Any) -> list[float]:
            return [sign * float(completion) for completion in completions]

        return score

    def trainer(*overrides: str, algorithm: str = "reward_model", rewards: Any = None) -> Any:
        return create_rl_trainer(
            model_name=str(tiny_model),
            dataset_name=str(path),
            algorithm=algorithm,
            reward_functions=rewards or [named_score(1), named_score(-2)],
            overrides=overrides,
        )

    own = r"2 rewards are named 'score'; give each its own 'name'.*overrides=\['(.*)=OTHER'\]"
    for algorithm in ("reward_model", "grpo"):
        with pytest.raises(UserError, match=own) as refused:
            trainer(algorithm=algorithm).inputs.check_places()
        (cure,) = re.findall(own, str(refused.value))
        made = trainer(f"{cure}=other", algorithm=algorithm).inputs
        scores = [cloudpickle.loads(each.target)(["3"]) for each in made.criteria]
        assert [each.name for each in made.criteria] == ["score", "other"]
        assert scores == [[3.0], [-6.0]], "each scores for itself"
        behind = [named_score(1), "exact_match", "exact_match"]
        with pytest.raises(UserError, match=r"'exact_match'.*rewards\.2\.name=OTHER"):
            trainer(algorithm=algorithm, rewards=behind).inputs.check_places()
    swap = ("rewards.0.function=exact_match", "rewards.1.name=other")
    replaced = trainer(*swap).inputs.criteria
    assert isinstance(replaced[0].target, str), "an override has named another function there"


def test_rewards_are_for_reward_models_made_of_texts() -> None:
    base = {"model": {"name": "m"}, "data": {"path": "d"}, "output_dir": "o"}
    with pytest.raises(UserError, match="dpo takes no rewards"):
        load_config({"algorithm": "dpo", **base, "rewards": ["math"]})
    with pytest.raises(UserError, match="rewards names none"):
        load_config({"algorithm": "reward_model", **base}, ["data.completion_column=text"])
    kept = load_config({"algorithm": "reward_model", **base, "rewards": ["math"]})
    assert isinstance(kept, PreferenceConfig)
    assert [spec.function for spec in kept.rewards] == ["math"]
