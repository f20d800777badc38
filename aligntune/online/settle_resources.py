"""Settles what each role takes where the config leaves it open, by the machines that there are.

The decision itself is `cluster.plan.auto`'s, a pure function. What ranks hold in a checkpoint is
taken from the run that is to go on: another machine never makes it another run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.engines.base import resolve_engine, vllm_is_installed, vllm_needs_no_gpu
from actors.engines.specs import COMPILING, VLLMSpec
from aligntune.config.auto import AUTO, open_settings, settled_tree, with_open
from aligntune.config.online import RunConfig, resolve, validate
from aligntune.decisions import KEPT, Decision
from aligntune.errors import UserError
from aligntune.online.work import work_of
from aligntune.shapes import loaded_shape
from cluster.bundles import BadRequest
from cluster.machines import Machines, machines
from cluster.placement import DoesNotFit
from cluster.plan.auto import CACHE, WAIT, choose
from cluster.plan.shapes import BadModelConfig, ModelShape
from cluster.plan.work import Work
from cluster.session import ClusterUnreachable
from cluster.tables import UnknownName

OF_THE_RUN = (
    "model.dtype",
    "policy.strategy",
    "policy.ranks",
    "critic.strategy",
    "critic.ranks",
)
"""Open settings that a run keeps when it goes on, whatever machine it goes on with."""


WORTH_COMPILING = 1_000_000
"""Tokens of one engine on a CPU. To compile takes half a minute of its start, and saves a fifth of
a millisecond or so at each token of a model of 6 million parameters (docs/benchmarks.md, engine).
"""


def settle_resources(
    config: RunConfig,
    previous: Mapping[str, Any] | None = None,
    there: Machines | None = None,
    shape_of: Callable[[str], ModelShape] | None = None,
    steps: Callable[[], int] | None = None,
) -> tuple[RunConfig, tuple[Decision, ...]]:
    """The config with nothing left open that a role of it takes, and what was decided.

    Args:
        previous: the config tree of the run that goes on, if one does.
        there: the machines; those of `config.cluster` unless said.
        shape_of: gives the sizes of a model by its name; its own configuration unless said.
        steps: gives those of the run that is about to start, if one is.

    Raises:
        UserError: one line: no machine, or none on which it fits, with what would fit.
    """
    kept = _kept(config, previous or {})
    config = settled(config, {one.path: one.value for one in kept})
    open_ = open_settings(config)
    try:
        there = there or machines(config.cluster)
        choice = choose(_prepared(config, there, shape_of), open_, there.cluster, there.cores)
    except (
        BadModelConfig,
        BadRequest,
        ClusterUnreachable,
        DoesNotFit,
        UnknownName,
    ) as error:
        raise UserError(str(error)) from error
    decided = [Decision(one.path, one.value, one.why) for one in choice.decided]
    values = {one.path: one.value for one in decided}
    cache, wait = values.pop(CACHE, None), values.pop(WAIT, None)
    config = settled(config, values)
    if there.here:
        _check_engine(config)
        if steps is not None and (tokens := _sampled_on_cpu(config, steps)) >= WORTH_COMPILING:
            why = f"an engine may sample {tokens:,} tokens in this run"
            decided.append(Decision("rollout.engine.compiles", True, why))
            config = _compiling(config)
    return _with_wait(_with_cache(config, cache), wait), (*kept, *decided)


def _sampled_on_cpu(config: RunConfig, steps: Callable[[], int]) -> int:
    """Tokens at most that one vLLM engine samples on this machine's CPU, where it could gain by
    compiling and is left to decide; else 0. What it gains is what its threads wait for each other:
    nothing with one."""
    rollout, train = config.rollout, config.train
    engine, takes = resolve_engine(rollout), rollout.resources
    if not isinstance(engine, VLLMSpec) or takes.gpus or (takes.threads or takes.cpus) < 2:
        return 0
    set_ = "compiles" in engine.model_fields_set or not engine.options.keys().isdisjoint(COMPILING)
    if set_ or not _can_compile():
        return 0
    completions = steps() * train.groups_per_step * (train.completions_per_group or 1)
    return completions * rollout.max_completion_length // rollout.replicas


def _can_compile() -> bool:
    """Whether what torch compiles with is here: a compiler, and Python's headers."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(os.environ.get("CXX") or "g++") is not None and header.is_file()


