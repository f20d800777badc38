"""What mkdocs does to the pages of docs/ before it renders them; they stay plain Markdown.

A fence says to tests what becomes of it (`file=PATH`, `run`, `page`); the site shows the path as
its title. `<!-- readme: HEADING -->` becomes that section of the README. An SVG picture is written
into the page, where it takes the page's own colours, light or dark. An equation, LaTeX between
dollars, becomes MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

REPOSITORY = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+) (?:file=(\S+)|run|page)$", re.MULTILINE)
README = re.compile(r"^<!-- readme: (.+) -->$", re.MULTILINE)
PICTURE = re.compile(r"^!\[([^\]]+)\]\((\S+\.svg)\)$", re.MULTILINE)
EQUATION = re.compile(  # as pymdownx.arithmatex marks one
    r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
OWN_COLOURS = re.compile(r"<style>.*?</style>\s*", re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The Markdown of a page as the site renders it."""
    markdown = README.sub(lambda m: readme_section(m[1]), markdown)
    markdown = PICTURE.sub(lambda m: picture(REPOSITORY / "docs" / m[2], m[1]), markdown)
    return FENCE.sub(lambda m: f'```{m[1]} title="{m[2]}"' if m[2] else f"```{m[1]}", markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The HTML of a page with its equations as MathML. ValueError: see `equation`."""
    return EQUATION.sub(lambda m: equation(html.unescape(m[2]), block=m[1] == "div"), content)


def equation(latex: str, block: bool) -> str:
    """An equation as MathML, on lines of its own or within a text.

    ValueError: it is not LaTeX, or has a command that the converter does not know.
    """
    latex = latex.strip()
    try:
        made = convert(latex, display="block" if block else "inline")
    except Exception as error:  # its errors have no common class
        raise ValueError(f"not LaTeX ({type(error).__name__}): {latex}") from error
    if "\\" in made:
        raise ValueError(f"latex2mathml does not know a command of: {latex}")
    # The name of a function stands apart from its argument, which an identifier does not.
    made = made.replace("<mi>log</mi>", '<mo lspace="0" rspace="0.17em">log</mo>')
    return f'<div class="equation">{made}</div>' if block else made


def readme_section(heading: str) -> str:
    """A section of the README with its heading, and its links as a page of docs/ has them.

    ValueError: it has no such section.
    """
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}\n.*?(?=^\1 |^## |\Z)", text, re.M | re.S)
    if not found:
        raise ValueError(f"the README has no section {heading!r}")
    return found[0].replace("](docs/", "](").strip()


def picture(path: Path, alt: str) -> str:
    """An SVG to be written into a page, without the colours that it has where it stands alone."""
    drawn = OWN_COLOURS.sub("", path.read_text(encoding="utf-8")).strip()
    drawn = re.sub(r"\n\s*\n", "\n", drawn)  # an empty line would end the HTML block
    named = drawn.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
    return f'<figure class="picture" markdown="0">\n{named}\n</figure>'
