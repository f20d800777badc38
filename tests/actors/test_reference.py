"""The reference actor: the frozen model's log-probs, as often as asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.models.configuration import ModelError
from actors.reference import ReferenceActor
from actors.specs import LoRASpec, ModelSpec
from tests.actors.policy_cases import logprobs_of, make_group, make_model_folder, one_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("reference"))


def reference(
    folder: Path, tokens_per_microbatch: int = 64, shared_prompts: bool = False, **model: object
) -> ReferenceActor:
    spec = ModelSpec(name=str(folder), **model)
    actor = ReferenceActor(spec, tokens_per_microbatch, 16, shared_prompts)
    actor.start()
    return actor


def test_it_agrees_with_the_policy_it_started_as(folder: Path) -> None:
    group = make_group(0, 5, [3, 9, 1, 4], holes=True)
    count, logps = reference(folder).logprobs(group, 0.9)
    (wanted,) = logprobs_of(one_rank(folder), [group], 0.9)
    assert count == len(group.token_ids) == len(logps)
    assert logps.dtype == np.float32
    np.testing.assert_allclose(logps, wanted, atol=1e-5)


def test_the_same_call_gives_the_same_bits_whatever_came_between(folder: Path) -> None:
    actor = reference(folder)
    group = make_group(0, 5, [3, 9, 1, 4])
    _, first = actor.logprobs(group, 1.0)
    actor.logprobs(make_group(1, 2, [12, 2]), 0.5)
    actor.start()
    _, again = actor.logprobs(group, 1.0)
    np.testing.assert_array_equal(first, again)


def test_micro_batches_do_not_matter_and_each_shows_that_the_replica_moves(folder: Path) -> None:
    group = make_group(0, 5, [3, 9, 1, 4])
    _, whole = reference(folder, 10_000).logprobs(group, 1.0)
    one_by_one = reference(folder, 1)
    _, singly = one_by_one.logprobs(group, 1.0)
    np.testing.assert_allclose(whole, singly, atol=1e-5)
    assert one_by_one.ping() == 4


@pytest.mark.parametrize("tokens_per_microbatch", [1, 20, 10_000])
def test_a_prompt_that_is_computed_once_gives_the_same_log_probs(
    folder: Path, tokens_per_microbatch: int
) -> None:
    group = make_group(0, 5, [3, 9, 1, 4], holes=True)
    _, wanted = reference(folder).logprobs(group, 0.9)
    _, found = reference(folder, tokens_per_microbatch, True).logprobs(group, 0.9)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_reference_that_cannot_share_prompts_says_so(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model\.attention is eager; set policy\.shared_prompts to false"
    ):
        reference(folder, 64, True, attention="eager")


def test_lora_settings_of_the_policy_leave_the_reference_alone(folder: Path) -> None:
    group = make_group(0, 5, [3, 9])
    _, plain = reference(folder).logprobs(group, 1.0)
    _, with_lora = reference(folder, lora=LoRASpec(r=2)).logprobs(group, 1.0)
    np.testing.assert_array_equal(plain, with_lora)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model folder '{tmp_path}/none' does not exist"):
        reference(tmp_path / "none")


def test_asking_before_start_says_so(folder: Path) -> None:
    actor = ReferenceActor(ModelSpec(name=str(folder)), 64, 16, False)
    with pytest.raises(RuntimeError, match="call start first"):
        actor.logprobs(make_group(0, 5, [3]), 1.0)
