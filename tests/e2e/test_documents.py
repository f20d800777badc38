"""What README and docs show is run here, or checked: commands, code, files, tables, names, links.

A fenced block says by its info string what becomes of it: `bash` lines are commands, each checked
by what its first words are; `file=PATH` writes the block to that file of the working folder; `run`
executes the Python. Commands for hub data and GPUs run with the overrides `LOCAL` and `ON_CPU`,
trainings with `SHORT` as well (tests/stand_ins.py).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from actors.preference.worker import METRICS
from aligntune import cli
from aligntune.algorithms import registry
from aligntune.commands.submit import follow
from aligntune.config import keywords
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import ALGORITHMS as PREFERENCE
from aligntune.evaluation.statistics import bootstrap, wilson
from aligntune.online.evaluating import decodings
from aligntune.quickstart.settings import TASKS, quickstart_settings
from aligntune.rewards.catalogue import REWARDS
from aligntune.runs.ended import TRAINED_BY
from aligntune.runs.jsonl import read_lines
from aligntune.runs.rundir import IDENTITY
from aligntune.tracking.advice import CHECKS
from aligntune.tracking.metrics import EventKind
from aligntune.tracking.trackers import SERVICES
from aligntune.tracking.views import KEPT
from tests import drivers
from tests.e2e.test_page_examples import PAGE
from tests.stand_ins import LOCAL, ON_CPU, REPOSITORY, SHORT, write_stand_ins
from tests.trials import equal_trials_once

DOCUMENTS = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(REPOSITORY / "docs").glob("*.md"),
    ]
)
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN_ONLY = {"text", "mermaid"}
METRIC = re.compile(r"`((?:[a-z_]+/)+(?:[a-z_]+|<criterion>/[a-z_]+))`")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: Path
    language: str
    info: str
    body: str

    @property
    def file(self) -> str | None:
        """The file it is the text of, if it is one."""
        return self.info.removeprefix("file=") if self.info.startswith("file=") else None

    def __str__(self) -> str:
        return f"{self.document.stem}: {self.body.splitlines()[0][:40]}"


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [Block(document, m[1], m[2].strip(), m[3]) for m in FENCE.finditer(text)]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, line ends with a backslash joined."""
    lines = block.body.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
COMMANDS = [
    (block, command) for block in BLOCKS if block.language == "bash" for command in commands(block)
]
TO_RUN = [block for block in BLOCKS if block.language == "python" and block.info == "run"]


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def section_of(name: str, heading: str) -> str:
    """The text of a document under a heading of the second level."""
    _, _, rest = text_of(name).partition(f"\n## {heading}\n")
    assert rest, f"{name} has no section {heading!r}"
    return rest.partition("\n## ")[0]


def rows_of(table: str) -> list[list[str]]:
    """The cells of every table row below the heads."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    heads = {i - 1 for i, row in enumerate(rows) if set("".join(row)) <= set("-:")}
    return [row for i, row in enumerate(rows) if i not in heads and i - 1 not in heads]


def in_backticks(text: str) -> list[str]:
    """What the prose of a document has in backticks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.fixture(autouse=True, scope="module")
def _equal_trials_once() -> Iterator[None]:
    with equal_trials_once():
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with stand-ins for models and data, and the files that documents show."""
    root = tmp_path_factory.mktemp("documents")
    write_stand_ins(root, tiny_model)
    for block in BLOCKS:
        if block.file:
            path = root / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body, encoding="utf-8")
    for _, command in COMMANDS:
        match command:
            case ["python", name]:  # it writes data that later commands read
                subprocess.run([sys.executable, name], cwd=root, check=True, timeout=60)
    return root


@pytest.fixture
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder as the current one, and on the import path as PYTHONPATH has it."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    yield workplace
    for name in [name for name in sys.modules if name.partition(".")[0] == "rloo"]:
        del sys.modules[name]


def call(arguments: list[str]) -> int:
    """`aligntune ARGUMENTS` in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