def _compiling(config: RunConfig) -> RunConfig:
    """With a vLLM that compiles. The keys stay open: an evaluation of what was trained is short."""
    rollout = config.rollout
    engine = with_open(resolve_engine(rollout), "compiles", True)
    if rollout.engine.name == "auto":
        rollout = with_open(rollout, "engine", engine)
    else:
        rollout = rollout.model_copy(update={"engine": engine})
    return config.model_copy(update={"rollout": rollout})


def _with_cache(config: RunConfig, gib: float | None) -> RunConfig:
    """With vLLM's cache on a GPU that others share. The key stays open: on other machines, and in
    another share of a GPU, it is another."""
    if gib is None:
        return config
    rollout = config.rollout
    engine = with_open(rollout.engine, CACHE.rpartition(".")[2], gib)
    return config.model_copy(update={"rollout": rollout.model_copy(update={"engine": engine})})


def _with_wait(config: RunConfig, seconds: float | None) -> RunConfig:
    """With more time for a group. The key stays open: on other machines it is another."""
    if seconds is None:
        return config
    rollout = with_open(config.rollout, WAIT.rpartition(".")[2], seconds)
    return config.model_copy(update={"rollout": rollout})


def _check_engine(config: RunConfig) -> None:
    """Whether vLLM, where it is named, computes on what its replicas have. Raises UserError."""
    named = config.rollout.engine.name == "vllm" and vllm_is_installed()
    if named and not config.rollout.resources.gpus and not vllm_needs_no_gpu():
        raise UserError(
            "rollout.engine is vllm, which is installed in a build that needs a GPU, and "
            "rollout.resources.gpus is 0; give rollouts a GPU, or set rollout.engine=transformers"
        )


def settled(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with these open settings as if they had been set. Raises UserError."""
    if not values:
        return config
    tree = settled_tree(config, values)
    return resolve(validate({**tree, "algorithm": config.algorithm}))


def _kept(config: RunConfig, previous: Mapping[str, Any]) -> list[Decision]:
    """What the run that goes on has for settings that belong to it."""
    made = []
    for path in OF_THE_RUN:
        value: Any = previous
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in (None, AUTO) and path in open_settings(config):
            made.append(Decision(path, value, KEPT))
    if not config.algorithm.needs.critic:
        made = [one for one in made if not one.path.startswith("critic.")]
    free = {f"{one.role}.ranks" for one in (config.policy, config.critic) if one.strategy.reshards}
    return [one for one in made if one.path not in free]


def _prepared(
    config: RunConfig, there: Machines, shape_of: Callable[[str], ModelShape] | None
) -> Work:
    """The work as far as programs go: what is not installed here is not chosen for here."""
    work = work_of(config, shape_of or (lambda name: loaded_shape(config.model, name)))
    if there.here and importlib.util.find_spec("deepspeed") is None:
        critic = work.critic and replace(work.critic, others=())
        work = replace(work, policy=replace(work.policy, others=()), critic=critic)
    elsewhere = not there.here and any(node.gpus for node in there.cluster.nodes)
    nowhere = there.here and not any(node.gpus for node in there.cluster.nodes)
    if nowhere and config.rollout.engine.name == "auto" and not vllm_needs_no_gpu():
        work = replace(work, rollout=replace(work.rollout, engine="transformers"))
    if elsewhere and config.rollout.engine.name == "auto":  # vLLM comes with GPUs
        work = replace(work, rollout=replace(work.rollout, engine="vllm"))
    return work
