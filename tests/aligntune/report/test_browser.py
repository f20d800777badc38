"""The report in a real browser: it shows what it should, and nothing that a model wrote runs."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligntune.report.write import write_report
from tests.aligntune.report.written import HOSTILE, group, lines, online_run, preference_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
if CHROMIUM is None:
    pytest.skip("there is no chromium here (apt-get install chromium)", allow_module_level=True)
pytestmark = pytest.mark.slow

SCROLL = """async () => {
  for (let y = 0; y < document.body.scrollHeight; y += 700) {
    window.scrollTo({ top: y, behavior: "instant" });
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  }
}"""
OVERFLOWING = """() => [...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest(".scroll, .cards, .bar, .rows, .skip, details:not([open])"))
  .map((e) => `${e.tagName}.${e.className}`)"""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield launched
        launched.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    """Opens a file; at the end of the test nothing has gone wrong in any page, and no page has
    asked for anything but itself."""
    contexts, wrong, asked = [], [], []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.absolute().as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one run of 60 steps."""
    return write_report([online_run(tmp_path_factory.mktemp("one") / "sums")])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs, of which the second has another beta and stopped earlier."""
    folder = tmp_path_factory.mktemp("two")
    first = online_run(folder / "first", steps=40)
    second = online_run(folder / "second", steps=30, ended="run_stopped", lift=0.2)
    text = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(text.replace("beta: 0.1", "beta: 0.2"))
    return write_report([first, second], folder / "two.html")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_nothing_overflows_and_every_chart_is_drawn(
    report: Path, show: Open, width: int, scheme: str
) -> None:
    page = show(report, width, scheme)
    page.evaluate(SCROLL)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERFLOWING) == []
    charts = page.locator("figure.chart:visible")
    sync_api.expect(page.locator("figure.chart:visible canvas")).to_have_count(charts.count())
    assert charts.count() > 15
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", ground)[0])
    assert red < 60 if scheme == "dark" else red > 200


@pytest.mark.parametrize("width", [360, 1280])
def test_two_runs_and_a_preference_job_fit_too(
    two: Path, show: Open, tmp_path: Path, width: int
) -> None:
    for path in (two, write_report([preference_run(tmp_path / "prefs")])):
        page = show(path, width)
        page.evaluate(SCROLL)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OVERFLOWING) == []


def test_the_curves_of_two_runs_lie_in_one_picture_and_what_differs_is_listed(
    two: Path, show: Open
) -> None:
    page = show(two)
    page.evaluate(SCROLL)
    labels = page.locator('[data-chart="reward"] .legend button')
    sync_api.expect(labels).to_have_count(4)
    text = " ".join(labels.all_inner_texts())
    assert {"first: training", "second: held-out"} <= set(re.findall(r"\w+: [a-z-]+", text))
    rows = page.locator("#settings tbody tr:visible")
    assert rows.all_inner_texts() == ["algorithm.beta\t0.1\t0.2\t0.04"]
    page.get_by_role("combobox", name="Run").select_option("second")
    sync_api.expect(page.locator("#found")).to_contain_text("120 of 120 groups")


def test_a_theme_that_changes_while_one_reads_redraws_the_pictures(
    report: Path, show: Open
) -> None:
    page = show(report, scheme="light")
    swatch = page.locator('[data-chart="reward"] .legend i').first
    before = swatch.evaluate("(e) => e.style.borderTopColor")
    page.emulate_media(color_scheme="dark")
    sync_api.expect(swatch).not_to_have_css("border-top-color", before)


def test_by_the_keyboard_alone(report: Path, show: Open) -> None:
    page = show(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#summary"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"

    chart = page.get_by_role("slider", name="Reward, weighted sum: by step")
    chart.focus()
    page.keyboard.press("Home")
    sync_api.expect(chart).to_have_attribute(
        "aria-valuetext", re.compile(r"^step 0: .*held-out 0\.3$")
    )
    page.keyboard.press("ArrowRight")
    sync_api.expect(chart).to_have_attribute("aria-valuetext", re.compile("^step 1: training 0."))
    assert "step 1" in page.locator('[data-chart="reward"] .at').inner_text()

    page.locator("#groups button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#group h3")).to_have_text("Step 60, group 241, row 1 of the data")
    page.get_by_role("button", name="Next group").focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#group h3")).to_contain_text("group 242")
    assert page.evaluate("document.activeElement.textContent") == "Next group"


def test_a_screen_reader_finds_names_roles_and_the_numbers_behind_a_picture(
    report: Path, show: Open
) -> None:
    page = show(report)
    tree = page.locator("body").aria_snapshot()
    for said in (
        'heading "sums" [level=1]',
        'navigation "Parts of the report"',
        'slider "Entropy, nats per token: by step"',
        'searchbox "Search"',
        'combobox "Order"',
        'region "Configuration"',
        "status: 240 of 240 groups",
    ):
        assert said in tree, said
    assert not re.search(
        r"- (button|link|slider|combobox|textbox|checkbox|spinbutton)( \[|:|$)", tree
    )
    page.locator('[data-chart="entropy"] summary').click()
    numbers = page.get_by_role("region", name="Numbers of Entropy").locator("tbody tr")
    sync_api.expect(numbers).to_have_count(60)
    assert numbers.first.inner_text().split() == ["1", "1.2"]


def test_samples_are_searched_filtered_and_ordered(report: Path, show: Open) -> None:
    page = show(report)
    found, names = page.locator("#found"), page.locator("#groups .row")
    page.get_by_label("Search").fill("QUESTION 7:")
    sync_api.expect(found).to_contain_text("12 of 240 groups")
    assert page.locator("#group mark").first.inner_text() == "Question 7:"
    page.get_by_label("From step").fill("50")
    sync_api.expect(found).to_contain_text("2 of 240 groups")
    page.get_by_role("button", name="Reset").click()
    sync_api.expect(found).to_contain_text("240 of 240 groups")
    page.get_by_label("Ended by").select_option("length")
    sync_api.expect(found).to_contain_text(re.compile(r"^\d+ of 240 groups"))
    assert "length" in page.locator("#group .cards").inner_text()
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Order").select_option("oldest first")
    sync_api.expect(names.first).to_contain_text("step 1 · group 4")
    page.get_by_role("button", name="Next", exact=True).click()
    sync_api.expect(page.locator("#range")).to_have_text("51\u2013100 of 240")
    page.get_by_role("combobox", name="Of").select_option("evaluations")
    sync_api.expect(names.first).to_contain_text("prompt")
    page.get_by_label("Search").fill("no such text")
    sync_api.expect(found).to_have_text("No group is like that: widen the filter.")


def test_the_best_and_the_worst_come_first(tmp_path: Path, show: Open) -> None:
    run = online_run(tmp_path / "run", steps=2)
    rows = [group(1, number) for number in range(3)]
    for row, reward in zip(rows, (0.5, -1.0, None), strict=True):
        for said in row["completions"]:
            said["reward"] = reward
    lines(run / "samples.jsonl", rows)
    page = show(write_report([run]))
    names = page.locator("#groups .row")
    page.get_by_label("Order").select_option("worst score first")
    sync_api.expect(names).to_have_text(
        ["step 1 · group 1-1", "step 1 · group 00.5", "step 1 · group 2\u2013"]
    )
    page.get_by_label("Order").select_option("best score first")
    sync_api.expect(names.first).to_have_text("step 1 · group 00.5")


def test_a_prompt_is_compared_over_steps(report: Path, show: Open) -> None:
    page = show(report)
    page.get_by_label("Search").fill("Question 3:")
    page.get_by_role("combobox", name="against").select_option("step 10, group 43")
    sync_api.expect(page.locator(".diff del").first).to_have_text("10")
    sync_api.expect(page.locator(".diff ins").first).to_have_text("60")


def test_an_episode_is_shown_turn_by_turn(tmp_path: Path, show: Open) -> None:
    run = online_run(tmp_path / "run", steps=2)
    row = group(1, 0)
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}, "type": "function"}
    for said in row["completions"]:
        said["turns"] = 2
        said["messages"] = [
            {"role": "user", "content": "1 + 2"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "assistant", "content": [{"type": "text", "text": "It is 3."}]},
        ]
    lines(run / "samples.jsonl", [row])
    page = show(write_report([run]))
    turns = page.locator("#group .card").first.locator(".turn")
    sync_api.expect(turns).to_have_count(4)
    assert turns.nth(1).inner_text() == 'assistant\nadd {"a":1,"b":2}'
    assert turns.nth(2).inner_text() == "tool add\n3"
    assert "It is 3." in turns.nth(3).inner_text()


def test_nothing_that_a_model_wrote_runs(tmp_path: Path, show: Open) -> None:
    run = online_run(tmp_path / "run", steps=2)
    evil = HOSTILE[0]
    row = group(1, 0, texts=HOSTILE)
    row |= {"prompt": HOSTILE[1], "columns": {evil: evil, "more": [HOSTILE[2]]}}
    for said in row["completions"]:
        said["scores"] = {evil: 1.0}
        said["finish_reason"] = evil
    lines(run / "samples.jsonl", [row])
    event = {"time": 1.795e9, "kind": evil, "reason": HOSTILE[1], evil: "\ud800"}
    lines(run / "events.jsonl", [event])
    lines(run / "metrics.jsonl", [{"step": 1, f"reward/{evil}/mean": 0.5, "reward/mean": 0.5}])
    config = f"algorithm: {{name: {evil!r}}}\nmodel: {{name: {HOSTILE[1]!r}}}\n"
    (run / "config.yaml").write_text(config.replace("\\'", "''"))
    page = show(write_report([run]))
    page.evaluate(SCROLL)
    assert page.evaluate("window.ran") is None
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("document.images.length") == 0
    texts = page.locator("#group .card .said").all_inner_texts()
    assert texts[:2] == list(HOSTILE[:2])
    assert texts[2] == "<!-- <script> \u2039U+2028\u203a\u2039U+2029\u203a -->"
    assert texts[4].startswith(
        "\u2039U+202E\u203aright to left\u2039U+202C\u203a \u2039U+0000\u203a"
    )
    assert "[31m 😀" in texts[4]


def test_the_policy_of_the_page_lets_no_other_script_run(report: Path, browser: Any) -> None:
    """Should a text ever get into the markup, it still does nothing."""
    page = browser.new_page()
    page.goto(report.as_uri())
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = 1";
          document.body.append(script);
        }"""
    )
    assert page.evaluate("window.ran") is None
    with pytest.raises(sync_api.Error, match=r"Content Security Policy|Failed to fetch"):
        page.evaluate("fetch('http://127.0.0.1:9/')")
    page.close()


@pytest.mark.parametrize("groups", [10_000])
def test_ten_thousand_samples_are_there_in_seconds(tmp_path: Path, show: Open, groups: int) -> None:
    run = online_run(tmp_path / "run", steps=1)
    rows = [group(1 + n // 10, n, texts=[f"It is {n}."]) for n in range(groups)]
    lines(run / "samples.jsonl", rows)
    path = write_report([run])
    began = time.monotonic()
    page = show(path, 360)
    found = page.locator("#found")
    sync_api.expect(found).to_have_text("10,000 of 10,000 groups, 10,000 completions")
    assert page.locator("#groups li").count() == 50
    page.get_by_label("Search").fill("it is 777.")
    sync_api.expect(found).to_have_text("1 of 10,000 groups, 1 completion")
    page.get_by_label("Search").fill("")
    page.get_by_label("Order").select_option("longest first")
    sync_api.expect(found).to_contain_text("10,000 of")
    assert time.monotonic() - began < 20  # 2 s on an idle machine
