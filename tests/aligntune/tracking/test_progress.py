"""What a run shows: plain lines in a pipe, and a real terminal of 80 and of 120 columns."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.tracking.lines import (
    clock,
    cut,
    duration,
    figures,
    fitted,
    line,
    sample,
    seconds_left,
)
from aligntune.tracking.progress import Progress

REPOSITORY = Path(__file__).parents[3]

METRICS = {
    "reward/mean": 0.51249,
    "completions/length_mean": 12.4,
    "throughput/tokens_per_s": 12345.6,
    "staleness/max": 1.0,
    "time/step": 3.0,
}
FULL = METRICS | {
    "reward/correct/mean": 0.4,
    "reward/concise/mean": 0.9,
    "kl/reference": 0.0123,
    "groups/constant_fraction": 0.875,
    "time/rollout": 2.4,
    "time/reward": 0.1,
    "time/update": 0.6,
}


def test_a_line_shows_what_there_is_in_reading_order() -> None:
    assert line(3, 40, figures(METRICS, {}), 125.0) == (
        "step 3/40  reward 0.512  length 12  tokens/s 12,346  staleness 1  2 min 05 s left"
    )


def test_the_last_step_shows_no_time_left() -> None:
    assert line(40, 40, {}, 0.0) == "step 40/40"


def test_accuracy_is_preferred_to_the_evaluation_reward() -> None:
    assert figures({}, {"eval/reward/mean": 0.5}) == {"eval": "0.500"}
    assert figures({}, {"eval/reward/mean": 0.5, "eval/reward/accuracy": 0.25}) == {"eval": "0.250"}


def test_several_criteria_are_shown_each_and_one_is_the_reward_itself() -> None:
    shown = figures(FULL, {})
    assert (shown["correct"], shown["concise"], shown["constant"]) == ("0.400", "0.900", "88%")
    assert "correct" not in figures({"reward/mean": 0.4, "reward/correct/mean": 0.4}, {})


def test_a_criterion_that_is_called_as_another_figure_hides_neither() -> None:
    metrics = {"reward/mean": 0.5, "completions/length_mean": 12.0}
    shown = figures(metrics | {"reward/reward/mean": 1.0, "reward/length/mean": -0.5}, {})
    assert shown == {
        "reward": "0.500",
        "reward/reward": "1.000",
        "reward/length": "-0.500",
        "length": "12",
    }


@pytest.mark.slow
@given(
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.floats(0, 10**6),
    st.integers(40, 160),
    st.dictionaries(st.sampled_from(sorted(FULL)), st.floats(-1e3, 1e6)),
)
def test_a_line_is_never_wider_than_it_may_be_and_never_without_step_and_time_left(
    total: int, before: int, left: float, width: int, metrics: dict[str, float]
) -> None:
    step = max(0, total - before - 1)
    made = line(step, total, figures(metrics, {}), left, width)
    assert len(made) <= width
    assert made.startswith(f"step {step}/{total}")
    assert made.endswith(f"{duration(left)} left")


def test_what_does_not_fit_goes_in_the_order_of_its_worth() -> None:
    shown = figures(FULL, {"eval/reward/mean": 0.7})
    kept = [{name for name in shown if f"{name} " in fitted(shown, w)} for w in range(120)]
    for narrow, wide in pairwise(kept):
        assert narrow <= wide
    assert fitted(shown, 12) == "reward 0.512"
    assert fitted(shown, 25) == "reward 0.512  eval 0.700"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_are_written_as_they_are_said(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_clock() -> None:
    assert [clock(s) for s in (0, 12.9, 75, 3723)] == ["0:00", "0:12", "1:15", "1:02:03"]


def test_time_left_is_the_mean_pace_times_what_remains() -> None:
    assert seconds_left([2.0, 4.0], 7, 10) == pytest.approx(9.0)
    assert seconds_left([], 0, 10) is None


def test_a_sample_is_the_prompt_the_best_answer_and_the_worst_each_a_line_that_fits() -> None:
    row = {
        "prompt": "1+1=",
        "completions": [
            {"text": "3", "reward": 0.0},
            {"text": "2\n" + "x" * 500, "reward": 1.0},
            {"text": "2.5", "reward": 0.5},
        ],
    }
    asked, best, worst = sample(row, 40)
    assert asked == "  asked  1+1="
    assert best.startswith("  1.000  2⏎xxx")
    assert len(best) == 40
    assert worst == "  0.000  3"
    lost = {"prompt": "1", "completions": [{"text": None, "reward": None}]}
    assert sample(lost, 60)[1] == "  no reward  (its text is lost)"


def test_no_completion_can_move_the_cursor_or_break_the_line() -> None:
    assert cut("a\x1b[2Jb\rc\td", 80) == "a [2Jb c d"
    assert cut("漢字漢字", 5) == "漢字…"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_every_step_and_note_is_a_plain_line() -> None:
    stream = io.StringIO()
    progress = Progress(5, stream)
    progress.evaluation({"eval/reward/accuracy": 0.5})
    progress.step(1, METRICS)
    progress.note("checkpoint [bold] saved")
    progress.step(2, METRICS | {"eval/reward/accuracy": 0.75})
    progress.step(3, METRICS)
    progress.close()
    first, note, second, third = stream.getvalue().splitlines()
    assert first == (
        "step 1/5  reward 0.512  eval 0.500  length 12  tokens/s 12,346  staleness 1  12 s left"
    )
    assert note == "checkpoint [bold] saved"
    assert "eval 0.750" in second
    assert "eval 0.750" in third


def test_a_start_is_told_stage_by_stage_with_who_is_waited_for() -> None:
    stream, now = io.StringIO(), Clock()
    progress = Progress(5, stream, now, since=100.0)
    now.now = 112.0
    progress.stage("Ray runs on this machine")
    progress.starting({"rollout": "vLLM is loading", "policy": "", "reward": ""})
    now.now = 131.4
    progress.ready("reward")
    progress.tick()  # nothing: somebody spoke just now
    now.now = 162.0
    progress.tick()
    progress.tick()
    progress.ready("rollout", "vLLM 0.32")
    progress.ready("policy")
    progress.ready("policy")  # once more, after a loss: that is an event
    progress.close()
    assert stream.getvalue().splitlines() == [
        "0:12 Ray runs on this machine",
        "0:31 reward ready; waiting for: rollout (vLLM is loading), policy",
        "1:02 waiting for: rollout (vLLM is loading), policy",
        "1:02 rollout ready (vLLM 0.32); waiting for: policy",
        "1:02 policy ready; all are",
    ]


def test_a_step_that_takes_long_says_in_a_pipe_who_works() -> None:
    stream, now = io.StringIO(), Clock()
    progress = Progress(5, stream, now)
    progress.watch(lambda: {"rollout": "rolls out 8 groups, 12 s", "policy": ""})
    progress.step(1, {})
    now.now += 299
    progress.tick()
    now.now += 2
    progress.tick()
    progress.close()
    assert stream.getvalue().splitlines()[1:] == ["5:01 step 2: rollout (rolls out 8 groups, 12 s)"]


# A terminal: a recorded run in a process of its own, whose output is a real pty. It prints a mark
# and waits for a key where the screen is to be looked at.

RECORDED = """
import sys
sys.path.insert(0, {repository!r})
from tests.aligntune.tracking.test_progress import FULL
from aligntune.tracking import progress as of
now = [0.0]
p = of.Progress(400, now=lambda: now[0])
def look():
    with p._live._lock:  # nothing is drawn while it is looked at
        p._live.refresh()
        sys.stderr.write("?"); sys.stderr.flush()
        sys.stdin.readline()
