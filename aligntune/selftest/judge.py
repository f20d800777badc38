"""What the self-test's figures mean: each section ok, off (with what it means) or skipped. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MEAN_GAP = 0.03  # nats between engine and policy in bfloat16; twice what was seen is suspect
STALE = 3.0  # times that gap, at least, from weights of before an update to those after it
MFU = 0.2  # of the measured product: below it something is slow
MEMORY = 1.15  # measured over planned
NORM = 0.03  # relative, between strategies in bfloat16


class Verdict(StrEnum):
    """How a section is."""

    OK = "ok"
    OFF = "off"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """One line of the self-test."""

    section: str
    verdict: Verdict
    seen: str
    means: str = ""  # empty where all is well

    def as_dict(self) -> dict[str, str]:
        """For --json."""
        return {**asdict(self), "verdict": self.verdict.value}

    def line(self) -> str:
        """For people."""
        means = f" -> {self.means}" if self.means else ""
        return f"{self.verdict:7}  {self.section}: {self.seen}{means}"


def judge(section: str, figures: Mapping[str, Any], before: Mapping[str, Any]) -> list[Outcome]:
    """Outcomes of one section, given the figures of those `before` it, by section."""
    if section == "ceilings":
        return [ceilings(figures)]
    if section.startswith("agreement"):
        return [agreement(figures), transfer(figures)]
    if section == "update":
        return [speed(figures, before.get("ceilings")), memory(figures)]
    if section.startswith("step_"):
        return [step(figures, before.get("step_torch"))]
    return [run(figures)]


def _outcome(section: str, well: bool, seen: str, means: str) -> Outcome:
    return Outcome(section, Verdict.OK if well else Verdict.OFF, seen, "" if well else means)


def ceilings(figures: Mapping[str, Any]) -> Outcome:
    """The card and what it gives; nothing to compare it with."""
    seen = (
        f"{figures['card']}, {figures['gib']:.0f} GiB, torch {figures['torch']}: bfloat16 product "
        f"{figures['tflops']:.0f} TFLOP/s, copy {figures['copy_gb_s']:.0f} GB/s"
    )
    well = figures["tflops"] > 0 and figures["copy_gb_s"] > 0
    return _outcome("card", well, seen, "the card computes nothing: check the driver")


def agreement(figures: Mapping[str, Any]) -> Outcome:
    """Whether the engine reports what the policy computes."""
    seen = (
        f"{figures['tokens']} tokens in bfloat16, |difference| mean {figures['mean']:.4f} nats, "
        f"largest {figures['largest']:.3f}"
    )
    return _outcome(
        f"log-probs of {figures['engine']}",
        figures["mean"] <= MEAN_GAP,
        seen,
        f"above {MEAN_GAP}: ratios start away from 1 and the policy learns from the difference; "
        "check that both load the same weights, dtype and temperature",
    )


def transfer(figures: Mapping[str, Any]) -> Outcome:
    """Whether new weights arrive: the engine has their label and agrees with the policy again."""
    rate = figures["weights_mb"] / 1e3
    seen = (
        f"{figures['weights_mb']:.0f} MB packed at {rate / figures['pack_s']:.1f} GB/s, loaded at "
        f"{rate / figures['load_s']:.1f} GB/s; |difference| {figures['stale_mean']:.3f} before, "
        f"{figures['after_mean']:.4f} after"
    )
    new = figures["version"] == 1 and figures["after_mean"] <= MEAN_GAP
    told = figures["stale_mean"] > STALE * figures["after_mean"]
    return _outcome(
        f"weights to {figures['engine']}",
        new and told,
        seen,
        "the engine does not sample from the new weights"
        if not new
        else "the update is too small to tell new weights from old ones",
    )


def speed(figures: Mapping[str, Any], card: Mapping[str, Any] | None) -> Outcome:
    """An update's tokens a second, and the share of the measured product that it reaches."""
    seen = (
        f"{figures['parameters'] / 1e6:.0f}M parameters, {figures['tokens']} tokens in "
        f"{figures['seconds']:.2f} s: {figures['tokens_s']:.0f} tokens/s, "
        f"{figures['tflops']:.0f} TFLOP/s; {figures['attention']}"
    )
    if not card:
        return Outcome("update", Verdict.OK, seen)
    share = figures["tflops"] / card["tflops"]
    return _outcome(
        "update",
        share >= MFU,
        f"{seen}; MFU {share:.0%} of the product measured here",
        f"below {MFU:.0%}: is something else on the card? docs/speed.md says what to turn",
    )


def memory(figures: Mapping[str, Any]) -> Outcome:
    """The peak of an update over what `aligntune plan` says."""
    ratio = figures["peak_gib"] / figures["planned_gib"]
    peak, planned = figures["peak_gib"], figures["planned_gib"]
    seen = f"peak {peak:.2f} GiB, the plan says {planned:.2f} ({ratio:.2f})"
    return _outcome(
        "memory", ratio <= MEMORY, seen, f"above {MEMORY} of the plan: a run that fits may not"
    )


def step(figures: Mapping[str, Any], torch_alone: Mapping[str, Any] | None) -> Outcome:
    """A GRPO step of a strategy, beside that of plain PyTorch on the same rows."""
    name = f"step of {figures['strategy']}"
    seen = (
        f"loss {figures['loss']:.5f}, gradient norm {figures['grad_norm']:.4f}, on "
        f"{figures['device']}; {figures['attention']}"
    )
    if not figures["finite"]:
        return Outcome(name, Verdict.OFF, seen, "weights are not finite after two steps")
    if not torch_alone:
        return Outcome(name, Verdict.OK, seen)
    gap = abs(figures["grad_norm"] / torch_alone["grad_norm"] - 1)
    return _outcome(
        name, gap <= NORM, seen, f"plain PyTorch has {torch_alone['grad_norm']:.4f}: {gap:.1%} off"
    )


def run(figures: Mapping[str, Any]) -> Outcome:
    """Two steps through Ray."""
    seen = f"two steps of the quickstart in {figures['seconds']:.0f} s, engine {figures['engine']}"
    return Outcome("run through Ray", Verdict.OK, seen)
