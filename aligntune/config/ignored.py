"""Keys that another key makes do nothing: each is refused where it is set.

A key with its default counts as not set: the config.yaml of a run says every key, and is read
again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel

from aligntune.config.records import HubSpec
from aligntune.errors import UserError

if TYPE_CHECKING:
    from actors.specs import ModelSpec
    from aligntune.config.online import RunConfig
    from aligntune.config.preference import PreferenceConfig
    from aligntune.data.spec import DatasetSpec
    from cluster.specs import ClusterSpec


def is_set(spec: BaseModel, key: str) -> bool:
    """Whether a key has another value than its default."""
    field = type(spec).model_fields[key]
    return bool(getattr(spec, key) != field.get_default(call_default_factory=True))


def refuse_ignored(
    section: str, spec: BaseModel, keys: tuple[str, ...], why: str, cure: str = ""
) -> None:
    """Raises UserError where one of `keys` is set; `why` says what makes it do nothing, `cure` what
    to set for it to do something."""
    for key in keys:
        if is_set(spec, key):
            remedy = f"{cure}, or remove it" if cure else "remove it"
            raise UserError(f"{section}.{key} would do nothing: {why}; {remedy}")


def check_hub_keys(hub: HubSpec) -> None:
    """Refuse what is of a push where nothing is pushed (UserError)."""
    if hub.push_to is None:
        why = "nothing is pushed without hub.push_to"
        refuse_ignored("hub", hub, ("private", "timeout_s"), why, "set that")


def check_template_keys(model: ModelSpec, data: DatasetSpec) -> None:
    """Refuse what is of a chat template where none is applied (UserError)."""
    if not data.apply_chat_template:
        why = "with data.apply_chat_template=false no chat template is applied"
        refuse_ignored("model", model, ("chat_template_kwargs",), why)


def check_cluster_keys(cluster: ClusterSpec) -> None:
    """Refuse what is of a Ray that the run starts where it joins one (UserError)."""
    if cluster.address != "local":
        refuse_ignored(
            "cluster",
            cluster,
            ("object_store_gib",),
            f"with cluster.address={cluster.address} no Ray is started here, and nodes have the "
            "store that `ray start --object-store-memory` gives them",
        )


def check_length(steps: int | None, epochs: float | None) -> None:
    """Refuse `train.steps` beside `train.epochs` (UserError)."""
    if steps is not None and epochs is not None:
        raise UserError("train.steps and train.epochs both say how long; give one of them")


def check_held_out(given: bool, evaluates: bool) -> None:
    """Refuse an eval section that is `given` where no data are held out (UserError)."""
    if given and not evaluates:
        raise UserError(
            "the eval section is set and there is no held-out data, so it would be ignored; set "
            "data.eval_path, or both data.split and data.eval_split (as in train[:95%] and "
            "train[95%:]), or remove it"
        )


def check_online_keys(config: RunConfig) -> None:
    """Refuse the keys of an online run that would do nothing (UserError)."""
    check_hub_keys(config.hub)
    check_cluster_keys(config.cluster)
    check_template_keys(config.model, config.data)
    if config.checkpoint.storage is None:
        refuse_ignored(
            "checkpoint",
            config.checkpoint,
            ("copy_timeout_s",),
            "nothing is copied without checkpoint.storage",
            "set that",
        )
    if config.rollout.engine.name == "transformers":
        refuse_ignored(
            "rollout",
            config.rollout,
            ("max_concurrent_groups",),
            "a replica with rollout.engine=transformers always has 2 groups in flight",
            "use rollout.engine=vllm",
        )
    if config.algorithm.places_turn_rewards:
        refuse_ignored(
            "episodes",
            config.episodes,
            ("discount",),
            f"{config.algorithm_name} takes a turn's reward at its turn and discounts it by "
            "algorithm.gamma",
        )
    if config.agent is None:
        refuse_ignored(
            "episodes",
            config.episodes,
            ("discount",),
            "only an agent says what each of its turns was worth, and there is none",
        )
    if config.eval.temperature == 0 and not config.plays:
        refuse_ignored(
            "eval",
            config.eval,
            ("completions",),
            "at eval.temperature=0 all completions of a prompt are the same",
            "raise eval.temperature",
        )


def check_table_keys(config: PreferenceConfig) -> None:
    """Refuse the keys of a job over a table that would do nothing (UserError)."""
    check_hub_keys(config.hub)
    check_cluster_keys(config.cluster)
    check_template_keys(config.model, config.data)
    if config.algorithm_name == "reward_model":
        why = "what scores with a reward model renders by the template's own defaults"
        refuse_ignored("model", config.model, ("chat_template_kwargs",), why)
        why = "a reward model writes no completions"
        refuse_ignored("model", config.model, ("stop_token_ids",), why)
    if config.rewards:
        keys = ("chosen_column", "rejected_column")
        why = "rewards form the pairs, of texts in data.completion_column"
        refuse_ignored("data", config.data, keys, why)
    refuse_ignored(
        "cluster",
        config.cluster,
        ("placement_timeout_s",),
        f"{config.algorithm_name} waits for its workers as long as train.start_timeout_s",
    )
    for index, reward in enumerate(config.rewards):
        refuse_ignored(
            f"rewards.{index}",
            reward,
            ("workers", "try_first"),
            "texts are scored here, one after the other, before anything starts",
        )
