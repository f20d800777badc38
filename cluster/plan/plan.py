"""The pre-flight of a run: where each rank goes, what it keeps in memory, what a step will cost.

Pure functions over a description of the run (`plan_work`) and of the cluster (`resources`): nothing
is started, nothing is measured. A run that cannot fit is refused with what is short, on which
device, by how much, and which settings would make it fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cluster.bundles import bundle_sets
from cluster.placement import DoesNotFit, Placement, Shortage, place
from cluster.plan.durations import ASSUMPTIONS, Times, group_seconds
from cluster.plan.fit import (
    Draft,
    Short,
    Use,
    draft_of,
    excess,
    gib,
    rates_of,
    shortest,
    times_of,
    try_draft,
)
from cluster.plan.memory import Memory
from cluster.plan.options import Option, to_be_faster, to_fit
from cluster.plan.work import Work
from cluster.resources import Cluster

WORTH = 0.9  # a change is proposed where the step takes at most this share of its time
MOST_FITTING = 3  # changes that are named where a run does not fit
MOST_TOGETHER = 6
MOST_CHANGES = 5


@dataclass(frozen=True)
class Change:
    """A setting that the plan would change, and the step time with it, in seconds."""

    settings: str
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """A run that fits."""

    work: Work
    cluster: Cluster
    placement: Placement
    memory: Mapping[str, Memory]
    uses: tuple[Use, ...]
    times: Times
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    decided: tuple[str, ...] = ()  # what the config left open, in lines

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures rest on."""
        return (*ASSUMPTIONS, *self.notes)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for --json: bytes, seconds, shares."""
        nodes = self.cluster.nodes
        stalenesses = sorted({0, 1, self.work.step.max_staleness})
        return {
            "decided": list(self.decided),
            "cluster": {
                "source": self.cluster.source,
                "nodes": [node._asdict() for node in nodes],
            },
            "placement": {
                role: [{"node": nodes[s.node].name, "devices": list(s.devices)} for s in slots]
                for role, slots in self.placement.slots.items()
            },
            "memory": {
                role: {"device": m.device, "device_peak": m.peak, "host": m.host}
                for role, m in self.memory.items()
            },
            "devices": [
                {
                    "node": nodes[use.node].name,
                    "device": use.device,
                    "roles": [f"{role} {index}" for role, index in use.occupants],
                    "bytes": use.bytes,
                    "capacity": use.capacity,
                }
                for use in self.uses
            ],
            "seconds": self.times.parts,
            "bound": self.times.bound,
            "staleness": {
                str(bound): {
                    "step_seconds": self.times.step(bound),
                    "idle_rollout": self.times.idle(bound)[0],
                    "idle_policy": self.times.idle(bound)[1],
                }
                for bound in stalenesses
            },
            "changes": [vars(change) for change in self.changes],
            "assumptions": list(self.assumptions),
        }


def make_plan(work: Work, cluster: Cluster) -> Plan:
    """The plan of `work` on `cluster`.

    Raises:
        DoesNotFit: no place, or too little memory; one line with what would fit.
        BadRequest: see `bundle_sets`.
        UnknownName: GPUs whose type is not known.
    """
    found = place(bundle_sets(work.requests, work.colocate), cluster)
    if isinstance(found, Shortage):
        raise DoesNotFit(str(found))
    draft = draft_of(work, cluster, found)
    if short := shortest(draft, work):
        raise DoesNotFit(_explain(short, draft, work, cluster))
    seconds = times_of(draft, work, cluster)
    return Plan(
        work,
        cluster,
        found,
        draft.memory,
        draft.uses,
        seconds,
        tuple(_faster(work, cluster, seconds)),
        (*_notes(work, cluster, draft), *_too_short(work, cluster, draft, seconds)),
    )


def _explain(short: Short, draft: Draft, work: Work, cluster: Cluster) -> str:
    use, role = short.use, short.roles[0]
    memory = draft.memory[role]
    held = memory.host if use.device is None and memory.on_gpu else memory.device
    kinds = {kind: v for kind, v in held.items() if v > 0.02 * sum(held.values())}
    parts = ", ".join(
        f"{kind} {gib(v)}" for kind, v in sorted(kinds.items(), key=lambda item: -item[1])
    )
    place_name = cluster.nodes[use.node].name
    where = f"{place_name}, GPU {use.device}" if use.device is not None else f"{place_name}, host"
    who = ", ".join(f"{role} {index}" for role, index in use.occupants[:4])
    if len(use.occupants) > 4:
        who += f" and {len(use.occupants) - 4} more"
    if short.cache:
        said = (
            f"{where} ({who}): after weights and workspace vLLM's share leaves {gib(short.by)} too "
            f"little KV cache for one sequence of {work.step.row} tokens"
        )
    else:
        said = (
            f"{where} ({who}) needs {gib(use.bytes)} and has {gib(use.capacity or 0)}: "
            f"{gib(short.by)} short"
        )
    return f"{said} ({role}: {parts}); {_would_fit(short.roles, work, cluster)}"


def _would_fit(roles: tuple[str, ...], work: Work, cluster: Cluster) -> str:
    """Options that make the run fit, each alone; else several, each for what is short the most."""
    found: list[Option] = []
    for option in _options(work, roles):
        if any(one.settings.keys() <= option.settings.keys() for one in found):
            continue  # less of the same does
        if excess(option.work, cluster) == 0:
            found.append(option)
        if len(found) == MOST_FITTING:
            break
    if found:
        return f"what would fit: {', or '.join(option.describe() for option in found)}"
    taken = Option({}, work)
    for _ in range(MOST_TOGETHER):
        scored = [
            (by, option)
            for option in _options(taken.work, roles)
            if (by := excess(option.work, cluster)) is not None
        ]
        best = next(_with_place(scored, cluster), None)
        if best is None:
            break
        option, draft = best
        taken = option.after(taken)
        short = shortest(draft, taken.work)
        if short is None:
            return f"what would fit: {taken.describe()}"
        roles = short.roles
    return (
        f"no setting that a plan tries makes it fit, {roles[0]} stays too large; take a smaller "
        "model, or GPUs or nodes with more memory"
    )


def _with_place(
    scored: list[tuple[int, Option]], cluster: Cluster
) -> Iterator[tuple[Option, Draft]]:
    """Options that have a place, by what they leave short."""
    for _, option in sorted(scored, key=lambda score: score[0]):
        if draft := try_draft(option.work, cluster):
            yield option, draft


def _options(work: Work, roles: Iterable[str]) -> Iterator[Option]:
    """Options that make any of `roles` smaller."""
    return chain.from_iterable(to_fit(work, role) for role in roles)


def _faster(work: Work, cluster: Cluster, now: Times) -> Iterator[Change]:
    """Options with which a step is clearly shorter, the best first."""
    seconds = now.step(work.step.max_staleness)
    changes: dict[float, Change] = {}
    for option in to_be_faster(work):
        draft = try_draft(option.work, cluster)
        if draft is None or shortest(draft, option.work):
            continue
        then = times_of(draft, option.work, cluster).step(option.work.step.max_staleness)
        if then <= WORTH * seconds:
            changes.setdefault(then, Change(option.describe(), then))  # the first is the simplest
    yield from sorted(changes.values(), key=lambda change: change.step_seconds)[:MOST_CHANGES]


def _notes(work: Work, cluster: Cluster, draft: Draft) -> Iterator[str]:
    """What is assumed of this run in particular."""
    for shape in dict.fromkeys(one.shape for one in work.models):
        yield f"sizes of {shape.name}: {_count(shape.parameters)} parameters, {shape.source}"
    unknown = {use.node for use in draft.uses if use.capacity is None}
    if unknown:
        name = cluster.nodes[min(unknown)].name
        yield f"memory of the host is not known of {len(unknown)} node(s), such as {name}"


def _too_short(work: Work, cluster: Cluster, draft: Draft, seconds: Times) -> Iterator[str]:
    """Limits of time that this run goes beyond with all completions at theirs."""
    rates = rates_of(draft.placement, work, cluster)["rollout"]
    group = group_seconds(work.rollout, work.step, rates, draft.memory["rollout"])
    if group > work.rollout.timeout_s:
        vllm = work.rollout.engine == "vllm"
        fewer = ", or lower rollout.max_concurrent_groups" if vllm else ""
        yield (
            f"a group may take {group:.3g} s, and a replica is lost after "
            f"rollout.generation_timeout_s={work.rollout.timeout_s:g}: raise it{fewer}"
        )
    if seconds.update > work.policy.timeout_s:
        yield (
            f"an update takes {seconds.update:.3g} s, and the ranks are lost after "
            f"policy.update_timeout_s={work.policy.timeout_s:g}: raise it"
        )


def _count(parameters: float) -> str:
    """A number of parameters as it is said: 7.6B, 345K."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.3g}{letter}"
    return f"{parameters:.0f}"
