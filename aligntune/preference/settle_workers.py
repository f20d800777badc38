"""Settles what the workers of a preference job take where the config leaves it open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aligntune.config.auto import AUTO, open_settings, settled_tree
from aligntune.config.preference import DPOSpec, PreferenceConfig, load_preference_config
from aligntune.config.warm_up import SFTSpec
from aligntune.decisions import KEPT, Decision
from aligntune.errors import UserError
from aligntune.shapes import adapts_experts, loaded_shape
from cluster.machines import Machines, machines
from cluster.placement import DoesNotFit
from cluster.plan.pairs import HELD_OUT, SHARED_OUT, PairWork, choose_workers
from cluster.plan.shapes import BadModelConfig
from cluster.session import ClusterUnreachable
from cluster.tables import UnknownName

OF_THE_RUN = ("model.dtype", *SHARED_OUT)
"""Open settings that a run keeps when it goes on, whatever machine it goes on with."""


def settle_workers(
    config: PreferenceConfig,
    longest: int,
    previous: Mapping[str, Any] | None = None,
    there: Machines | None = None,
) -> tuple[PreferenceConfig, tuple[Decision, ...]]:
    """The config with nothing left open, and what was decided.

    Args:
        longest: tokens of a pair's longer side.
        previous: the config tree of the run that goes on, if one does.
        there: the machines; those of `config.cluster` unless said.

    Raises:
        UserError: one line: no machine, or none on which it fits, with what would fit.
    """
    open_ = open_settings(config)
    kept = []
    for path in (*OF_THE_RUN, *_held_out_of_the_run(config)):
        section, _, key = path.partition(".")
        value = ((previous or {}).get(section) or {}).get(key)
        if value not in (None, AUTO) and path in open_:
            kept.append(Decision(path, value, KEPT))
    config = settled(config, {one.path: one.value for one in kept})
    open_ = open_settings(config)
    try:
        there = there or machines(config.cluster)
        gpus = config.train.resources.gpus
        decided = choose_workers(_work(config, longest), open_, gpus, there.cluster, there.cores)
    except DoesNotFit as error:
        told = any(one.path in str(error) for one in kept if one.path in OF_THE_RUN)
        other = ", in a new output_dir, for the run in this one keeps its own" if told else ""
        raise UserError(f"{error}{other}") from error
    except (BadModelConfig, ClusterUnreachable, UnknownName) as error:
        raise UserError(str(error)) from error
    made = [Decision(one.path, one.value, one.why) for one in decided]
    return settled(config, {one.path: one.value for one in made}), (*kept, *made)


def settled(config: PreferenceConfig, values: Mapping[str, Any]) -> PreferenceConfig:
    """The config with these open settings as if they had been set. Raises UserError."""
    return load_preference_config(settled_tree(config, values)) if values else config


def _work(config: PreferenceConfig, longest: int) -> PairWork:
    algorithm, model, train = config.algorithm, config.model, config.train
    dpo, taught = isinstance(algorithm, DPOSpec), isinstance(algorithm, SFTSpec)
    second = isinstance(algorithm, DPOSpec) and not (
        algorithm.reference_free or algorithm.precompute_reference
    )
    shape = loaded_shape(model, model.name)
    return PairWork(
        shape=shape,
        longest=longest,
        workers=train.workers,
        pairs=train.pairs_per_worker,
        passes=train.accumulation_steps,
        dtype_bytes=2 if model.dtype == "bfloat16" else 4,
        checkpointing=model.gradient_checkpointing,
        lora_rank=model.lora.r if model.lora else None,
        lora_experts=adapts_experts(model.lora),
        four_bit=model.load_in_4bit,
        logits=dpo or taught,
        sides=1 if taught else 2,
        reference=second,
        deepspeed=train.deepspeed is not None,
        whole=_sorts(config),
        held_out=config.eval.pairs_per_worker if config.data.evaluates else 0,
        scores=shape.keeps_scores(model.attention),
        weighting=isinstance(algorithm, DPOSpec) and algorithm.weighting,
    )


def _held_out_of_the_run(config: PreferenceConfig) -> tuple[str, ...]:
    """What of an evaluation a run keeps, for its figures hang on it: the pairs that are sorted."""
    return (HELD_OUT,) if _sorts(config) and config.data.evaluates else ()


def _sorts(config: PreferenceConfig) -> bool:
    return isinstance(config.algorithm, DPOSpec) and bool(config.algorithm.sorted_losses)