now[0] = 12; p.stage("Ray runs on this machine")
p.starting({{"rollout": "vLLM is loading", "policy": "the model is loading", "reward": ""}})
now[0] = 31; p.ready("reward")
look()
p.ready("rollout", "vLLM 0.32"); p.ready("policy", "trl on cpu")
p.watch(lambda: {{"policy": "updates, 2 s", "rollout": "rolls out 16 groups, 7 s", "reward": ""}})
p.evaluation({{"eval/reward/mean": 0.7}})
for step in range(1, 80):
    now[0] += 3.2
    p.step(step, FULL)
p.note("replica_lost: role rollout, replica rollout-0.0, reason " + "it is gone " * 9)
look()
p.close()
print("aligntune: stopped by signal 2")
"""


def on_a_terminal(columns: int, looks: int) -> list[list[str]]:
    """The screen of `columns` by 40 at each look of the recorded run, and at its end."""
    screen = pyte.Screen(columns, 40)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    run = subprocess.Popen(
        [sys.executable, "-c", RECORDED.format(repository=str(REPOSITORY))],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color"}
        | {"COLUMNS": "", "LINES": ""},
        cwd=REPOSITORY,
    )
    os.close(theirs)
    assert run.stdin is not None
    assert run.stderr is not None
    seen: list[list[str]] = []
    deadline = time.monotonic() + 60

    def take(seconds: float, *others: int) -> list[int]:
        """Take what the terminal is sent for so long, or until one of `others` has something too;
        those that have. Always read, for a terminal that is full holds its writer up."""
        ready, _, _ = select.select([ours, *others], [], [], seconds)
        if ours in ready:
            try:
                stream.feed(os.read(ours, 65536))
            except OSError:  # Linux's word for the other side's end
                return [ours]
        return [one for one in ready if one != ours]

    with run:
        mark = run.stderr.fileno()
        for _ in range(looks):
            while not take(1, mark):
                assert time.monotonic() < deadline
            assert os.read(mark, 1) == b"?", run.stderr.read()
            while select.select([ours], [], [], 0)[0]:
                take(0)
            seen.append([text.rstrip() for text in screen.display if text.strip()])
            run.stdin.write(b"\n")
            run.stdin.flush()
        while take(1) != [ours]:
            assert time.monotonic() < deadline
    os.close(ours)
    assert run.returncode == 0
    return [*seen, [text.rstrip() for text in screen.display if text.strip()]]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_the_live_lines_are_whole_and_the_trend_stays(columns: int) -> None:
    starting, training, after = on_a_terminal(columns, 2)

    assert starting == [
        "0:12 Ray runs on this machine",
        "0:31 reward ready",
        "0:31 waiting for: rollout (vLLM is loading), policy (the model is loading)",
    ]

    *stayed, how_far, shown, policy, rollout, reward = training
    assert how_far.startswith("step 79/400  ━")
    assert how_far.endswith("17 min 07 s left")
    assert shown.startswith("reward 0.512  eval 0.700")
    assert "constant 88%" in shown
    assert ("staleness 1" in shown) == (columns == 120)
    assert policy == "  policy    20% busy  updates, 2 s"
    assert rollout == "  rollout   80% busy  rolls out 16 groups, 7 s"
    assert reward == "  reward     3% busy  waits"
    steps = [text for text in stayed if text.startswith("step ")]
    assert 10 <= len(steps) <= 14, "one every 20 s, and not each of 79"
    assert all(text.endswith(" left") for text in steps)

    assert after[-2].startswith("step 79/400  reward 0.512")
    assert after[-1] == "aligntune: stopped by signal 2"
    assert not [text for text in after if "busy" in text], "the live lines are gone"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    progress = Progress(5, stream)
    progress.step(1, METRICS)
    progress.close()
    assert stream.getvalue() == line(1, 5, figures(METRICS, {}), 12.0) + "\n"


def test_on_a_terminal_the_latest_figures_and_the_notes_are_on_the_screen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = Progress(5, stream)
    progress.step(1, METRICS)
    progress.note("checkpoint [bold] saved")
    progress.close()
    shown = stream.getvalue()
    assert "checkpoint [bold] saved" in shown
    assert "step 1/5" in shown
    assert "reward 0.512" in shown
    assert "\x1b[?25h" in shown, "the cursor is given back"
