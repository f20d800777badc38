"""The figures of one step, from records and scores. Pure; no token arrays."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from aligntune.algorithms.base import SCORE
from aligntune.config.online import RunConfig
from aligntune.errors import UserError, nearest
from aligntune.online.groups import ReadyGroup, compared_scores, raw_scores, truncated

EXPORTS = ("export_weights", "export_changes", "export_adapter", "send")
LOADS_WEIGHTS = ("load_weights", "receive_weights")
ACTIVITIES = {
    "rollout": ("generate",),
    "reward": ("score",),
    "reference": ("logprobs",),
    "prepare": ("values", "prepare"),
    "update": ("update",),
    "weight_sync": (*EXPORTS, *LOADS_WEIGHTS),
}
"""The remote calls that each `time/<activity>` is the time of."""

POLICY = "policy"
BUSY = {
    **ACTIVITIES,
    POLICY: ("values", "prepare", "update", *EXPORTS),
}
"""With those in which the ranks are not idle: replicas load weights without them."""

EPISODE_COUNTS = {
    "turns/extended": "extended",
    "turns/realigned": "realigned",
    "turns/forked": "forked",
    "tools/calls": "tool_calls",
    "tools/failed": "tools_failed",
    "tools/timed_out": "tools_timed_out",
    "tools/malformed": "malformed_calls",
    "episodes/retried": "retried",
    "episodes/lost": "lost",
}
"""A metric and the field of EpisodeFigures that it is the sum of."""

# A field of ReplicaLoad: its metric, and what the replicas' means become together.
LOADS: Mapping[str, tuple[str, Callable[[list[float]], float]]] = {
    "tokens_per_s": ("rollout/tokens_per_s", sum),
    "running": ("rollout/running", statistics.fmean),
    "queue": ("rollout/queue", statistics.fmean),
    "kv_cache_used": ("rollout/kv_cache_used", statistics.fmean),
}


def score_metrics(
    config: RunConfig, groups: Sequence[ReadyGroup], prefix: str = ""
) -> dict[str, float]:
    """Mean of every criterion, and mean and population std of the weighted reward.

    Of the completions that have one; a figure of a criterion that abstained from all is left out.
    """
    pooled: dict[str, list[float]] = {}
    for group in groups:
        for name, values in raw_scores(config, group.scores).items():
            pooled.setdefault(name, []).extend(values)
    reward = pooled.pop(SCORE)
    figures = {}
    if reward:
        figures[f"{prefix}reward/mean"] = statistics.fmean(reward)
        figures[f"{prefix}reward/std"] = statistics.pstdev(reward)
    return figures | {
        f"{prefix}reward/{name}/mean": statistics.fmean(v) for name, v in pooled.items() if v
    }


def check_best(config: RunConfig, criteria: Sequence[str]) -> None:
    """Whether evaluations have the figure that says which checkpoint is best; `criteria` are the
    names of the rewards. Raises UserError, with what was meant."""
    best = config.checkpoint.best
    if best is None:
        return
    named = [f"reward/{name}/mean" for name in criteria]
    lengths = [
        f"completions/{name}" for name in ("length_mean", "length_max", "truncated_fraction")
    ]
    played = ["turns/mean", "turns/max", *EPISODE_COUNTS] if config.plays else []
    known = [f"eval/{name}" for name in ("reward/mean", "reward/std", *named, *lengths, *played)]
    if best.metric not in known:
        raise UserError(
            f"checkpoint.best.metric={best.metric} is no figure of this run's evaluations: "
            f"{nearest(best.metric, known)}"
        )


def completion_metrics(groups: Sequence[ReadyGroup], prefix: str = "") -> dict[str, float]:
    """Lengths in sampled tokens, and the fraction cut by a limit."""
    lengths = [length for group in groups for length in group.record.sampled_lengths]
    cut = [cut for group in groups for cut in truncated(group.record)]
    return {
        f"{prefix}completions/length_mean": statistics.fmean(lengths),
        f"{prefix}completions/length_max": float(max(lengths)),
        f"{prefix}completions/truncated_fraction": sum(cut) / len(cut),
    }


def episode_metrics(groups: Sequence[ReadyGroup], prefix: str = "") -> dict[str, float]:
    """Turns, tools and what environments wrote; empty where rollouts are no episodes.

    Counts are sums over the groups; `time/tools`, of a training step, is a mean over episodes.
    """
    played = [group.record for group in groups if group.record.episodes is not None]
    if not played:
        return {}
    sums: Counter[str] = Counter()
    for record in played:
        if record.episodes is not None:
            sums.update(record.episodes.figures)
    turns = [count for record in played for count in record.turns]
    tokens = sum(sum(record.lengths) for record in played)
    sampled = sum(sum(record.sampled) for record in played)
    counts = {name: float(sums[field]) for name, field in EPISODE_COUNTS.items()}
    figures = {
        "turns/mean": statistics.fmean(turns),
        "turns/max": float(max(turns)),
        "tokens/environment_fraction": 1 - sampled / tokens,
        **({} if prefix else {"time/tools": sums["tool_seconds"] / len(turns)}),
        **counts,
    }
    return {f"{prefix}{name}": value for name, value in figures.items()}


def group_metrics(
    config: RunConfig, groups: Sequence[ReadyGroup], version: int, ended: Mapping[str, int]
) -> dict[str, float]:
    """How many groups ended which way in this step, how many were constant, and their age.

    Constant ones say nothing where groups have one completion, or a critic is the baseline: then
    that figure is left out.
    `ended` counts the groups filtered and quarantined since the last step; ages are in policy
    versions, of the oldest token of each group. With dynamic sampling, also how many groups were
    drawn for each that was kept.
    """
    scores = [compared_scores(config, group.scores) for group in groups]
    ages = [version - group.record.oldest_version for group in groups]
    compared = not config.algorithm.needs.critic and any(len(table[SCORE]) > 1 for table in scores)
    constant = sum(not config.algorithm.contrast(table) for table in scores) / len(scores)
    draws, drawn = config.algorithm.sampling_rounds is not None, len(groups) + ended["filtered"]
    return {
        "groups/trained": float(len(groups)),
        "groups/filtered": float(ended["filtered"]),
        "groups/quarantined": float(ended["quarantined"]),
        **({"groups/constant_fraction": constant} if compared else {}),
        **({f"{config.algorithm_name}/draws_per_kept_group": drawn / len(groups)} if draws else {}),
        "staleness/mean": statistics.fmean(ages),
        "staleness/max": float(max(ages)),
    }


def rollout_metrics(groups: Sequence[ReadyGroup]) -> dict[str, float]:
    """What the replicas did while the step's groups were in flight, and how long the groups took.

    A replica's figures are means over its groups, with those of the replica that it replaces: both
    have one place, by which they are named. `tokens_per_s` is their sum over replicas, the others
    their mean. With several replicas each has its own too. A figure that an engine does not have is
    left out.
    """
    by_place: dict[str, dict[str, list[float]]] = {}
    for group in groups:
        if group.record.load is not None:
            place = group.record.replica.partition(".")[0]
            seen = by_place.setdefault(place, {})
            for name, value in vars(group.record.load).items():
                if value is not None:
                    seen.setdefault(name, []).append(value)
    means = {
        place: {name: statistics.fmean(values) for name, values in seen.items()}
        for place, seen in sorted(by_place.items())
    }
    seconds = [group.record.seconds for group in groups]
    figures = {
        "rollout/group_s_mean": statistics.fmean(seconds),
        "rollout/group_s_max": max(seconds),
    }
    for name, (metric, together) in LOADS.items():
        values = [of[name] for of in means.values() if name in of]
        if values:
            figures[metric] = together(values)
    if len(means) > 1:
        for place, of in means.items():
            figures |= {f"rollout/{place}/{name}": value for name, value in of.items()}
    return figures


def time_metrics(
    step_s: float, busy: Mapping[str, float], groups: Sequence[ReadyGroup]
) -> dict[str, float]:
    """Seconds by activity and throughput of the step.

    `busy` has, for each key of `BUSY`, wall seconds of it with at least one such call running. A
    role is idle for the rest of the step.
    """
    tokens = sum(sum(group.record.sampled) for group in groups)
    samples = sum(len(group.record.finish_reasons) for group in groups)
    return {
        "time/step": step_s,
        **{f"time/{name}": busy[name] for name in ACTIVITIES},
        "time/idle_rollout": max(0.0, step_s - busy["rollout"]),
        "time/idle_policy": max(0.0, step_s - busy[POLICY]),
        "throughput/tokens_per_s": tokens / step_s,
        "throughput/samples_per_s": samples / step_s,
    }


class StepFigures:
    """The figures of one step, gathered while it goes on."""

    def __init__(self, config: RunConfig, version: int) -> None:
        """The step starts now, from policy `version`."""
        self._config = config
        self._version = version
        self._started = time.monotonic()
        self.prepared: dict[str, float] = {}
        self.updated: dict[str, float] = {}
        self.served: dict[str, float] = {}
        self.filtered = 0  # groups, since the last step
        self.quarantined = 0

    def row(self, groups: Sequence[ReadyGroup], busy: Mapping[str, float]) -> dict[str, float]:
        """All of them, now that the step has ended; `busy` is as in `time_metrics`."""
        ended = {"filtered": self.filtered, "quarantined": self.quarantined}
        return {
            **score_metrics(self._config, groups),
            **completion_metrics(groups),
            **episode_metrics(groups),
            **rollout_metrics(groups),
            **group_metrics(self._config, groups, self._version, ended),
            **self.prepared,
            **self.updated,
            **self.served,
            **time_metrics(time.monotonic() - self._started, busy, groups),
        }