# Blocks and commands


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_kind_that_is_checked(block: Block) -> None:
    match block.language:
        case "bash":
            assert commands(block)
        case "python":
            assert block.info in ("run", "page") or block.file
        case "yaml" | "toml":
            assert block.file
        case language:
            assert language in SHOWN_ONLY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "command"), COMMANDS, ids=[f"{b.document.stem}: {' '.join(c)}" for b, c in COMMANDS]
)
def test_every_command_is_right(
    block: Block,
    command: list[str],
    in_workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    while re.fullmatch(r"\w+=.*", command[0]):
        variable = command[0].partition("=")[0]
        assert re.search(rf"^#   {variable} ", text_of("scripts/install.sh"), re.MULTILINE)
        command = command[1:]
    written_by_train = [
        c[c.index("--out") + 1]
        for b, c in COMMANDS
        if b.document == block.document and "--out" in c
    ]
    match command:
        case ["make", *arguments]:
            subprocess.run(["make", "-n", *arguments], cwd=REPOSITORY, check=True, text=True)
        case ["aligntune", "train", *arguments]:
            code = call(["train", *arguments, *LOCAL, "--dry-run"])
            shown = capsys.readouterr()
            assert code == 0, shown.err
            assert re.search(r" (prompts|pairs|rows), longest ", shown.out)
        case ["source", path]:
            assert path == ".venv/bin/activate"
            assert "\nvenv=.venv\n" in text_of("scripts/install.sh")
        case ["pip", "install", what]:
            extras = re.fullmatch(r"(?:\.|aligntune)\[([\w,-]+)\]( @ git\+https://\.\.\.)?", what)
            assert extras, "by its name alone it would be another project"
            project = tomllib.loads(text_of("pyproject.toml"))["project"]
            assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
        case ["python", name]:  # was run by `workplace`
            assert (in_workplace / name).is_file()
        case ["aligntune", "quickstart"]:  # run by tests/e2e/test_quickstart.py
            pass
        case ["aligntune", "--version"]:
            assert call(["--version"]) == 0
        case ["aligntune", "plan", *arguments]:
            code = call(["plan", *arguments])
            shown = capsys.readouterr()
            assert code == 0, shown.err
            assert "where each rank goes" in shown.out
        case ["aligntune", "launch", *arguments]:
            assert call(["launch", *arguments]) == 0, capsys.readouterr().err
            assert (in_workplace / arguments[arguments.index("--out") + 1]).stat().st_size
        case ["sbatch", path] | ["kubectl", "apply", "-f", path] | ["ray", "up", "-y", path]:
            assert path in written_by_train, "a file that `aligntune launch` wrote"
        case ["ray", "get-auth-token", "--generate"] | ["chmod", "600", "~/.ray/auth_token"]:
            pass  # changes this user's own token; tests/cluster make theirs
        case ["aligntune", "doctor", *arguments]:
            assert {"doctor"} <= command_names()
            assert set(arguments) <= {"--address", "auto", "--json"}
        case ["aligntune", "submit" | "jobs" as group, *arguments]:  # done in tests/cluster
            monkeypatch.setenv("WANDB_API_KEY", "secret")
            assert call([group, *arguments]) == 2
            assert "no Ray Jobs server answers at http://head:8265" in capsys.readouterr().err
        case ["aligntune", "quickstart", "--task", task]:  # run by tests/e2e/test_quickstart.py
            assert task in TASKS
        case ["aligntune", "algorithms"]:
            assert call(["algorithms"]) == 0
            listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
            assert listed == [*registry.names(), *PREFERENCE]
        case ["aligntune", "rewards"]:
            assert call(["rewards"]) == 0
            listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
            assert listed == list(REWARDS)
        case ["aligntune", "data", *arguments]:
            code = call(["data", *arguments, *LOCAL])
            shown = capsys.readouterr()
            assert code == 0, shown.err
            assert shown.out.startswith("Source: ")
        case ["aligntune", "rewards", "show" | "try", *_]:
            assert call(command[1:]) == 0, capsys.readouterr().err
        case ["aligntune", "compare", *_]:
            pass  # run by tests/aligntune/evaluation
        case ["aligntune", "evaluate", folder, *_]:  # run by the slow tests below
            written = [c[c.index("--out") + 1] for _, c in COMMANDS if "--out" in c]
            assert folder in written or "--config" in command
        case ["aligntune", "export", folder, "--out", _]:  # run by tests/e2e/test_quickstart.py
            assert folder in written_by_train
        case ["aligntune", "chat", model]:  # run by tests/aligntune/test_chat.py
            assert any(c[1:2] == ["export"] and model in c for _, c in COMMANDS)
        case ["tensorboard", "--logdir", folder]:
            assert folder in written_by_train
        case ["aligntune", "quickstart", "--algorithm", name, "--out", _, *overrides]:
            options = [f"{path}={json.dumps(v)}" for path, v in quickstart_settings(name).items()]
            load_config(
                {
                    "algorithm": name,
                    "model": {"name": "models/qwen"},
                    "data": {"path": "data/sums"},
                    "rewards": [{"model": "models/reward"}],
                    "output_dir": "run",
                },
                [*options, *overrides],
            )
        case ["aligntune", "audit" | "report" | "samples", folder, *_]:  # also in other pages
            assert folder in [c[c.index("--out") + 1] for _, c in COMMANDS if "--out" in c]
        case _:
            pytest.fail(f"{block.document.name} shows {shlex.join(command)}, which nothing checks")


def test_the_readme_activates_the_environment_before_its_first_command() -> None:
    shown = [c for block, c in COMMANDS if block.document.name == "README.md"]
    first = next(i for i, command in enumerate(shown) if command[0] == "aligntune")
    assert ["source", ".venv/bin/activate"] in shown[:first]


def test_the_readmes_six_calls_are_those_that_are_run() -> None:
    shown = {}
    for block in BLOCKS:
        if block.info == "page":
            (statement,) = ast.parse(block.body).body
            assert isinstance(statement, ast.Assign)
            made = statement.value
            assert isinstance(made, ast.Call)
            assert ast.unparse(made.func) == "create_rl_trainer"
            call = {k.arg: ast.literal_eval(k.value) for k in made.keywords}
            shown[call["algorithm"]] = call
    assert shown == PAGE


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_and_paths_in_the_prose_exist(document: Path) -> None:
    """What stands in backticks: `make X`, `aligntune X`, and paths of the repository."""
    for name in in_backticks(document.read_text(encoding="utf-8")):
        match name.split():
            case ["make", *arguments] if arguments:
                subprocess.run(["make", "-n", *arguments], cwd=REPOSITORY, check=True, text=True)
            case ["aligntune", command, *_] if name not in missing_commands():
                assert command in command_names() or command.startswith("-"), name
            case [path] if re.fullmatch(
                r"(aligntune|actors|cluster|tests|scripts|examples|docs)/[\w./-]*", path
            ):
                assert (REPOSITORY / path).exists(), path


def command_names() -> set[str]:
    groups = {group.name for group in cli.app.registered_groups if group.name}
    return groups | {
        c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback
    }


def missing_commands() -> set[str]:
    """What the README says is not there yet."""
    rows = rows_of(section_of("README.md", "What works today"))
    return {n for row in rows if row[1] == "not there yet" for n in in_backticks(row[0])}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_no_document_names_a_host(document: Path) -> None:
    assert not re.findall(r"https?://\w+", document.read_text(encoding="utf-8"))


# Code and runs, in processes of their own whose working folder is the one with the stand-ins; they
# join the Ray that tests share (tests/e2e/test_paths.py and test_quickstart.py start Rays of runs)


def printed_by(line: list[str], workplace: Path, given: str = "") -> str:
    """What `python LINE` prints in the working folder, where it reads `given`."""
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = drivers.run(line, cwd=workplace, env=environment, timeout=280, given=given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


RUNNER = """
import json
import sys

import aligntune
from aligntune.trainers import create_rl_trainer
from tests.stand_ins import LOCAL, ON_CPU, SHORT

def short(**arguments):
    overrides = [*arguments.pop("overrides", ()), *LOCAL, *ON_CPU, *SHORT]
    return create_rl_trainer(**arguments, overrides=overrides)

aligntune.create_rl_trainer = short
names = {"__name__": "__main__"}
exec(sys.stdin.read(), names)
print()
print(json.dumps(dict(names["result"].metrics) if "result" in names else None))
"""


@pytest.mark.slow
@pytest.mark.parametrize("block", TO_RUN, ids=str)
def test_python_runs(ray_session: None, block: Block, workplace: Path) -> None:
    *printed, metrics = printed_by(["-c", RUNNER], workplace, block.body).splitlines()
    assert any(printed)
    if "trainer.train()" in block.body:
        assert "reward/mean" in json.loads(metrics)
        assert undocumented(json.loads(metrics), {"correct", "concise"}) == set()


def test_the_example_of_an_own_algorithm_has_its_advantages_and_its_name(
    in_workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((in_workplace / "pyproject.toml").read_text())["project"]
    ((name, path),) = project["entry-points"]["aligntune.algorithms"].items()
    installed = in_workplace / f"{project['name']}-{project['version']}.dist-info"
    installed.mkdir()  # what pip leaves of the entry points
    (installed / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    (installed / "entry_points.txt").write_text(f"[aligntune.algorithms]\n{name} = {path}\n")
    algorithm = registry.get(name)
    assert name in registry.names()
    assert algorithm is registry.get(load_tree_name(in_workplace / "rloo.yaml"))
    groups = {
        (3.0, 1.0, 1.0, 0.0): [3 - 2 / 3, 1 - 4 / 3, 1 - 4 / 3, 0 - 5 / 3],
        (3.0, math.nan, 1.0, 0.0): [3 - 1 / 2, 0.0, 1 - 3 / 2, 0 - 4 / 2],  # one has no score
        (3.0, math.nan): [0.0, 0.0],
        (math.nan, math.nan): [0.0, 0.0],
    }
    rewards = [torch.tensor(scores)[:, None] for scores in groups]
    made = algorithm.model_validate({}).sequence_advantages(rewards, torch.ones(1))
    assert [of.tolist() for of in made] == [pytest.approx(of) for of in groups.values()]


def load_tree_name(path: Path) -> str:
    return load_config(path).algorithm_name


def run(arguments: list[str], workplace: Path) -> str:
    """`aligntune ARGUMENTS`; what it printed."""
    return printed_by(["-m", "aligntune.cli", *arguments], workplace)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_commands_train_a_model_and_the_run_directory_is_as_described(
    ray_session: None, workplace: Path
) -> None:
    shown = [c for block, c in COMMANDS if block.document.name == "README.md"]
    (train,) = [c for c in shown if c[:2] == ["aligntune", "train"] and "runs/gsm8k" in c]
    folder = workplace / train[train.index("--out") + 1]
    assert "done: 2 steps" in run([*train[1:], *LOCAL, *ON_CPU, *SHORT], workplace)
    for command in shown:
        if command[1] == "evaluate":
            scored = json.loads(run([*command[1:], "--json"], workplace))
            assert "pass@4" in scored["decodings"]["sampled"]["figures"]
            assert (scored["origin"], scored["step"]) == ("export", 2)
            assert Path(scored["model"]) == folder / "model"
        elif command[1] == "audit":
            assert run(command[1:], workplace).startswith("8 admitted = 8 trained + 0 filtered")
        elif command[1] == "report":
            assert run(command[1:], workplace).endswith("/report.html\n")
        elif command[1] == "samples":
            assert "reward" in run(command[1:], workplace)

    described = {in_backticks(row[0])[0].rstrip("/"): row[1] for row in run_directory()}
    found = {path.name for path in folder.iterdir()}
    assert found <= set(described)
    assert set(described) - found == {"rows.digest", "tracking_id", "trace.json"}, (
        "only of a job over a table, with a service, or with --profile"
    )
    checkpoint = folder / "checkpoints" / "step-000002"
    for path in checkpoint.iterdir():
        assert path.name in described["checkpoints"], path
    for name in ("samples.jsonl", "eval_samples.jsonl"):
        samples = read_lines(folder / name)
        keys = {*samples[0], *(key for told in samples[0]["completions"] for key in told)}
        assert keys <= set(in_backticks(described["samples.jsonl"]))
    for record in read_lines(folder / "ledger.jsonl"):
        assert set(record) <= set(in_backticks(described["ledger.jsonl"]))
        assert record["event"] in in_backticks(described["ledger.jsonl"])
    for name in ("metrics.jsonl", "evals.jsonl"):
        row = read_lines(folder / name)[-1]
        for key in {"step", "version", "measure"} & set(row):
            assert key in in_backticks(described[name])
            row.pop(key)
        assert undocumented(row, {"math"}) == set()


@pytest.mark.slow
@pytest.mark.long
def test_the_example_of_an_own_algorithm_trains(ray_session: None, workplace: Path) -> None:
    overrides = [text for text in SHORT if "completions_per_group" not in text]
    assert "done: 2 steps" in run(["train", "rloo.yaml", *overrides], workplace)


# Tables and names


def doc_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "doc_tables", REPOSITORY / "scripts/doc_tables.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_tables_of_options_are_those_of_the_code() -> None:
    tables, shown = doc_tables(), set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert text == tables.rendered(text), f"{document.name}: run scripts/doc_tables.py"
        shown |= {match["name"] for match in tables.TABLE.finditer(text)}
    assert shown == set(tables.tables()), "a section of the config has no table in the documents"


@pytest.mark.slow
def test_every_option_says_what_it_is() -> None:
    tables = doc_tables()
    silent = [
        f"{name}: {row[0]}"
        for name, table in tables.tables().items()
        if name != "defaults"
        for row in rows_of(table)
        if not row[-1]
    ]
    assert silent == []


def test_every_keyword_argument_is_in_the_configuration_document() -> None:
    head = text_of("docs/configuration.md").partition("\n## ")[0]
    shown = {in_backticks(row[0])[0]: row[1] for row in rows_of(head)}
    assert set(shown) == {*keywords.PATHS, *keywords.SPECIAL}
    for argument, path in keywords.PATHS.items():
        assert shown[argument].startswith(f"`{path}`")
    for argument, path in keywords.PREFERENCE_PATHS.items():
        if path != keywords.PATHS.get(argument):
            assert re.search(rf"`{argument}`\sis\s`{path}`", head)


def test_keys_that_must_stay_on_resume_and_at_the_end_are_those_of_the_code() -> None:
    text = section_of("docs/configuration.md", "What may change when a run goes on")
    sections = {"algorithm", *RunConfig.model_fields}
    shown = [n for n in in_backticks(text) if "." in n and n.partition(".")[0] in sections]
    assert shown == list(IDENTITY)
    text = section_of("docs/configuration.md", "What may change once all steps are trained")
    shown = in_backticks(text)
    assert [key for key in TRAINED_BY if not {key, key.rpartition(".")[2]} & {*shown}] == []


def test_tests_that_are_named_exist() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in (REPOSITORY / "tests").rglob("*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", source))
    for document in DOCUMENTS:
        named = {n for n in in_backticks(document.read_text()) if re.fullmatch(r"test_\w+", n)}
        assert named <= defined, document.name


def run_directory() -> list[list[str]]:
    return rows_of(section_of("docs/architecture.md", "The run directory"))


def test_event_kinds_are_those_of_the_code() -> None:
    text = section_of("docs/architecture.md", "The run directory")
    assert in_backticks(text.partition("Event kinds:")[2]) == [kind.value for kind in EventKind]


def documented() -> set[str]:
    rows = rows_of(section_of("docs/architecture.md", "Metrics"))
    return {name for row in rows for name in METRIC.findall(row[0])}


def undocumented(metrics: dict[str, Any], criteria: set[str]) -> set[str]:
    """Figures of a run that the table of metrics does not have."""
    known = "|".join(map(re.escape, criteria))
    names = {re.sub(rf"reward/({known})/", "reward/<criterion>/", name) for name in metrics}
    return names - documented()


def test_what_a_run_warns_of_is_documented() -> None:
    rows = rows_of(section_of("docs/architecture.md", "What a run warns of"))
    assert [in_backticks(row[0])[0] for row in rows] == list(CHECKS)
    named = {name for row in rows for name in METRIC.findall(row[1])}
    assert named <= documented()


def test_metrics_that_the_code_names_are_documented() -> None:
    """Also those that only one algorithm or a rare case has."""
    files = [
        *(REPOSITORY / "aligntune" / "algorithms").glob("*.py"),
        *(REPOSITORY / "aligntune" / "online" / name for name in ("figures.py", "evaluation.py")),
        *(REPOSITORY / "actors" / name for name in ("ranks.py", "policy.py", "critic.py")),
    ]
    named = {
        name
        for file in files
        for name in re.findall(r'"((?:[a-z_]+/)+[a-z_]+)"', file.read_text(encoding="utf-8"))
    }
    assert "kl/update" in named
    assert named <= documented()


def test_algorithms_are_listed_with_their_needs_and_backends() -> None:
    table = section_of("README.md", "What works today").partition("| part |")[0]
    shown = {in_backticks(row[0])[0]: row for row in rows_of(table)}
    assert set(shown) == {*registry.names(), *PREFERENCE}
    for name in registry.names():
        algorithm = registry.get(name)
        cells = dict(zip(("trl", "unsloth"), shown[name][2:4], strict=True))
        assert {b for b, cell in cells.items() if cell == "refused"} == {
            backend for backend in cells if backend not in algorithm.backends
        }
    head = text_of("docs/algorithms.md").partition("\n## ")[0]
    for row in rows_of(head):
        algorithm = registry.get(in_backticks(row[0])[0])
        assert tuple(in_backticks(row[1])) == algorithm.aliases
        fields = algorithm.model_fields
        needs = algorithm.model_construct(**{n: f.default for n, f in fields.items()}).needs
        assert (row[4] == "yes") == needs.critic
        assert ("a reward model" in row[3]) == needs.reward_model


def prose_of(name: str) -> str:
    """The text of a document in one line."""
    return " ".join(text_of(name).split())


@pytest.mark.parametrize("name", registry.names())
def test_the_prose_says_what_weighs_the_loss_of_every_algorithm(name: str) -> None:
    page = prose_of(f"docs/{name}.md")
    assert "correction" in registry.get(name).model_fields
    assert "rollout correction; see [Algorithms](algorithms.md#notation)" in page


def test_the_prose_on_trackers_is_as_they_are() -> None:
    page = prose_of("docs/configuration.md")
    assert f"the newest {KEPT:,} rows and tables" in page
    for service in SERVICES.values():  # what was sent stays
        service.truncate_after(None, 1)  # type: ignore[attr-defined]
    assert "after a rollback stand there twice, but in TensorBoard" in page


def test_the_prose_on_evaluations_says_what_is_sampled_and_which_intervals_there_are() -> None:
    page = prose_of("docs/evaluation.md")
    config = load_config(
        {
            "algorithm": "grpo",
            "model": {"name": "m"},
            "data": {"path": "d", "eval_path": "e"},
            "rewards": ["math"],
            "output_dir": "o",
        }
    )
    assert isinstance(config, RunConfig)
    assert [*decodings(config)] == ["greedy"]
    assert decodings(config, temperature=0.7)["sampled"].completions == config.eval.completions
    assert "adds `eval.completions` of them, and so does `--temperature` alone." in page
    assert wilson(1, 1).low is not None
    assert bootstrap([1.0]).low is None
    assert "`pass@1` of one completion a prompt, greedy or sampled," in page
    assert "One prompt has no bootstrap interval." in page


def test_exit_codes_of_a_job_that_is_followed_are_in_the_table() -> None:
    table = text_of("docs/clusters.md").partition("| exit code of `submit`")[2].partition("\n\n")[0]
    told = {code for row in table.splitlines() for code in re.findall(r"\d+", row.split("|")[1])}
    known = set(re.findall(r"(?:return|code ==) (\d+)", inspect.getsource(follow)))
    assert known >= {"1", "127", "130"}
    assert known <= told


def test_what_is_said_not_to_be_there_is_not() -> None:
    """Neither a command nor, by its name in capitals or backticks, a key or a choice."""
    tables = "\n".join(doc_tables().tables().values())
    choices = {name for row in rows_of(tables) for name in in_backticks(" ".join(row[:2]))}
    assert {"fsdp", "nccl", "weight_sync"} <= choices
    for row in rows_of(section_of("README.md", "What works today")):
        if row[1] == "not there yet":
            named = {*in_backticks(row[0]), *re.findall(r"\b[A-Z]{3,}\b", row[0])}
            named = {name.removeprefix("aligntune ").lower() for name in named}
            assert named.isdisjoint(choices | command_names()), row


def test_figures_of_jobs_over_tables_are_documented() -> None:
    rows = rows_of(section_of("docs/architecture.md", "Metrics of a job over a table"))
    named = {name.removeprefix("eval/") for row in rows for name in in_backticks(row[0])}
    assert set(METRICS.values()) <= named


def test_registered_rewards_are_in_the_changelog() -> None:
    assert set(REWARDS) <= set(in_backticks(text_of("CHANGELOG.md")))
