"""`aligntune doctor --gpu`: figures are judged purely, and what cannot run says why."""

from __future__ import annotations

from typing import Any

import pytest

import aligntune.selftest.run as run
from aligntune.selftest.judge import Outcome, Verdict, judge
from aligntune.selftest.work import flops_of, ragged

CARD = {"card": "a card", "gib": 80.0, "torch": "2", "tflops": 700.0, "copy_gb_s": 2500.0}
ENGINE = {
    "engine": "vllm",
    "tokens": 1024,
    "mean": 0.01,
    "largest": 0.1,
    "stale_mean": 0.2,
    "after_mean": 0.01,
    "version": 1,
    "weights_mb": 40.0,
    "pack_s": 0.01,
    "load_s": 0.01,
}
UPDATE = {
    "parameters": 5e8,
    "tokens": 60_000,
    "seconds": 1.0,
    "tokens_s": 60_000.0,
    "tflops": 210.0,
    "attention": "packed rows",
    "peak_gib": 20.0,
    "planned_gib": 21.0,
}
STEP = {
    "strategy": "fsdp",
    "loss": -0.1,
    "grad_norm": 1.0,
    "device": "cuda:0",
    "attention": "packed rows",
    "finite": True,
}


def verdicts(section: str, figures: dict[str, Any], **before: Any) -> list[Verdict]:
    return [outcome.verdict for outcome in judge(section, figures, before)]


@pytest.mark.parametrize(
    ("section", "figures", "change", "wanted"),
    [
        ("ceilings", CARD, {}, "ok"),
        ("agreement_vllm", ENGINE, {}, "ok ok"),
        ("agreement", ENGINE, {"mean": 0.2}, "off ok"),
        ("agreement", ENGINE, {"version": 0}, "ok off"),
        ("agreement", ENGINE, {"after_mean": 0.19}, "ok off"),
        ("agreement", ENGINE, {"stale_mean": 0.012}, "ok off"),
        ("update", UPDATE, {}, "ok ok"),
        ("update", UPDATE, {"tflops": 70.0}, "off ok"),
        ("update", UPDATE, {"peak_gib": 30.0}, "ok off"),
        ("step_fsdp", STEP, {}, "ok"),
        ("step_fsdp", STEP, {"grad_norm": 1.2}, "off"),
        ("step_fsdp", STEP, {"finite": False}, "off"),
        ("run", {"seconds": 60.0, "engine": "vllm"}, {}, "ok"),
    ],
)
def test_figures_are_judged(
    section: str, figures: dict[str, Any], change: dict[str, Any], wanted: str
) -> None:
    found = verdicts(section, figures | change, ceilings=CARD, step_torch=STEP)
    assert " ".join(found) == wanted


def test_what_is_off_says_what_it_means_and_what_is_well_does_not() -> None:
    off = judge("update", UPDATE | {"tflops": 70.0}, {"ceilings": CARD})[0]
    assert "MFU 10%" in off.line()
    assert "-> below 20%" in off.line()
    assert "->" not in judge("update", UPDATE, {"ceilings": CARD})[0].line()


def test_without_a_gpu_every_section_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "no_gpu", lambda: "no GPU that torch can use")
    outcomes = list(run.self_test())
    assert [outcome.section for outcome in outcomes] == list(run.SECTIONS)
    assert {outcome.line().split(": ")[1] for outcome in outcomes} == {"no GPU that torch can use"}
    assert run.exit_code(outcomes) == 0


def test_a_section_that_fails_is_off_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "no_gpu", lambda: None)
    monkeypatch.setattr(run, "NEEDS", {"agreement_vllm": "a_package_that_is_not_there"})
    answers: dict[str, Any] = {"ceilings": CARD, "agreement": "exit code 1: out of memory"}
    monkeypatch.setattr(run, "measure", lambda section, limit: answers[section])
    outcomes = list(run.self_test(["ceilings", "agreement", "agreement_vllm"]))
    assert [outcome.verdict for outcome in outcomes] == ["ok", "off", "skipped"]
    assert "out of memory" in outcomes[1].line()
    assert "a_package_that_is_not_there is not installed" in outcomes[2].line()
    assert run.exit_code(outcomes) == 1


@pytest.mark.slow
def test_a_section_that_raises_is_told_by_its_last_line() -> None:
    said = run.measure("no_such_section", 60)
    assert said == "exit code 1: KeyError: 'no_such_section'"


def test_operations_of_an_update_are_those_of_its_parameters_and_of_causal_attention() -> None:
    assert flops_of(1000, 2, 8, [10, 20]) == 6 * 1000 * 30 + 6 * 2 * 8 * (100 + 400)


def test_lengths_are_ragged_within_their_limits_and_always_the_same() -> None:
    lengths = ragged(64, 700, 2000)
    assert lengths == ragged(64, 700, 2000)
    assert min(lengths) >= 16
    assert max(lengths) <= 2000
    assert len(set(lengths)) > 40


def test_an_outcome_is_one_object() -> None:
    made = Outcome("memory", Verdict.OFF, "seen", "means")
    assert made.as_dict() == {
        "section": "memory",
        "verdict": "off",
        "seen": "seen",
        "means": "means",
    }
