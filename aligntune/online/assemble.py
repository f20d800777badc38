"""Wires the parts of a run together; no part makes another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from actors.messages import Prompt
from actors.reward import Criterion
from actors.supervise import ReplicaSet
from actors.timeline import Timeline
from actors.transfer.base import Transport
from actors.transfer.deltas import Deltas
from actors.transfer.ipc import Ipc
from actors.transfer.nccl import Nccl
from actors.transfer.object_store import ObjectStore
from aligntune.config.online import RunConfig
from aligntune.data.prompts import PromptSource
from aligntune.online.controller import Controller
from aligntune.online.doing import doing
from aligntune.online.evaluation import Evaluation
from aligntune.online.handover import Handover
from aligntune.online.keeper import Keeper
from aligntune.online.learner import Learner
from aligntune.online.ledger import Ledger, LedgerLog, at_end_of_tick
from aligntune.online.pipeline import Pipeline
from aligntune.online.rank_starts import RankStarts
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.role_table import ROLES
from aligntune.online.roles import Roles
from aligntune.online.rolling import Rolling
from aligntune.online.serving import Serving
from aligntune.online.state import RunState
from aligntune.online.stopping import Stopping
from aligntune.online.watch import Watch
from aligntune.online.weights import WeightSync
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.mirror import Mirror
from aligntune.runs.rundir import RunDir
from cluster.processes import ray_processes


def assemble(
    config: RunConfig,
    roles: Roles,
    total_steps: int,
    prompts: PromptSource,
    eval_prompts: Sequence[Prompt],
    rundir: RunDir,
    checkpoints: Checkpoints,
    recorder: OnlineRecorder,
    mirror: Mirror | None = None,
    criteria: Sequence[Criterion] = (),
    *,
    learner: Learner | None = None,
    replica_set: Callable[..., ReplicaSet] = ReplicaSet,
) -> Controller:
    """The controller of a run with everything it drives. `criteria` are its rewards.

    `learner` and `replica_set` stand for processes: another one of each is a run without Ray.
    """
    state, changed = RunState(config.algorithm), asyncio.Event()
    log = LedgerLog(rundir.file("ledger.jsonl"), at_end_of_tick)
    ledger = Ledger(log)
    learner = learner or Learner(
        config, roles.maker(ROLES["policy"]), roles.maker(ROLES["critic"]), changed.set
    )
    sends = transport(
        config,
        learner,
        lambda: {each.name: each.index for each in serving.rollouts.replicas.reached},
    )
    weights = WeightSync(
        sends,
        sends if sends.rereadable else ObjectStore(learner.export),
        changed,
        recorder.event,
        lambda: serving.rollouts.serving,
        timeout_s=config.rollout.weight_timeout_s,
        rebuild_s=config.rollout.start_timeout_s,
    )
    serving = Serving(
        config, roles, recorder.event, recorder.role, weights.catch_up, replica_set=replica_set
    )
    rolling = Rolling(config, serving.rollouts, serving.rewards, serving.environments, criteria)
    pipeline = Pipeline(
        config,
        state,
        total_steps,
        ledger,
        prompts.prompt_at,
        rolling,
        serving.references,
        recorder.event,
        changed,
    )
    stopping = Stopping(state, changed)
    evaluation = Evaluation(config, total_steps, eval_prompts, rolling, recorder)
    keeper = Keeper(config, learner, log, prompts.fingerprint, checkpoints, mirror, recorder)
    timeline = Timeline(recorder.call)
    recorder.watch(lambda: doing(timeline.open, config))
    return Controller(
        config,
        state,
        total_steps,
        ledger=ledger,
        learner=learner,
        serving=serving,
        weights=weights,
        pipeline=pipeline,
        evaluation=evaluation,
        keeper=keeper,
        recorder=recorder,
        timeline=timeline,
        watch=Watch(config, recorder, timeline, learner, serving, keeper, ray_processes()),
        stopping=stopping,
        starts=RankStarts(config, learner, keeper, recorder, stopping),
        handover=Handover(config, state, weights, serving, evaluation, pipeline, stopping, changed),
        changed=changed,
    )


def transport(
    config: RunConfig, learner: Learner, serving: Callable[[], Mapping[str, int]]
) -> Transport:
    """What `rollout.weight_sync` names. `serving()` names the replicas that get new weights, each
    with its index."""
    match config.rollout.weight_sync.name:
        case "delta":
            return Deltas(learner.export_changes)
        case "adapter":
            return ObjectStore(learner.export_adapter)
        case "nccl":
            return Nccl(
                learner.send,
                learner.send_beside,
                serving,
                workers=config.rollout.engine.shards,
                timeout_s=config.rollout.weight_timeout_s,
            )
        case "ipc":
            return Ipc(learner.send, serving, timeout_s=config.rollout.weight_timeout_s)
        case _:
            return ObjectStore(learner.export)
