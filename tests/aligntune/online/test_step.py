"""What the driver makes of a step's groups: work for the ranks, and figures. Pure."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.messages import (
    FinishReason,
    GroupRecord,
    GroupSampling,
    Prompt,
    ReplicaLoad,
    Scores,
    VersionSpan,
)
from actors.transcript import Transcript
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.attempts import GroupFailed
from aligntune.online.figures import (
    BUSY,
    completion_metrics,
    group_metrics,
    rollout_metrics,
    score_metrics,
    time_metrics,
)
from aligntune.online.groups import ReadyGroup, compared_scores, group_works, total_reward
from aligntune.online.ignoring import ignore
from aligntune.online.rolling import Rolling
from aligntune.online.samples import Said, sample_rows

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def config(algorithm: Any, rewards: list[Any] | None = None) -> RunConfig:
    return load_config(
        {
            "algorithm": algorithm,
            "model": {"name": "m"},
            "data": {"path": "d"},
            "rewards": rewards or ["length"],
            "output_dir": "out",
            "train": {"groups_per_step": 2, "completions_per_group": 2, "groups_per_minibatch": 2},
            "rollout": {"max_completion_length": 10},
        }
    )


def ready(
    group_id: int,
    values: list[tuple[float, ...]],
    reasons: tuple[FinishReason, ...] = (STOP, STOP),
    lengths: tuple[int, ...] = (3, 5),
    versions: tuple[int, ...] = (4, 4),
    criteria: tuple[str, ...] = ("length",),
) -> ReadyGroup:
    spans = tuple((VersionSpan(v, n),) for v, n in zip(versions, lengths, strict=True))
    return ReadyGroup(
        prompt=Prompt(group_id, "p", "p", np.array([1])),
        record=GroupRecord(group_id, 7, lengths, reasons, spans, 0.5, "rollout-0"),
        scores=Scores(group_id, criteria, tuple(values), 0.1),
        texts=f"texts {group_id}",
        tensors=f"tensors {group_id}",
        reference=f"reference {group_id}",
    )


def test_the_ranks_get_advantages_scores_and_which_completions_were_cut() -> None:
    groups = [ready(0, [(1.0,), (0.0,)], (STOP, LENGTH)), ready(1, [(1.0,), (1.0,)])]
    first, second = group_works(config("drgrpo"), config("drgrpo").algorithm, groups)
    assert (first.group_id, second.group_id) == (0, 1)
    assert first.advantages == (0.5, -0.5)
    assert second.advantages == (0.0, 0.0)
    assert first.scores == (1.0, 0.0)
    assert first.truncated == (False, True)
    assert first.trained == (True, True)
    assert (first.prompt_tokens, first.lengths) == (7, (3, 5))
    assert (first.tensors, first.reference) == ("tensors 0", "reference 0")


def test_a_sample_has_both_forms_of_a_transcript() -> None:
    group = ready(0, [(1.0,), (0.0,)])
    forms = Transcript([{"role": "user", "content": "p"}], "Human: p\n\nAssistant: ")
    other = replace(group, prompt=replace(group.prompt, transcript=forms))
    plain, row = sample_rows(config("grpo"), [group, other], [Said(("a", "b"))] * 2)
    assert row == {**plain, "transcript": {"spoken": forms.spoken, "written": forms.written}}


def test_groups_of_other_sizes_and_rollouts_of_several_rows_make_a_step() -> None:
    """The second group has one rollout less; its first has two rows of 4 + 2 sampled tokens, which
    is what the punishment for length goes by."""
    dapo = config({"name": "dapo", "overlong_cache": 4})
    three = ready(0, [(1.0,), (0.0,), (1.0,)], (STOP,) * 3, lengths=(3, 5, 4), versions=(4, 4, 4))
    two = ready(
        1, [(1.0,), (1.0,)], (STOP, FinishReason.TURNS), lengths=(9, 12, 8), versions=(4, 4, 4)
    )
    record = replace(two.record, sampled=(4, 2, 8), turns=(3, 1), rollouts=(0, 0, 1))
    first, second = group_works(dapo, dapo.algorithm, [three, replace(two, record=record)])
    assert first.advantages == pytest.approx((0.5773, -1.1547, 0.5773), abs=1e-4)
    assert first.rollouts == (0, 1, 2)
    assert second.scores == (1.0, 0.5)
    assert second.advantages == pytest.approx((0.7071, -0.7071), abs=1e-4)
    assert second.truncated == (False, True)
    assert (second.lengths, second.rollouts) == ((9, 12, 8), (0, 0, 1))


def test_a_group_with_another_number_of_scores_than_rollouts_is_refused() -> None:
    grpo = config("grpo")
    with pytest.raises(ValueError, match="group 3: 3 scores for 2 rollouts"):
        group_works(grpo, grpo.algorithm, [ready(3, [(1.0,), (0.0,), (1.0,)])])


def test_overlong_filtering_and_shaping_reach_the_ranks() -> None:
    options = {"name": "dapo", "overlong_filtering": True, "overlong_cache": 4}
    dapo = config(options)
    (work,) = group_works(
        dapo, dapo.algorithm, [ready(0, [(1.0,), (1.0,)], (STOP, LENGTH), lengths=(6, 10))]
    )
    assert work.trained == (True, False)
    assert work.scores == (1.0, 0.0), "the full punishment at the limit, none below the cache"


def test_several_criteria_count_by_their_weights() -> None:
    rewards = [{"function": "length", "weight": 2.0}, {"function": "exact_match", "weight": 0.5}]
    both = config("drgrpo", rewards)
    values = [(1.0, 4.0), (0.0, 0.0)]
    group = ready(0, values, criteria=("length", "exact_match"))
    (work,) = group_works(both, both.algorithm, [group])
    assert work.scores == (4.0, 0.0)
    figures = score_metrics(both, [group])
    assert figures == {
        "reward/mean": 2.0,
        "reward/std": 2.0,
        "reward/length/mean": 0.5,
        "reward/exact_match/mean": 2.0,
    }


@pytest.mark.parametrize(
    ("values", "weight", "wrong"),
    [
        ([(1e100,), (-1e100,)], 1.0, None),
        ([(1.0,), (1.7e308,)], 1.0, "reward 'length' gave a completion 1.7e"),
        ([(1.7e308,)] * 2, 0.0, "reward 'length' gave a completion 1.7e"),
        ([(1e99,), (None,)], -1e300, "the weighted sum of the rewards gave a completion -inf"),
    ],
)
def test_scores_that_have_no_mean_fail_their_group_and_no_run(
    values: list[Any], weight: float, wrong: str | None
) -> None:
    """Elsewhere their mean raises, and so does the deviation of a weighted sum that is infinite."""
    run = config("grpo", [{"function": "length", "weight": weight}])
    made = ready(0, values)

    class Says:
        def __init__(self, *answer: Any) -> None:
            self._answer = answer

        async def call(self, method: str, *args: Any, **options: Any) -> tuple[Any, ...]:
            return self._answer

    rolling: Any = Rolling(run, Says(made.record, "tensors"), Says(made.scores, "texts"))  # type: ignore[arg-type]
    sampling = GroupSampling(completions=2, max_tokens=8, temperature=1.0, seed=0, group_id=0)
    rolled = rolling.roll_and_score(made.prompt, sampling, None, ignore)
    if wrong is None:
        group = asyncio.run(rolled)
        assert score_metrics(run, [group])["reward/std"] == 1e100
        group_works(run, run.algorithm, [group])
        return
    with pytest.raises(GroupFailed, match=f"{wrong}.* within 1e\\+100$"):
        asyncio.run(rolled)


@pytest.mark.parametrize("name", ["score", "reward"])
def test_a_criterion_that_is_called_as_a_sum_may_be_is_a_criterion(name: str) -> None:
    """Its figure is its own, and where criteria are normalised one by one it tells groups apart."""
    rewards = [{"function": f"my:{name}"}, {"function": "length", "weight": -1.0}]
    run = config({"name": "dapo", "combine": "decoupled"}, rewards)
    group = ready(0, [(1.0, 0.0), (0.0, 0.0)], criteria=(name, "length"))
    assert score_metrics(run, [group]) == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        f"reward/{name}/mean": 0.5,
        "reward/length/mean": 0.0,
    }
    ended = {"filtered": 0, "quarantined": 0}
    assert group_metrics(run, [group], 4, ended)["groups/constant_fraction"] == 0.0
    assert run.algorithm.keep(compared_scores(run, group.scores))
    run.algorithm.check_run([name, "length"], 100, 4)


def test_a_group_is_constant_where_its_criteria_are_and_those_without_weight_do_not_count() -> None:
    """Decoupled, (0, 2), (1, 0) by weights (2, 1) differ though their sums do not."""
    names = ("length", "exact_match")

    def constant(combine: str, weights: tuple[float, float]) -> float:
        rewards = [{"function": n, "weight": w} for n, w in zip(names, weights, strict=True)]
        run = config({"name": "dapo", "combine": combine}, rewards)
        group = ready(0, [(0.0, 2.0), (1.0, 2.0 - 2 * bool(weights[0]))], criteria=names)
        ended = {"filtered": 0, "quarantined": 0}
        return group_metrics(run, [group], 4, ended)["groups/constant_fraction"]

    assert constant("sum", (2.0, 1.0)) == 1.0
    assert constant("decoupled", (2.0, 1.0)) == 0.0
    assert constant("decoupled", (0.0, 1.0)) == 1.0, "only what has no weight varies"


def test_criteria_that_abstain_count_neither_in_figures_nor_in_advantages() -> None:
    rewards = [{"function": "length", "weight": 2.0}, {"function": "exact_match", "weight": 0.5}]
    both = config("drgrpo", rewards)
    first = ready(0, [(1.0, None), (None, 2.0)], criteria=("length", "exact_match"))
    second = ready(1, [(None, None), (None, 4.0)], criteria=("length", "exact_match"))
    works = group_works(both, both.algorithm, [first, second])
    assert works[0].scores == (2.0, 1.0)
    assert works[0].advantages == (0.5, -0.5)
    assert works[1].advantages == (0.0, 0.0)
    assert score_metrics(both, [first, second]) == {
        "reward/mean": pytest.approx(5 / 3),
        "reward/std": pytest.approx((2 / 9) ** 0.5),
        "reward/length/mean": 1.0,
        "reward/exact_match/mean": 3.0,
    }
    assert (
        score_metrics(both, [ready(2, [(None, None)] * 2, criteria=("length", "exact_match"))])
        == {}
    )


def test_a_completion_that_only_a_criterion_of_weight_0_scores_has_no_score() -> None:
    run = config("drgrpo", [{"function": "length", "weight": 0.0}, "exact_match"])
    scores, tokens = [(7.0, None), (3.0, 1.0), (9.0, 0.0)], (2, 2, 2)
    names, reasons = ("length", "exact_match"), (STOP, STOP, STOP)
    group = ready(0, scores, reasons, tokens, versions=(4, 4, 4), criteria=names)
    (work,) = group_works(run, run.algorithm, [group])
    assert np.isnan(work.scores[0])
    assert work.advantages == (0.0, 0.5, -0.5)
    assert score_metrics(run, [group])["reward/mean"] == 0.5
    assert total_reward(run, scores[0]) is None


def test_group_figures_by_hand() -> None:
    groups = [
        ready(0, [(1.0,), (0.0,)], versions=(4, 2)),
        ready(1, [(0.1,), (0.1,)], versions=(4, 4)),
    ]
    figures = group_metrics(config("grpo"), groups, 4, {"filtered": 0, "quarantined": 3})
    assert figures == {
        "groups/trained": 2.0,
        "groups/filtered": 0.0,
        "groups/quarantined": 3.0,
        "groups/constant_fraction": 0.5,
        "staleness/mean": 1.0,
        "staleness/max": 2.0,
    }


def test_groups_that_nothing_compares_are_not_called_constant() -> None:
    """Of one completion, or of PPO, whose baseline is its critic."""
    ended = {"filtered": 0, "quarantined": 0}
    two = ready(0, [(1.0,), (1.0,)])
    one = ready(0, [(1.0,)], (STOP,), lengths=(3,), versions=(4,))
    ppo = config("tests.e2e.algorithms:PPOOnFunctions")
    for run, group in ((config("grpo"), one), (ppo, one), (ppo, two)):
        assert "groups/constant_fraction" not in group_metrics(run, [group], 4, ended)


def test_a_group_that_is_constant_up_to_rounding_counts_as_constant() -> None:
    """As for the advantages, which are exactly 0 there: 0.1 + 0.2 and 0.3 + 0.0."""
    rewards = ["length", "exact_match"]
    group = ready(0, [(0.1, 0.2), (0.3, 0.0)], criteria=("length", "exact_match"))
    figures = group_metrics(config("grpo", rewards), [group], 4, {"filtered": 0, "quarantined": 0})
    assert figures["groups/constant_fraction"] == 1.0


def test_dynamic_sampling_says_how_many_groups_it_drew_for_each_it_kept() -> None:
    groups = [ready(0, [(1.0,), (0.0,)]), ready(1, [(1.0,), (0.0,)])]
    ended = {"filtered": 3, "quarantined": 0}
    assert group_metrics(config("dapo"), groups, 4, ended)["dapo/draws_per_kept_group"] == 2.5
    everything = config({"name": "dapo", "dynamic_sampling": False})
    assert "dapo/draws_per_kept_group" not in group_metrics(everything, groups, 4, ended)


def test_completion_and_time_figures_by_hand() -> None:
    groups = [ready(0, [(1.0,), (0.0,)], (STOP, LENGTH)), ready(1, [(1.0,), (0.0,)])]
    assert completion_metrics(groups, "eval/") == {
        "eval/completions/length_mean": 4.0,
        "eval/completions/length_max": 5.0,
        "eval/completions/truncated_fraction": 0.25,
    }
    busy = dict.fromkeys(BUSY, 0.0) | {"rollout": 3.0, "policy": 2.0}
    figures = time_metrics(4.0, busy, groups)
    assert figures["time/idle_rollout"] == 1.0
    assert figures["time/idle_policy"] == 2.0
    assert figures["throughput/tokens_per_s"] == 4.0
    assert figures["throughput/samples_per_s"] == 1.0


def test_lengths_and_throughput_count_what_the_policy_wrote() -> None:
    """Two rollouts; the second has two rows, whose second repeats 4 tokens of the first."""
    (group,) = (ready(0, [(1.0,), (0.0,)], lengths=(9, 4, 8), versions=(4, 4, 4)),)
    record = replace(group.record, sampled=(3, 4, 2), turns=(2, 2), rollouts=(0, 1, 1))
    groups = [replace(group, record=record)]
    assert completion_metrics(groups)["completions/length_max"] == 6.0
    assert completion_metrics(groups)["completions/length_mean"] == 4.5
    busy = dict.fromkeys(BUSY, 0.0) | {"rollout": 3.0, "policy": 2.0}
    figures = time_metrics(2.0, busy, groups)
    assert figures["throughput/tokens_per_s"] == 4.5
    assert figures["throughput/samples_per_s"] == 1.0


def test_replicas_figures_by_hand() -> None:
    def made(seconds: float, replica: str, *load: float | None) -> ReadyGroup:
        group = ready(0, [(1.0,), (0.0,)])
        said = ReplicaLoad(*load)  # type: ignore[arg-type]
        record = replace(group.record, seconds=seconds, replica=replica, load=said)
        return replace(group, record=record)

    one = [
        made(1.0, "rollout-0", 10.0, 4.0, 0.0, 0.25),
        made(3.0, "rollout-0", 30.0, 6.0, 2.0, 0.75),
    ]
    alone = {
        "rollout/group_s_mean": 2.0,
        "rollout/group_s_max": 3.0,
        "rollout/tokens_per_s": 20.0,
        "rollout/running": 5.0,
        "rollout/queue": 1.0,
        "rollout/kv_cache_used": 0.5,
    }
    assert rollout_metrics(one) == alone
    both = rollout_metrics([*one, made(2.0, "rollout-1", 5.0, 1.0, 3.0, None)])
    assert both["rollout/tokens_per_s"] == 25.0
    assert both["rollout/running"] == 3.0
    assert both["rollout/queue"] == 2.0
    assert both["rollout/kv_cache_used"] == 0.5
    assert both["rollout/rollout-0/tokens_per_s"] == 20.0
    assert both["rollout/rollout-1/queue"] == 3.0
    assert "rollout/rollout-1/kv_cache_used" not in both


def test_a_replica_and_its_replacement_have_one_place_in_the_figures() -> None:
    def made(replica: str, speed: float) -> ReadyGroup:
        group = ready(0, [(1.0,), (0.0,)])
        load = ReplicaLoad(speed, 1.0, 0.0, None)
        return replace(group, record=replace(group.record, replica=replica, load=load))

    lives = [made("rollout-0.0", 10.0), made("rollout-0.7", 20.0), made("rollout-0.7", 60.0)]
    assert rollout_metrics(lives)["rollout/tokens_per_s"] == 30.0
    figures = rollout_metrics([*lives, made("rollout-1.1", 5.0)])
    assert figures["rollout/tokens_per_s"] == 35.0
    of_each = {name: value for name, value in figures.items() if name.count("/") == 2}
    assert {name for name in of_each if name.endswith("tokens_per_s")} == {
        "rollout/rollout-0/tokens_per_s",
        "rollout/rollout-1/tokens_per_s",
    }
    assert of_each["rollout/rollout-0/tokens_per_s"] == 30.0


def test_a_role_is_never_idle_for_less_than_no_time() -> None:
    busy = dict.fromkeys(BUSY, 9.0)
    figures = time_metrics(4.0, busy, [ready(0, [(1.0,), (0.0,)])])
    assert figures["time/idle_rollout"] == figures["time/idle_policy"] == pytest.approx(0.0)
