"""A Grafana dashboard for a run's gauges and for the Ray cluster under it.

Grafana imports it as it is; it asks for a Prometheus that scrapes the nodes' metrics ports.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Panel: (title, unit of Grafana, metrics of the run). One row of the dashboard each.
ROWS: Mapping[str, Sequence[tuple[str, str, Sequence[str]]]] = {
    "Learning": (
        ("Reward", "none", ("reward/mean", "eval/reward/mean")),
        ("KL", "none", ("kl/reference", "kl/rollout_vs_policy", "kl/update")),
        ("Loss", "none", ("loss", "eval/loss", "loss/policy", "loss/value", "loss/total")),
        ("Entropy", "none", ("policy/entropy",)),
        ("Gradient norm", "none", ("policy/grad_norm", "critic/grad_norm")),
        ("Clipped", "percentunit", ("policy/clip_fraction",)),
    ),
    "Data": (
        ("Completion length", "none", ("completions/length_mean", "completions/length_max")),
        ("Cut at the limit", "percentunit", ("completions/truncated_fraction",)),
        ("Groups", "none", ("groups/trained", "groups/filtered", "groups/quarantined")),
        ("Constant groups", "percentunit", ("groups/constant_fraction",)),
        ("Staleness", "none", ("staleness/mean", "staleness/max")),
    ),
    "Speed": (
        (
            "Where a step's time goes",
            "s",
            (
                "time/step",
                "time/rollout",
                "time/reward",
                "time/reference",
                "time/update",
                "time/weight_sync",
            ),
        ),
        ("Idle", "s", ("time/idle_rollout", "time/idle_policy")),
        ("Tokens per second", "none", ("throughput/tokens_per_s", "rollout/tokens_per_s")),
        ("Completions in the engines", "none", ("rollout/running", "rollout/queue")),
        ("KV cache in use", "percentunit", ("rollout/kv_cache_used",)),
        ("Seconds of a group", "s", ("rollout/group_s_mean", "rollout/group_s_max")),
    ),
}
# Of Ray itself: (title, unit, query, legend).
NODES = (
    ("CPU", "percent", "ray_node_cpu_utilization", "{{instance}}"),
    ("Memory", "bytes", "ray_node_mem_used", "{{instance}}"),
    ("GPU", "percent", "ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}"),
    ("Object store", "bytes", "sum by (instance) (ray_object_store_memory)", "{{instance}}"),
)
WIDTH, HEIGHT = 8, 7  # of a panel; a row has 24


def metrics() -> set[str]:
    """Every metric of a run that the dashboard shows."""
    return {name for panels in ROWS.values() for _, _, names in panels for name in names}


def exported(metric: str) -> str:
    """A run's metric under the name that Prometheus knows it by."""
    return "ray_aligntune_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


def dashboard() -> str:
    """The dashboard as JSON."""
    rows = {
        title: [
            (name, unit, [(f'{exported(m)}{{run=~"$run"}}', f"{{{{run}}}} {m}") for m in shown])
            for name, unit, shown in panels
        ]
        for title, panels in ROWS.items()
    }
    rows["Cluster"] = [(name, unit, [(query, legend)]) for name, unit, query, legend in NODES]
    panels: list[dict[str, Any]] = []
    top = 0
    for title, shown in rows.items():
        panels.append(
            {
                "type": "row",
                "title": title,
                "id": len(panels) + 1,
                "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
                "panels": [],
            }
        )
        top += 1
        for index, (name, unit, queries) in enumerate(shown):
            place = {"x": index % 3 * WIDTH, "y": top + index // 3 * HEIGHT}
            panels.append(_panel(len(panels) + 1, name, unit, queries, place))
        top += (len(shown) + 2) // 3 * HEIGHT
    return json.dumps(_around(panels), indent=1) + "\n"


def _panel(
    number: int,
    title: str,
    unit: str,
    queries: Sequence[tuple[str, str]],
    place: Mapping[str, int],
) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": title,
        "id": number,
        "gridPos": {**place, "w": WIDTH, "h": HEIGHT},
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(queries)
        ],
    }


def _around(panels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "title": "aligntune",
        "uid": "aligntune",
        "schemaVersion": 39,
        "tags": ["aligntune", "ray"],
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "10s",
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${source}"},
                    "query": f"label_values({exported('step')}, run)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
        "panels": list(panels),
    }
