"""Settles what a config leaves open by what the data, the model and the machines are. Pure.

Invariant: every value that is filled in here is a `Decision` with its reason. It is shown, and
written into config.yaml as if the user had set it; what the user did set is never changed. A run
that goes on keeps what it began with.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from actors.engines.specs import TransformersSpec
from actors.environments.specs import EpisodesSpec
from actors.models.configuration import ModelError
from actors.models.positions import Bound, model_bound
from actors.specs import RewardFunctionSpec
from aligntune.config.episodes import ENVIRONMENT, scores_itself
from aligntune.config.online import RunConfig
from aligntune.decisions import KEPT, Decision, asked_length
from aligntune.errors import UserError
from aligntune.rewards.catalogue import DEFAULT_FOR_PAIRS

PROMPT, COMPLETION = "rollout.max_prompt_length", "rollout.max_completion_length"
ROW = "episodes.max_tokens"


def settle_data(
    config: RunConfig,
    lengths: Collection[int],
    pairs: bool,
    positions: int | None,
    previous: Mapping[str, Any] | None = None,
    itself: str | None = None,
    bounded_by: str = "max_position_embeddings",
) -> tuple[RunConfig, tuple[Decision, ...]]:
    """The config with its rewards and token budgets settled, and what was decided.

    Args:
        lengths: tokens of every usable training prompt.
        pairs: the data are preference pairs.
        positions: tokens that the model can read, None where nothing bounds it.
        previous: the config tree of the run in `output_dir`, if there is one.
        itself: why the run is rewarded by what its environment or agent says, where it is.
        bounded_by: what says so of the positions.

    Raises:
        UserError: no reward, and the data give none; budgets beyond the positions.
    """
    rewards, reward_decisions = _rewards(config, pairs, itself)
    before = (previous or {}).get("rollout") or {}
    budgets = _budgets(config, lengths, positions, before)
    rollout = config.rollout.model_copy(
        update={decision.path.partition(".")[2]: decision.value for decision in budgets}
    )
    _check_positions(
        rollout.max_prompt_length or 0, rollout.max_completion_length, positions, bounded_by
    )
    settled = config.model_copy(update={"rewards": rewards, "rollout": rollout})
    if config.plays:
        row = _row(settled, positions, (previous or {}).get("episodes") or {}, bounded_by)
        budgets += row
        for decision in row:
            episodes = config.episodes.model_copy(update={"max_tokens": decision.value})
            settled = settled.model_copy(update={"episodes": episodes})
    return settled, (*reward_decisions, *budgets)


def bound(config: RunConfig) -> Bound | None:
    """As far as every model reads which reads the policy's tokens; None where nothing bounds it.
    Raises UserError."""
    needs = config.algorithm.needs
    vllm = not isinstance(config.rollout.engine, TransformersSpec)  # auto may become it
    named = [config.model.name]
    named += [config.reference.model] if needs.reference and config.reference.model else []
    named += [config.critic.model] if needs.critic and config.critic.model else []
    try:
        found = [
            model_bound(config.model.renamed(name), vllm and name == config.model.name)
            for name in named
        ]
    except ModelError as error:
        raise UserError(str(error)) from error
    return min((one for one in found if one is not None), default=None)


def decoding_set(config: RunConfig, positions: int | None, ends: Sequence[int]) -> dict[str, Any]:
    """What of the settled config decides where completions end and is not as it is by default.
    `ends` are the tokens by which the chat template ends a turn."""
    own = config.episodes
    changed: dict[str, Any] = {}
    if config.plays:
        if own.max_tokens != _default_row(config, positions):
            changed["max_tokens"] = own.max_tokens
        if own.max_output_characters != EpisodesSpec().max_output_characters:
            changed["max_output_characters"] = own.max_output_characters
    stops = {*(config.model.stop_token_ids or ())}
    if stops - {*ends[:1]}:
        changed["stop_token_ids"] = sorted(stops)
    return changed


def _default_row(config: RunConfig, positions: int | None) -> int:
    """`episodes.max_tokens` where it is open: twice the budgets of prompt and completion, as far
    as the model has positions."""
    longest = 2 * config.rollout.max_length
    return longest if positions is None else min(longest, positions)


def _row(
    config: RunConfig, positions: int | None, before: Mapping[str, Any], bounded_by: str
) -> list[Decision]:
    """`episodes.max_tokens`, where it is open. Raises UserError where it does not fit."""
    prompt, given = config.rollout.max_prompt_length or 0, config.episodes.max_tokens
    kept = before.get("max_tokens")
    asked = kept if given is None and isinstance(kept, int) else given
    if asked is not None:
        if asked <= prompt:
            raise UserError(
                f"{ROW}={asked} leaves nothing for the policy beside {PROMPT}={prompt}; raise it"
            )
        if positions is not None and asked > positions:
            raise UserError(
                f"{ROW}={asked} is more than the {positions} tokens that the model reads "
                f"({bounded_by}); lower it to {positions} or less"
            )
        return [Decision(ROW, asked, KEPT)] if given is None else []
    value = _default_row(config, positions)
    why = "the budgets of prompt and completion, and as much again for what tools say"
    if value < 2 * config.rollout.max_length:
        why = f"the positions of the model; {why}, do not fit"
    return [Decision(ROW, value, why)]


def _rewards(
    config: RunConfig, pairs: bool, itself: str | None
) -> tuple[list[Any], list[Decision]]:
    """The rewards of the config and of the environment, or for a group algorithm those that
    preference data give."""
    if itself and not any(map(scores_itself, config.rewards)):
        named = [reward.model_dump(mode="json", exclude_defaults=True) for reward in config.rewards]
        rewards = [*config.rewards, RewardFunctionSpec(function=ENVIRONMENT)]
        return rewards, [Decision("rewards", [*named, ENVIRONMENT], itself)]
    if config.rewards:
        return config.rewards, []
    name = config.algorithm_name
    if not pairs or config.algorithm.needs.min_group < 2:
        raise UserError(
            f"{name} has no reward; add one, such as rewards: [math] or --reward "
            "my_package.my_module:my_function (`aligntune rewards` lists what is registered; data "
            "with chosen and rejected answers give one by themselves)"
        )
    command = (
        "aligntune train --algorithm reward_model "
        f"--model {shlex.quote(config.model.name)} --dataset {shlex.quote(config.data.where)}"
    )
    why = (
        "no reward is named and the data are preferences: how much nearer the text of a completion "
        "is to the chosen than to the rejected answer (chrF, -1 to 1); it compares wording and "
        "knows nothing of truth, safety, style or length. A reward model learns these: "
        f"`{command}`, then --reward-model runs/reward_model/model"
    )
    spec = RewardFunctionSpec(function=DEFAULT_FOR_PAIRS)
    return [spec], [Decision("rewards", [DEFAULT_FOR_PAIRS], why)]


def _budgets(
    config: RunConfig,
    lengths: Collection[int],
    positions: int | None,
    before: Mapping[str, Any],
) -> list[Decision]:
    """`max_completion_length` where its default does not fit, `max_prompt_length` where it is open.

    The completion keeps its default as far as the prompts leave positions, and half of these at
    least; the prompt has what the data ask for, as far as the completion leaves positions.
    """
    spec, made = config.rollout, []
    completion, prompt = spec.max_completion_length, spec.max_prompt_length
    asked, why = asked_length(lengths, "prompts", config.data.long_rows)
    if "max_completion_length" not in spec.model_fields_set:
        if isinstance(kept := before.get("max_completion_length"), int):
            if kept != completion:
                made.append(Decision(COMPLETION, kept, KEPT))
            completion = kept
        elif positions is not None:
            left = positions - prompt if prompt else max(positions - asked, positions // 2)
            if 0 < left < completion:
                less = f"the default of {completion} is more than the model's {positions} positions"
                made.append(Decision(COMPLETION, left, f"{less} leave beside the prompt"))
                completion = left
    if prompt is None:
        kept = before.get("max_prompt_length")
        if isinstance(kept, int):
            return [*made, Decision(PROMPT, kept, KEPT)]
        value = asked if positions is None else min(asked, max(1, positions - completion))
        if value < asked:
            why = (
                f"what {completion} tokens of completion leave of the model's {positions} "
                f"positions; {asked}, {why}, does not fit"
            )
        made.append(Decision(PROMPT, value, why))
    return made


def _check_positions(prompt: int, completion: int, positions: int | None, bounded_by: str) -> None:
    """Refuse budgets that the model has no positions for (UserError)."""
    if positions is None or prompt + completion <= positions:
        return
    fits = [
        f"{key} to {positions - other} or less"
        for key, other in ((PROMPT, completion), (COMPLETION, prompt))
        if positions > other
    ]
    cure = " or ".join(fits) or f"both, to {positions} together"
    raise UserError(
        f"{PROMPT}={prompt} and {COMPLETION}={completion} are {prompt + completion} tokens, and "
        f"the model reads {positions} ({bounded_by}): lower {cure}"
    )
