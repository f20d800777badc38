"""The built site in a real browser: nothing is fetched from elsewhere, overflows or complains, and
equations are drawn."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stand_ins import REPOSITORY

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
if CHROMIUM is None:
    pytest.skip("there is no chromium here (apt-get install chromium)", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.long]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of the site as the strict build makes it, and its pages."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=REPOSITORY,
        check=True,
        timeout=120,
    )
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(path.name for path in Path(folder).glob("*.html") if path.stem != "404")
        yield f"http://127.0.0.1:{server.server_port}/", pages
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield launched
        launched.close()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_every_page_is_quiet_fits_and_asks_nobody_else(
    site: tuple[str, list[str]], browser: Any, width: int, scheme: str
) -> None:
    address, pages = site
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda asked: asked.url.startswith((address, "data:", "blob:")) or wrong.append(asked.url),
    )
    assert len(pages) > 20
    for name in pages:
        page.goto(address + name)
        page.wait_for_load_state("networkidle")
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wrong.append(f"{name} is wider than {width}")
    context.close()
    assert wrong == []


SIZES = """() => [...document.querySelectorAll("math")].map(math => {
    const box = math.getBoundingClientRect(), frame = math.closest(".equation");
    const hidden = frame === null ? 0 : frame.scrollWidth - frame.clientWidth;
    return {said: math.textContent, height: box.height, width: box.width, hidden};
})"""


def test_equations_have_a_height_and_stay_within_a_phone(
    site: tuple[str, list[str]], browser: Any
) -> None:
    address, pages = site
    page = browser.new_page(viewport={"width": 390, "height": 800})
    drawn = 0
    for name in pages:
        page.goto(address + name)
        sizes = page.evaluate(SIZES)
        drawn += len(sizes)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        for one in sizes:
            assert one["height"] > 4, (name, one)
            assert one["width"] > 4, (name, one)
            assert one["hidden"] == 0, (name, one)
    assert drawn > 80
    page.close()


def test_the_search_finds_a_word(site: tuple[str, list[str]], browser: Any) -> None:
    page = browser.new_page()
    page.goto(site[0] + "index.html")
    page.fill("input[name=query]", "quarantined")
    found = page.locator(".md-search-result__item")
    sync_api.expect(found.first).to_be_visible(timeout=20_000)
    page.close()
