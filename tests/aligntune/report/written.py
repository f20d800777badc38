"""Run directories as runs write them, made by a formula: what reports are tested on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HOSTILE = (
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<!-- <script> \u2028\u2029 -->",
    "${window.ran = 1} {{ 7 * 7 }} {% raw %}",
    "\u202eright to left\u202c \x00\x1b[31m 😀 \ud800 ﷽",
)
"""Completions that would do harm in a page that is not careful."""

CONFIG = """\
# aligntune 0.1.0
# torch 2.13.0
# ran with engine: vllm 0.32.0
algorithm: {name: grpo, beta: 0.1, aggregation: sequence_mean}
model: {name: models/qwen, dtype: float32}
data: {path: data/train.jsonl}
train: {steps: 300, seed: 1}
policy: {learning_rate: 1.0e-05}
output_dir: runs/sums
"""


def lines(path: Path, rows: Iterable[Mapping[str, Any]], torn: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn, encoding="utf-8")


def figures(step: int, steps: int, lift: float) -> dict[str, Any]:
    """The figures of a step of a run that learns."""
    done = step / steps
    wave = math.sin(step * 1.7) + 0.5 * math.sin(step * 0.37)
    reward = 0.3 + lift * done**0.5 + 0.03 * wave
    return {
        "step": step,
        "reward/mean": reward,
        "reward/std": 0.3 - 0.2 * done,
        "reward/exact_match/mean": reward * 0.8,
        "reward/format/mean": min(1.0, reward * 1.2),
        "loss/policy": 0.01 * wave,
        "loss/total": 0.01 * wave + 0.002,
        "kl/reference": 0.002 + 0.08 * done,
        "kl/rollout_vs_policy": 1e-5 * (2 + wave),
        "kl/update": 1e-4,
        "policy/entropy": 1.2 - 0.7 * done + 0.01 * wave,
        "policy/clip_fraction": 0.02 + 0.005 * wave,
        "policy/grad_norm": 0.6 + 0.2 * wave,
        "policy/learning_rate": 1e-5,
        "policy/ratio_max": 1.3,
        "completions/length_mean": 140 + 60 * done + 4 * wave,
        "completions/length_max": 256.0,
        "completions/truncated_fraction": 0.05 + 0.02 * wave,
        "groups/trained": 32.0,
        "groups/filtered": 0.0,
        "groups/quarantined": 1.0 if step == steps // 2 else 0.0,
        "groups/constant_fraction": 0.2 + 0.4 * done,
        "staleness/mean": 0.6,
        "staleness/max": 1.0,
        "rollout/tokens_per_s": 9000 + 300 * wave,
        "rollout/running": 60.0,
        "rollout/queue": 4.0,
        "rollout/kv_cache_used": 0.4,
        "rollout/group_s_mean": 6.0,
        "rollout/group_s_max": 11.0,
        "time/step": 42 + wave,
        "time/rollout": 36 + wave,
        "time/reward": 3.0,
        "time/reference": 4.0,
        "time/prepare": 0.5,
        "time/update": 24.0,
        "time/weight_sync": 1.2,
        "time/idle_rollout": 6.0,
        "time/idle_policy": 16.0,
        "throughput/tokens_per_s": 8000 + 250 * wave,
        "throughput/samples_per_s": 6.0,
    }


def completion(text: str, reward: float, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": tokens,
        "finish_reason": "length" if tokens >= 256 else "stop",
        "scores": {"exact_match": reward, "format": 1.0},
        "reward": reward + 1.0,
        "versions": [[3, tokens - 1], [4, 1]],
        **more,
    }


def group(step: int, number: int, texts: Iterable[str] = (), held_out: bool = False) -> dict:
    """A group of four completions; of the same prompt every 20 groups."""
    row = number % 20
    prompt = f"Question {row}: what is {row} + {row * 3}? Think aloud, then answer."
    said = list(texts) or [
        f"Let me think. {row} and {row * 3} make {row * 4 + error}; at step {step} I say: "
        f"{row * 4 + error}."
        for error in (0, step % 3, 1, 2)
    ]
    completions = [
        completion(text, float(index == 0), 40 + (7 * step + 31 * index + number) % 217)
        | ({} if held_out else {"advantage": 0.75 if index == 0 else -0.25})
        for index, text in enumerate(said)
    ]
    return {
        "step": step,
        "group": -1 - row if held_out else number,
        "row": row,
        "prompt": prompt,
        "columns": {"solution": str(row * 4), "level": row % 3},
        "completions": completions,
    }


def ledger(groups: int) -> list[dict[str, Any]]:
    """Groups that are all trained, but for the last: filtered, quarantined, and one still open."""
    ends = {groups - 1: None, groups - 2: "QUARANTINED", groups - 3: "FILTERED"}
    rows: list[dict[str, Any]] = []
    for number in range(groups):
        end = ends.get(number, "TRAINED")
        ready = ("ROLLING", "SCORING", "READY", "TRAINING", "TRAINED")
        path = {"TRAINED": ready, "FILTERED": (*ready[:2], "FILTERED"), None: ready[:1]}
        moves = path.get(end, ("ROLLING", "QUARANTINED"))
        rows.append({"event": "admit", "group": number, "version": 0})
        rows += [{"event": "move", "groups": [number], "to": to} for to in moves]
    return [{"seq": seq, **row} for seq, row in enumerate(rows)]


def online_run(
    folder: Path, steps: int = 60, ended: str = "run_finished", lift: float = 0.6, groups: int = 4
) -> Path:
    """A run of GRPO with two criteria; `ended` is the kind of its last event, or nothing."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    changed = {"algorithm.beta": 0.04, "model.dtype": "auto", "policy.learning_rate": 1e-6}
    (folder / "defaults.json").write_text(json.dumps(changed))
    (folder / "run.lock").touch()
    lines(folder / "metrics.jsonl", [figures(n, steps, lift) for n in range(1, steps + 1)])
    evals = []
    for step in range(0, steps + 1, max(1, steps // 6)):
        reward = 0.3 + lift * (step / steps) ** 0.5
        evals.append(
            {
                "step": step,
                "version": step,
                "eval/reward/mean": reward,
                "eval/reward/std": 0.2,
                "eval/reward/exact_match/mean": reward * 0.8,
                "eval/reward/format/mean": min(1.0, reward * 1.2),
                "eval/completions/length_mean": 150.0,
                "eval/completions/length_max": 256.0,
                "eval/completions/truncated_fraction": 0.02,
                "eval/prompts": 64.0,
                "eval/failed": 0.0,
            }
        )
    lines(folder / "evals.jsonl", evals)
    rows = [group(n, n * groups + g) for n in range(1, steps + 1) for g in range(groups)]
    lines(folder / "samples.jsonl", rows)
    held_out = [group(row["step"], g, held_out=True) for row in evals for g in range(4)]
    lines(folder / "eval_samples.jsonl", held_out)
    lines(folder / "ledger.jsonl", ledger(40))
    why = {"path": "model.dtype", "value": "float32", "why": "no GPU computes here"}
    events: list[dict[str, Any]] = [
        {"kind": "run_started", "changed": {}},
        {"kind": "settled", **why},
        {"kind": "role_started", "role": "rollout-0.0", "engine": "vllm", "node": "127.0.0.1"},
        {"kind": "group_quarantined", "group": 38, "reason": "reward 'format' failed (raised)"},
        {"kind": "replica_lost", "replica": "rollout-0.0", "reason": "its process died"},
        {
            "kind": "trouble",
            "step": steps,
            "name": "constant_groups",
            "advice": "60 % of the groups are constant: take harder or easier data",
        },
        {"kind": "checkpoint_saved", "step": steps},
    ]
    if ended:
        reason = {"reason": "stopped by signal 2"} if ended == "run_stopped" else {"step": steps}
        events.append({"kind": ended, **reason})
    lines(
        folder / "events.jsonl",
        [{"time": 1.795e9 + 60 * n, **event} for n, event in enumerate(events)],
    )
    return folder


def preference_run(folder: Path) -> Path:
    """A DPO job, whose evaluations are among its steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "# trl 1.13.0\nalgorithm: {name: dpo, beta: 0.1}\nmodel: {name: m}\ntrain: {steps: 40}\n"
    )
    rows = []
    for step in range(41):
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {
                "loss": 0.69 * math.exp(-step / 20),
                "reward/accuracy": min(1.0, 0.5 + step / 60),
                "reward/margin": step / 50,
                "reward/chosen": step / 100,
                "reward/rejected": -step / 100,
                "policy/grad_norm": 1.0,
                "policy/learning_rate": 1e-6,
                "epoch": step / 10,
                "time/step": 2.0,
                "throughput/samples_per_s": 8.0,
            }
        if step % 20 == 0:
            row |= {"eval/reward/accuracy": 0.5 + step / 100, "eval/loss": 0.7 - step / 100}
        rows.append(row)
    lines(folder / "metrics.jsonl", rows)
    kinds = ["run_started", "role_started", "run_finished"]
    lines(folder / "events.jsonl", [{"time": 1.795e9 + n, "kind": k} for n, k in enumerate(kinds)])
    return folder


def sft_run(folder: Path) -> Path:
    """An SFT job of four steps, evaluated before and after."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "# trl 1.13.0\nalgorithm: {name: sft}\nmodel: {name: m}\ntrain: {steps: 4}\n"
    )
    rows: list[dict[str, Any]] = [{"step": step, "loss": 4.0 - step / 2} for step in range(5)]
    rows[0] |= {"eval/loss": 3.9, "eval/policy/token_accuracy": 0.25}
    rows[4] |= {"eval/loss": 1.1, "eval/policy/token_accuracy": 0.75}
    lines(folder / "metrics.jsonl", rows)
    kinds = ["run_started", "run_finished"]
    lines(folder / "events.jsonl", [{"time": 1.795e9 + n, "kind": k} for n, k in enumerate(kinds)])
    return folder


class Heard:
    """What a run would write and show."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def wait(self) -> None: ...

    def event(self, kind: str, **fields: str) -> None:
        self.events.append({"kind": str(kind), **fields})

    def note(self, text: str) -> None:
        self.notes.append(text)
