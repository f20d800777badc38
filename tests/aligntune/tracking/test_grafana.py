"""The Grafana dashboard shows what a run writes, under the names that Prometheus gets."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

from actors.preference.worker import METRICS
from aligntune import create_rl_trainer
from aligntune.online.figures import ACTIVITIES
from aligntune.tracking.grafana import ROWS, dashboard, exported, metrics
from aligntune.tracking.trackers import Prometheus, gauge_name
from tests.cluster.hosts import tiny_run
from tests.cluster.nodes import wait_for
from tests.stand_ins import REPOSITORY

WRITERS = [
    *(REPOSITORY / "aligntune" / "algorithms").glob("*.py"),
    *(REPOSITORY / "aligntune" / "online" / name for name in ("figures.py", "evaluation.py")),
    *(REPOSITORY / "actors" / name for name in ("ranks.py", "policy.py", "critic.py")),
    REPOSITORY / "aligntune" / "online" / "controller.py",
]


def written() -> set[str]:
    """Names of metrics in the code that makes them; `time/...` of activities, `eval/...` of
    evaluations and the parts of a role have their first half put before them there."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in WRITERS)
    names = set(re.findall(r'"((?:[a-z_]+/)+[a-z_]+)"', text))
    names |= set(re.findall(r'f"\{prefix\}([a-z_]+/[a-z_]+)"', text))
    names |= {*METRICS.values()}  # of a job over a table
    names |= {f"eval/{name}" for name in names}
    roles = re.findall(r'f"\{[a-z._]+\}/([a-z_]+)"', text)
    names |= {f"{role}/{name}" for name in roles for role in ("policy", "critic")}
    return names


def test_every_metric_of_the_dashboard_is_one_that_a_run_writes() -> None:
    busy = {f"time/{name}" for name in ("rollout", "reward", "reference", "update", "weight_sync")}
    assert busy <= {f"time/{name}" for name in ACTIVITIES}
    assert metrics() - busy <= written()


def test_the_loss_of_every_kind_of_run_is_shown() -> None:
    shown = {title: names for title, _, names in ROWS["Learning"]}["Loss"]
    assert {"loss", "eval/loss", "loss/policy", "loss/total"} <= {*shown}


def test_the_dashboard_asks_prometheus_for_the_gauges_of_a_run() -> None:
    tree = json.loads(dashboard())
    asked = {
        name
        for panel in tree["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"ray_aligntune_\w+", target["expr"])
    }
    assert asked == {exported(metric) for metric in metrics()}
    assert len(asked) == len(metrics())
    assert exported("reward/mean") == "ray_" + gauge_name("reward/mean")
    numbers = [panel["id"] for panel in tree["panels"]]
    assert len(set(numbers)) == len(numbers)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in tree["panels"]]
    assert len(set(places)) == len(places)


def gauges(run: str) -> dict[str, float]:
    """What Ray exports of a run here, by the name that Prometheus gets."""
    import ray

    (node,) = [n for n in ray.nodes() if n["Alive"]]
    # No proxy: the port is of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = opener.open(url, timeout=10).read().decode()
    found = re.findall(r"^(ray_aligntune_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, tags, value in found if f'run="{run}"' in tags}


def test_two_figures_of_one_gauge_name_are_both_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, *_: object) -> None:
            self.name = name

        def set_default_tags(self, tags: object) -> Gauge:
            return self

        def set(self, value: float) -> None:
            shown[self.name] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    tracker = Prometheus("my-run")
    names = ("reward/正确/mean", "reward/错误/mean", "reward/mean", "reward/a-b/mean")
    for step in (1, 2):
        figures = {name: step + 10.0 * place for place, name in enumerate(names)}
        tracker.log(step, {**figures, "reward/a_b/mean": -1.0})
    assert shown == {
        "aligntune_step": 2.0,
        "aligntune_reward____mean": 2.0,
        "aligntune_reward____mean_2": 12.0,
        "aligntune_reward_mean": 22.0,
        "aligntune_reward_a_b_mean": 32.0,
        "aligntune_reward_a_b_mean_2": -1.0,
    }


@pytest.mark.slow
def test_figures_come_out_of_rays_metrics_port(ray_session: None) -> None:
    tracker = Prometheus("my-run")
    tracker.log(1, {"reward/mean": 0.25, "reward/my criterion/mean": 1.0})
    tracker.log(2, {"reward/mean": 0.5})
    wanted = {"reward_mean": 0.5, "reward_my_criterion_mean": 1.0, "step": 2.0}
    expected = {f"ray_aligntune_{name}": value for name, value in wanted.items()}
    wait_for(lambda: gauges("my-run") == expected, "the gauges", 60)


@pytest.mark.long
def test_a_real_run_exports_what_the_dashboard_shows(
    ray_session: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = tiny_run(tmp_path, tiny_model, steps=2)
    tree |= {"algorithm": {"name": "grpo", "beta": 0.04}, "tracking": {"trackers": ["prometheus"]}}
    tree["data"] |= {"split": "train[2:]", "eval_split": "train[:2]"}
    create_rl_trainer(config=tree).train()
    others = {"loss/value", "critic/grad_norm", "rollout/kv_cache_used"}  # of a critic, of vLLM
    shown = {exported(metric) for metric in metrics() - others}
    wait_for(lambda: shown <= set(gauges("tiny")), "the gauges", 60)
