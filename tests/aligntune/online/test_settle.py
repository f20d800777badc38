"""What a config leaves open, settled by data and model, and never what the user has set."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.models.positions import Bound
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import PreferenceConfig
from aligntune.decisions import Decision
from aligntune.errors import UserError
from aligntune.online.settle import decoding_set, settle_data
from aligntune.preference.settle import beyond_note, settle_max_length

TREE: dict[str, Any] = {
    "algorithm": "grpo",
    "model": {"name": "owner/model"},
    "data": {"path": "owner/data"},
    "rewards": ["math"],
    "output_dir": "runs/x",
}


def settled(
    *overrides: str,
    lengths: list[int] | None = None,
    pairs: bool = False,
    positions: int | None = None,
    previous: Any = None,
    **tree: Any,
) -> tuple[RunConfig, dict[str, Decision]]:
    config = load_config({**TREE, **tree}, overrides)
    assert isinstance(config, RunConfig)
    found, decisions = settle_data(config, lengths or [10], pairs, positions, previous)
    return found, {decision.path: decision for decision in decisions}


TOOLS: dict[str, Any] = {"tools": ["m:f"]}


@pytest.mark.parametrize(
    ("overrides", "tree", "ends", "changed"),
    [
        ([], {}, [7], {}),
        (["model.stop_token_ids=[7]"], {}, [7, 8], {}),  # as the template has it
        (["model.stop_token_ids=[8]"], {}, [7, 8], {"stop_token_ids": [8]}),
        (["model.stop_token_ids=[9, 7]"], {}, [7], {"stop_token_ids": [7, 9]}),
        ([], TOOLS, [], {}),
        (["episodes.max_tokens=40"], TOOLS, [], {}),  # what it is by default
        (["episodes.max_tokens=39"], TOOLS, [], {"max_tokens": 39}),
        (
            ["episodes.max_output_characters=99"],
            TOOLS,
            [],
            {"max_output_characters": 99},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("positions", [None, 40])
def test_a_measure_has_what_of_decoding_is_not_as_by_default(
    overrides: list[str],
    tree: dict[str, Any],
    ends: list[int],
    changed: dict[str, Any],
    positions: int | None,
) -> None:
    budgets = [f"{PROMPT}=10", f"{COMPLETION}={10 if positions is None else 20}"]
    config, _ = settled(*budgets, *overrides, positions=positions, **tree)
    assert decoding_set(config, positions, ends) == changed


PROMPT, COMPLETION = "rollout.max_prompt_length", "rollout.max_completion_length"


class TestBudgets:
    def test_the_prompt_follows_the_data(self) -> None:
        config, made = settled(lengths=[*range(1, 100), 3000])
        assert config.rollout.max_prompt_length == made[PROMPT].value == 95
        assert made[PROMPT].why == (
            "the 95th percentile of 100 prompts, the longest of which has 3000 tokens"
        )
        assert (config.rollout.max_completion_length, COMPLETION in made) == (256, False)

    def test_where_no_prompt_may_be_too_long_the_budget_is_the_longest(self) -> None:
        config, made = settled("data.long_rows=error", lengths=[*range(1, 100), 3000])
        assert config.rollout.max_prompt_length == 3000
        assert made[PROMPT].why == "the longest of 100 prompts, for data.long_rows is error"

    def test_what_the_user_has_set_stays_and_is_no_decision(self) -> None:
        config, made = settled(f"{PROMPT}=7", f"{COMPLETION}=9", lengths=[50], positions=16)
        assert config.rollout.max_length == 16
        assert not made

    def test_within_the_positions_the_completion_has_half_of_them_at_least(self) -> None:
        config, made = settled(lengths=[60], positions=64)
        assert (config.rollout.max_prompt_length, config.rollout.max_completion_length) == (32, 32)
        assert "what 32 tokens of completion leave of the model's 64 positions" in made[PROMPT].why
        config, _ = settled(lengths=[10], positions=64)
        assert (config.rollout.max_prompt_length, config.rollout.max_completion_length) == (10, 54)

    @pytest.mark.slow
    @given(
        st.lists(st.integers(1, 5000), min_size=1, max_size=30),
        st.integers(2, 6000),
        st.none() | st.integers(1, 6000),
        st.none() | st.integers(1, 6000),
    )
    def test_what_is_settled_fits_the_positions(
        self, lengths: list[int], positions: int, prompt: int | None, completion: int | None
    ) -> None:
        assume((prompt or 1) + (completion or 1) <= positions)
        given = [
            f"{key}={value}"
            for key, value in ((PROMPT, prompt), (COMPLETION, completion))
            if value is not None
        ]
        config, _ = settled(*given, lengths=lengths, positions=positions)
        rollout = config.rollout
        assert rollout.max_length <= positions
        assert prompt in (None, rollout.max_prompt_length)
        assert completion in (None, rollout.max_completion_length)

    def test_beyond_the_positions_both_keys_and_what_fits_are_named(self) -> None:
        with pytest.raises(UserError) as refused:
            settled(f"{PROMPT}=60", f"{COMPLETION}=30", positions=64)
        assert str(refused.value) == (
            "rollout.max_prompt_length=60 and rollout.max_completion_length=30 are 90 tokens, and "
            "the model reads 64 (max_position_embeddings): lower rollout.max_prompt_length to 34 "
            "or less or rollout.max_completion_length to 4 or less"
        )
        with pytest.raises(UserError, match="lower both, to 64 together"):
            settled(f"{PROMPT}=64", f"{COMPLETION}=64", positions=64)
        config, _ = settled(f"{PROMPT}=60", f"{COMPLETION}=30")
        with pytest.raises(UserError, match=r"reads 64 \(its config says so\): lower"):
            settle_data(config, (), False, 64, bounded_by="its config says so")

    def test_a_run_that_goes_on_keeps_what_it_has(self) -> None:
        before = {"rollout": {"max_prompt_length": 33, "max_completion_length": 44}}
        config, made = settled(lengths=[500], previous=before)
        assert (config.rollout.max_prompt_length, config.rollout.max_completion_length) == (33, 44)
        assert {decision.why for decision in made.values()} == {"as the run in output_dir has it"}
        config, _ = settled(f"{PROMPT}=20", lengths=[500], previous=before)
        assert config.rollout.max_prompt_length == 20


class TestRewards:
    @pytest.mark.parametrize("algorithm", ["grpo", "drgrpo", "dapo", "gspo"])
    def test_preference_data_reward_a_group_algorithm(self, algorithm: str) -> None:
        config, made = settled(pairs=True, rewards=[], algorithm=algorithm)
        assert [spec.function for spec in config.rewards] == ["preference"]
        line = made["rewards"].describe()
        assert line.startswith("rewards=['preference']: no reward is named")
        assert "knows nothing of truth, safety, style or length" in line
        assert "--algorithm reward_model --model owner/model --dataset owner/data" in line
        assert "\n" not in line

    def test_a_named_reward_stays(self) -> None:
        config, made = settled(pairs=True)
        assert [spec.function for spec in config.rewards] == ["math"]
        assert "rewards" not in made

    def test_prompts_alone_give_none(self) -> None:
        with pytest.raises(UserError, match="grpo has no reward; add one"):
            settled(rewards=[])

    def test_ppo_needs_a_reward_model_whatever_the_data(self) -> None:
        with pytest.raises(UserError, match="ppo needs a reward model"):
            settled(pairs=True, rewards=[], algorithm="ppo")


class TestPairs:
    @staticmethod
    def length(
        *overrides: str,
        lengths: list[int],
        positions: int | None = None,
        previous: Any = None,
        bound: Bound | None = None,
    ) -> tuple[int | None, list[str]]:
        tree = {**TREE, "algorithm": "dpo", "rewards": []}
        config = load_config(tree, overrides)
        assert isinstance(config, PreferenceConfig)
        found, made = settle_max_length(config, lengths, positions, previous, bound)
        return found.data.max_length, [decision.why for decision in made]

    def test_the_limit_follows_the_data_within_the_positions(self) -> None:
        length, why = self.length(lengths=[*range(1, 20), 999])
        assert length == 19
        assert "95th percentile of 20 pairs, the longest of which has 999" in why[0]
        length, why = self.length(lengths=[100] * 20, positions=64)
        assert length == 64
        assert why[0].startswith("the positions that the model has; 100, the 95th percentile")
        assert self.length("data.long_rows=error", lengths=[*range(1, 20), 999])[0] == 999

    def test_what_is_set_stays_and_is_refused_beyond_the_positions(self) -> None:
        assert self.length("data.max_length=50", lengths=[9], positions=64) == (50, [])
        with pytest.raises(UserError, match=r"data.max_length=65, .* reads 64 .* lower it to 64"):
            self.length("data.max_length=65", lengths=[9], positions=64)

    def test_rows_end_where_they_would_change_those_beside_them_unless_more_is_set(self) -> None:
        bound = Bound(16, "original_max_position_embeddings of LongRoPE")
        length, why = self.length(lengths=[100] * 20, positions=64, bound=bound)
        assert length == 16
        assert why[0].startswith(f"{bound.by}; 100, the 95th percentile")
        more = "data.max_length=50"
        assert self.length(more, lengths=[100], positions=64, bound=bound) == (50, [])
        config = load_config({**TREE, "algorithm": "dpo", "rewards": []}, [more])
        assert isinstance(config, PreferenceConfig)
        (note,) = beyond_note(config, 17, bound)
        assert note.startswith(f"data.max_length=50 takes rows of more than 16 tokens ({bound.by})")
        assert beyond_note(config, 16, bound) == beyond_note(config, 17, None) == []

    def test_a_job_that_goes_on_keeps_what_it_has(self) -> None:
        previous = {"data": {"max_length": 21}}
        assert self.length(lengths=[500], previous=previous)[0] == 21
