"""`aligntune samples`: a group in a terminal, whole at 80 columns, whatever a model wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from aligntune.cli import main
from aligntune.report.terminal import shown
from tests.aligntune.report.written import HOSTILE, group, lines, online_run, preference_run


def drawn(row: dict, width: int = 80, full: bool = False) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(shown(row, width, full))
    return captured.get()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_completions_lie_side_by_side_with_their_scores_and_nothing_is_cut(width: int) -> None:
    said = drawn(group(3, 7), width)
    assert all(cell_len(line) <= width for line in said.splitlines())
    words = said.split()
    for told in ("Question", "solution:", "exact_match", "advantage", "0.75", "stop", "161"):
        assert told in words, told
    assert words.count("reward") == 4
    assert ("╮╭" in said) == (width > 48)


def test_no_text_moves_the_cursor_or_sets_a_colour() -> None:
    said = drawn(group(1, 0, texts=[*HOSTILE, "[bold red]a[/] \x1b[2J\x07\x9b1m"]))
    assert not set(said) & {"\x00", "\x07", "\x1b", "\x9b", "\u202e"}
    assert "[bold red]a[/]" in said
    assert "<U+001B>[2J" in said


def test_a_long_text_loses_its_middle_unless_it_is_asked_for() -> None:
    row = group(1, 0, texts=["begin " + "x" * 5000 + " end"])
    said = drawn(row)
    assert "begin" in said
    assert "characters" in said
    assert "end" in said.split()
    assert drawn(row, full=True).count("x") > 5000


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str, int]:
    with pytest.raises(SystemExit) as ended:
        main(["samples", *arguments])
    out, err = capsys.readouterr()
    return out, err, int(str(ended.value.code))


@pytest.mark.slow
def test_the_last_step_or_another_the_worst_or_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = online_run(tmp_path / "run", steps=3)
    rows = [group(step, step) for step in (1, 2, 3)]
    for row, reward in zip(rows, (0.0, 2.0, 1.0), strict=True):
        for said in row["completions"]:
            said["reward"] = reward
    lines(run / "samples.jsonl", rows)

    def heads(*arguments: str) -> list[str]:
        out, err, code = told(capsys, str(run), *arguments)
        assert (err, code) == ("", 0)
        return [line for line in out.splitlines() if line.startswith("step ")]

    assert heads() == ["step 3, group 3"]
    assert heads("--step", "1") == ["step 1, group 1"]
    assert heads("--worst") == ["step 1, group 1"]
    assert heads("--best", "-n", "2") == ["step 2, group 2", "step 3, group 3"]
    assert heads("--eval", "--step", "0") == ["step 0, prompt 0"]


def test_a_step_without_samples_and_a_job_over_pairs_are_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = online_run(tmp_path / "run", steps=3)
    out, err, code = told(capsys, str(run), "--step", "99")
    assert (out, code) == ("", 2)
    assert err.endswith("samples.jsonl: there are groups of the steps 1 to 3\n")
    prefs = preference_run(tmp_path / "prefs")
    _, err, code = told(capsys, str(prefs))
    assert (code, err.count("\n")) == (2, 1)
    assert "a job over pairs samples nothing" in err
    _, err, code = told(capsys, str(run), "--worst", "--best")
    assert (code, err) == (2, "aligntune: --worst and --best exclude each other\n")
