"""What the site says beside its commands: messages, keys of other libraries, curves, notebooks.

The site itself is built by `make docs`, which fails at a link or an anchor that leads nowhere.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aligntune.algorithms import registry
from aligntune.config.online import RunConfig
from aligntune.config.preference import ALGORITHMS as PREFERENCE
from aligntune.config.preference import PreferenceConfig
from tests.e2e.test_documents import (
    METRIC,
    doc_tables,
    in_backticks,
    rows_of,
    section_of,
    text_of,
)
from tests.stand_ins import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples" / "notebooks").glob("*.ipynb"))
HOLE = "\0"  # stands for what an f-string fills in


def script(name: str) -> ModuleType:
    """A module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Messages


@cache
def texts_of_the_code() -> str:
    """Every text that the packages hold, a line each, with holes for what is filled in."""
    found = set()
    for package in ("aligntune", "actors", "cluster"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Constant(value=str(text)):
                        found.add(text)
                    case ast.JoinedStr(values=parts):
                        found.add(
                            "".join(
                                str(part.value) if isinstance(part, ast.Constant) else HOLE
                                for part in parts
                            )
                        )
    return "\n".join(" ".join(text.split()) for text in sorted(found))


def is_said(message: str) -> bool:
    """Whether one text of the code has the message; each `...` is one or more of its holes."""
    parts = [part.strip() for part in message.split("...")]
    pattern = f"[^\n]*{HOLE}[^\n]*".join(re.escape(part) for part in parts if part)
    return re.search(pattern, texts_of_the_code()) is not None


@pytest.mark.slow
def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    rows = rows_of(text_of("docs/troubleshooting.md"))
    messages = [in_backticks(row[0])[0] for row in rows]
    assert len(messages) > 40
    assert [message for message in messages if not is_said(message)] == []


@pytest.mark.slow
def test_a_message_that_the_code_does_not_say_is_seen() -> None:
    assert is_said("no config file at ...")
    assert not is_said("no config file in ...")
    assert not is_said("no config ... file at")


# Keys


@cache
def fields_of_class(path: Path) -> set[str]:
    """The annotated fields of all classes of a module, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        item.target.id
        for of in classes
        for item in of.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def keys_of_trl(*names: str) -> set[str]:
    """The settings of TRL's trainers, those that all of transformers' share among them."""
    trainers = installed("trl") / "trainer"
    shared = fields_of_class(installed("transformers") / "training_args.py")
    own = (fields_of_class(trainers / f"{name}_config.py") for name in ("base", *names))
    return shared.union(*own)


def arguments_of_trl(*names: str) -> set[str]:
    """What TRL's trainers take beside their settings."""
    found = set()
    for name in names:
        path = installed("trl") / "trainer" / f"{name}_trainer.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                found |= {argument.arg for argument in node.args.args}
    return found


def our_keys() -> set[str]:
    """Every key of both trees, by its dotted path."""
    tables = doc_tables()
    options = {key for name in registry.names() for key in registry.get(name).model_fields}
    options |= {key for spec in PREFERENCE.values() for key in spec.model_fields}
    keys = {f"algorithm.{key}" for key in {"name", *options}}
    for tree in (RunConfig, PreferenceConfig):
        keys |= set(tree.model_fields)
    for path, model in tables.sections().items():
        section = path.removeprefix("preference.")
        section = re.sub(r"^rewards\.\w+$", "rewards.0", section)
        places = {
            "engine.vllm": ("rollout.engine",),
            "strategy.deepspeed": ("policy.strategy", "critic.strategy"),
        }.get(section, (section,))
        keys |= {f"{place}.{key}" for place in places for key in model.model_fields}
    return keys


def tables_of_moving() -> Iterator[tuple[str, list[list[str]]]]:
    """The heading and the rows of each table of the page."""
    for part in text_of("docs/moving.md").split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        yield heading, rows_of(text)


def test_the_keys_of_trl_that_are_moved_from_exist() -> None:
    of = {
        "TRL: GRPOConfig": keys_of_trl("grpo"),
        "TRL: what all its trainers share": keys_of_trl(),
        "TRL: SFTConfig": keys_of_trl("sft"),
        "TRL: DPOConfig and RewardConfig": keys_of_trl("dpo", "reward"),
        "TRL: arguments of its trainers": arguments_of_trl("grpo", "dpo", "reward", "sft"),
    }
    shown = dict(tables_of_moving())
    for heading, known in of.items():
        named = {key for row in shown[heading] for key in in_backticks(row[0])}
        assert named, heading
        assert named - known == set(), heading


def test_the_version_of_trl_that_is_moved_from_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert f"TRL {version('trl')}." in text_of("docs/moving.md")


def test_the_keys_that_are_moved_to_exist() -> None:
    known = our_keys()
    assert "train.steps" in known
    assert "train.stepss" not in known
    for heading, rows in tables_of_moving():
        for row in rows:
            named = in_backticks(row[1])
            assert named or row[1] == "none", f"{heading}: {row}"
            assert set(named) <= known, f"{heading}: {row}"


STATED = re.compile(r"`?([\w.]+)`? for ((?:`\w+`(?! for)(?:, | and )?)+)")


@pytest.mark.parametrize(
    ("key", "field"), [("actor.use_kl_loss", "beta"), ("actor.loss_agg_mode", "aggregation")]
)
def test_defaults_that_change_the_loss_of_verl_are_stated_as_they_are(key: str, field: str) -> None:
    (told,) = (row[2] for row in dict(tables_of_moving())["verl"] if key in in_backticks(row[0]))
    stated = {name: value for value, names in STATED.findall(told) for name in in_backticks(names)}
    defaults = {name: registry.get(name).model_fields[field].default for name in stated}
    assert {name: str(value) for name, value in defaults.items()} == {
        name: str(float(value)) if field == "beta" else value for name, value in stated.items()
    }
    assert stated.keys() == {"grpo", "gspo", "drgrpo", "ppo"}, "what verl has too"


def test_figures_that_the_page_of_reading_a_run_explains_are_those_that_runs_have() -> None:
    known = set(in_backticks(section_of("docs/architecture.md", "Metrics")))
    text = text_of("docs/report.md")
    named = {name for name in in_backticks(text) if METRIC.fullmatch(f"`{name}`")}
    assert len(named) > 20
    assert named - known == set()


# Curves and pages


def test_curves_and_what_is_said_of_runs_follow_from_the_kept_figures() -> None:
    runs = script("doc_runs")
    kept = sorted(path.stem for path in runs.RUNS.glob("*.jsonl"))
    shown = set()
    for path in sorted((REPOSITORY / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        shown |= {match["name"] for match in runs.PLACE.finditer(text)}
        assert text == runs.rendered(text), f"{path.name}: run scripts/doc_runs.py"
    assert shown == set(kept)
    for name in kept:
        drawn = (runs.RUNS / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == runs.drawing(name), f"{name}.svg: run scripts/doc_runs.py"


def test_a_page_shows_the_path_of_a_file_and_the_readmes_sections_with_its_own_links() -> None:
    hooks = script("doc_hooks")
    page = "```python file=a.py\nx\n```\n```python run\ny\n```\n<!-- readme: Train a model -->\n"
    made = hooks.on_page_markdown(page, page=None)
    assert '```python title="a.py"\n' in made
    assert "```python\ny" in made
    assert "## Train a model" in made
    assert "](configuration.md)" in made
    assert "](docs/" not in made
    assert "## How it works" not in made
    with pytest.raises(ValueError, match="no section 'Nothing'"):
        hooks.on_page_markdown("<!-- readme: Nothing -->", page=None)


def test_a_picture_takes_the_colours_of_its_page_and_says_what_it_shows() -> None:
    made = script("doc_hooks").on_page_markdown("![A <step>](pictures/step.svg)", page=None)
    assert 'role="img" aria-label="A &lt;step&gt;"' in made
    assert "<style>" not in made
    assert "\n\n" not in made


# Equations


def site_config() -> Any:
    from mkdocs.config import load_config

    return load_config(str(REPOSITORY / "mkdocs.yml"))


def pages_of_algorithms() -> list[str]:
    (pages,) = (each["Algorithms"] for each in site_config().nav if "Algorithms" in each)
    return [page if isinstance(page, str) else next(iter(page.values())) for page in pages]


def rendered(text: str) -> str:
    """A page's own part, as the site has it."""
    import markdown

    config, hooks = site_config(), script("doc_hooks")
    engine = markdown.Markdown(
        extensions=config.markdown_extensions, extension_configs=config.mdx_configs
    )
    made = engine.convert(hooks.on_page_markdown(text, page=None))
    return str(hooks.on_page_content(made, page=None))


@pytest.mark.slow
def test_every_equation_of_an_algorithms_page_is_mathml() -> None:
    pages = pages_of_algorithms()
    assert {"algorithms.md", "grpo.md", "ppo.md", "dpo.md"} < set(pages)
    for page in pages:
        text = text_of(f"docs/{page}")
        blocks = re.findall(r"^\$\$\n.+?\n\$\$$", text, re.DOTALL | re.MULTILINE)
        inline = re.findall(r"(?<!\$)\$(?!\s)[^$\n]+?(?<!\s)\$(?!\$)", text)
        made = rendered(text)
        assert blocks, page
        assert made.count('display="block"') == len(blocks), page
        assert made.count('display="inline"') == len(inline), page
        assert "$" not in re.sub(r"<code.*?</code>", "", made, flags=re.DOTALL), page
        assert "arithmatex" not in made, page


def test_an_equation_is_mathml_with_the_names_of_functions_apart() -> None:
    made = rendered("So $a \\lt \\log b$ holds:\n\n$$\n\\frac{1}{2}\n$$\n")
    assert "<mi>a</mi><mo>&#x0003C;</mo>" in made
    assert 'rspace="0.17em">log</mo>' in made
    assert '<div class="equation"><math' in made
    assert "<mfrac>" in made


@pytest.mark.parametrize("latex", [r"\frac{1}{", r"\nosuch{x}", r"\left( x"])
def test_latex_that_is_not_known_ends_the_build(latex: str) -> None:
    with pytest.raises(ValueError, match=re.escape(latex)):
        rendered(f"$$\n{latex}\n$$")


# Notebooks


def cells(notebook: Path, kind: str = "code") -> list[str]:
    return [
        "".join(cell["source"])
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_printed(notebook: Path) -> None:
    kept = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in kept["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert cells(notebook, "markdown")[0].startswith("# ")


def test_the_notebook_of_an_own_reward_has_the_readmes_rows_and_settings() -> None:
    """What the README's code shows, which tests/e2e/test_documents.py runs, is here too."""
    from tests.e2e.test_documents import BLOCKS

    (rows,) = [block.body.strip() for block in BLOCKS if block.file == "make_tasks.py"]
    source = cells(REPOSITORY / "examples" / "notebooks" / "own_reward.ipynb")
    assert rows in source
    (made,) = [cell for cell in source if "create_rl_trainer(" in cell]
    call = next(n for n in ast.walk(ast.parse(made)) if isinstance(n, ast.Call) and n.keywords)
    assert {k.arg for k in call.keywords} >= {"reward_functions", "overrides"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_both_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one folder, as their texts say, with fewer steps."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    for name in ("quickstart", "own_reward"):
        text = (REPOSITORY / "examples" / "notebooks" / f"{name}.ipynb").read_text()
        for long, short in (("train.steps=30", "train.steps=2"), ("max_steps=20", "max_steps=2")):
            text = text.replace(long, short)
        notebook: Any = nbformat.reads(text, as_version=4)
        client = NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()
    assert (tmp_path / "runs/own-reward/model").is_dir()
