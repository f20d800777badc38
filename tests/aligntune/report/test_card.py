"""The model card, from run directories as runs leave them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from aligntune.evaluation.shown import shown
from aligntune.evaluation.statistics import bootstrap, wilson
from aligntune.evaluation.store import Decoded, Summary, write_evaluation
from aligntune.evaluation.summary import Success
from aligntune.report.card import NAME, card, write_card
from aligntune.runs.publish import write_card_of
from aligntune.runs.reading import open_run
from aligntune.runs.rundir import RunDir
from tests.aligntune.report.written import Heard, lines, online_run, preference_run, sft_run


def head(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def summary_of(step: int) -> Summary:
    figures = {"reward": bootstrap([0.5, 1.0, 0.0]), "pass@1": wilson(2, 3)}
    return Summary(
        name=f"export-{step:06d}",
        time="2026-11-27T00:00:00+00:00",
        model="m",
        origin="export",
        step=step,
        run=None,
        data="data/test.jsonl",
        prompts=3,
        failed=0,
        success=Success(criterion="exact_match", at_least=1.0),
        answers="the whole completion",
        confidence=0.95,
        seed=1,
        seconds=1.0,
        versions=[],
        decodings={"greedy": Decoded(completions=1, temperature=0.0, figures=figures)},
    )


def test_a_card_says_what_of_what_by_what_with_which_results(tmp_path: Path) -> None:
    folder = online_run(tmp_path / "sums")
    text = card(open_run(folder), 60)
    assert head(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "models/qwen",
        "tags": ["aligntune", "grpo"],
    }
    assert "- data: `data/train.jsonl`\n" in text
    assert "[models/qwen](https://huggingface.co/models/qwen), trained by GRPO for 60 steps" in text
    assert "| `algorithm.beta` | `0.1` | `0.04` |" in text
    assert "| `policy.learning_rate` |" in text
    assert "- torch 2.13.0" in text
    assert "| On held-out prompts, during training | step 0 | step 60 |" in text
    assert "| reward/mean | 0.3 [0.251, 0.349] | 0.9 [0.851, 0.949] |" in text
    assert "Intervals are 95 %" in text
    assert "AutoModelForCausalLM.from_pretrained" in text


@pytest.mark.slow
def test_evaluations_of_its_step_are_in_it_with_their_intervals(tmp_path: Path) -> None:
    folder = online_run(tmp_path / "sums")
    for step in (50, 60):
        write_evaluation(folder / "evaluations", summary_of(step), [])
    text = card(open_run(folder), 60)
    assert text.count("| data/test.jsonl, 3 prompts | greedy |") == 1
    assert "| pass@1 | 0.6667 [0.2077, 0.9385] |" in text
    assert "A completion passes with exact_match >= 1." in text


@pytest.mark.parametrize(
    ("later", "told"),
    [
        ([], True),
        ([("checkpoint_saved", 60, 1)], True),  # within the second in which it ended
        ([("checkpoint_saved", 90, 100), ("resumed", 60, 200), ("run_finished", 60, 300)], True),
        ([("checkpoint_saved", 60, -100)], True),
        ([("resumed", 30, 100), ("checkpoint_saved", 70, 200)], False),
        ([("checkpoint_saved", 20, 100), ("checkpoint_saved", 60, 200)], False),  # it began anew
    ],
)
def test_no_evaluation_is_told_of_weights_that_were_trained_again(
    tmp_path: Path, later: list[tuple[str, int, float]], told: bool
) -> None:
    folder = online_run(tmp_path / "sums")
    write_evaluation(folder / "evaluations", summary_of(60), [])
    ended = datetime.fromisoformat(summary_of(60).time).timestamp()
    events: list[dict[str, Any]] = [{"time": ended - 1000, "kind": "run_started"}]
    events += [
        {"time": ended + 0.9 * after, "kind": kind, "step": step} for kind, step, after in later
    ]
    lines(folder / "events.jsonl", events)
    assert ("| data/test.jsonl, 3 prompts |" in card(open_run(folder), 60)) is told


def test_each_figure_has_the_interval_that_the_line_below_it_says(tmp_path: Path) -> None:
    """One sampled completion a prompt is a single trial, as a greedy one is."""
    summary = summary_of(60)
    greedy = summary.decodings["greedy"]
    sampled = greedy.model_copy(update={"temperature": 1.0})
    summary = summary.model_copy(update={"decodings": {"greedy": greedy, "sampled": sampled}})
    folder = online_run(tmp_path / "sums")
    write_evaluation(folder / "evaluations", summary, [])
    line = "Wilson's for pass@1 of one completion a prompt, bootstrap over prompts for all else"
    assert shown(summary)[-1] == f"95% intervals: {line}"
    assert f"Intervals are at 95%: {line}." in card(open_run(folder), 60)


def test_each_source_has_its_own_split_and_hub_names_alone_are_data_sets_of_the_hub(
    tmp_path: Path,
) -> None:
    folder = online_run(tmp_path / "sums")
    sources = [
        {"path": "owner/sums.v2", "split": "train[:5%]"},
        {"path": "owner/sums.v2", "split": "test"},
        {"path": "data/*.jsonl", "split": "train"},
        {"path": "data/more.parquet", "split": "train"},
        {"path": "bücher/deutsch", "split": "train"},
    ]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {"path": None, "split": "train", "train": sources}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = card(open_run(folder), 60)
    assert head(text)["datasets"] == ["owner/sums.v2"]
    link = "[owner/sums.v2](https://huggingface.co/owner/sums.v2)"
    told = [line for line in text.splitlines() if line.startswith("- data: ")]
    assert told == [
        f"- data: {link}, split `train[:5%]`",
        f"- data: {link}, split `test`",
        "- data: `data/*.jsonl`, split `train`",
        "- data: `data/more.parquet`, split `train`",
        "- data: `bücher/deutsch`, split `train`",
    ]


def test_local_models_and_data_are_named_and_not_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = online_run(tmp_path / "sums")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    text = card(open_run(folder), 60)
    assert "base_model" not in head(text)
    assert "\n`models/qwen`, trained by GRPO" in text


def test_a_preference_job_has_a_card_too_and_a_reward_model_no_chat(tmp_path: Path) -> None:
    folder = preference_run(tmp_path / "dpo")
    text = card(open_run(folder), 40)
    assert "trained by DPO for 40 steps" in text
    assert "| On held-out pairs, during training | step 0 | step 40 |" in text
    assert "| reward/accuracy | 0.5 | 0.9 |" in text
    assert "| loss | 0.7 | 0.3 |" in text
    assert "Intervals" not in text, "none of its figures has one"
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: dpo, beta: 0.1", "name: reward_model"))
    text = card(open_run(folder), 40)
    assert head(text)["pipeline_tag"] == "text-classification"
    assert "aligntune chat" not in text


def test_an_sft_job_has_its_method_and_figures_in_the_card(tmp_path: Path) -> None:
    text = card(open_run(sft_run(tmp_path / "sft")), 4)
    assert "trained by supervised fine-tuning for 4 steps" in text
    assert "| On held-out rows, during training | step 0 | step 4 |" in text
    assert "| loss | 3.9 | 1.1 |" in text
    assert "| policy/token_accuracy | 0.25 | 0.75 |" in text
    assert "Intervals" not in text


@pytest.mark.parametrize("where", [lambda tree: tree, lambda tree: {"text_config": tree}])
@pytest.mark.parametrize(("cap", "eager"), [(50.0, True), (None, False)])
def test_a_model_that_caps_its_scores_is_loaded_with_eager_attention(
    tmp_path: Path, where: Any, cap: float | None, eager: bool
) -> None:
    for run in (online_run(tmp_path / "sums"), preference_run(tmp_path / "pairs")):
        rundir = RunDir(run)
        rundir.model.mkdir()
        config = where({"attn_logit_softcapping": cap})
        (rundir.model / "config.json").write_text(json.dumps(config))
        text = write_card(open_run(run), rundir.model, 40).read_text()
        assert ('.from_pretrained("FOLDER", attn_implementation="eager")' in text) == eager


def test_a_card_that_cannot_be_written_is_an_event(tmp_path: Path) -> None:
    rundir, heard = RunDir(online_run(tmp_path / "sums")), Heard()
    write_card_of(rundir, 60, heard)
    (event,) = heard.events
    assert event["kind"] == "card_failed"
    assert event["reason"].startswith("FileNotFoundError: ")
    rundir.model.mkdir()
    write_card_of(rundir, 60, heard)
    assert (rundir.model / NAME).read_text() == card(open_run(rundir.path), 60)
    assert len(heard.events) == 1
