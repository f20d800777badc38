"""The front door: what a person types first is answered at once and in few words."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligntune import __version__
from aligntune.algorithms import registry
from aligntune.cli import COMMANDS, main
from aligntune.commands.train_cli import ALGORITHMS, trainer_of
from aligntune.names import PREFERENCE
from tests.aligntune.report.written import group, lines, online_run

REPOSITORY = Path(__file__).parents[2]


def aligntune(
    *arguments: str, cwd: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m aligntune ARGUMENTS`."""
    return subprocess.run(
        [sys.executable, "-m", "aligntune", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_version() -> None:
    done = aligntune("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"aligntune {__version__}\n", "")


def test_a_signal_before_a_run_has_begun_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def settle(*_: object, **__: object) -> None:
        sys.exit(signal.SIGTERM)  # as Ray's handler, once there is a connection

    monkeypatch.setattr("aligntune.commands.train_cli.trainer_of", settle)
    with pytest.raises(SystemExit) as ended:
        main(["train", "config.yaml"])
    assert ended.value.code == 143
    assert capsys.readouterr().err == "aligntune: stopped; no run had begun\n"


@pytest.mark.slow
def test_what_a_terminal_has_no_characters_for_is_a_mark_and_no_error(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", steps=1)
    lines(run / "samples.jsonl", [group(1, 0, texts=["says 正确"])])
    done = aligntune("samples", str(run), PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "says ??" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("jobs",), ("launch",)])
def test_without_a_command_the_help_is_shown_and_no_error(arguments: tuple[str, ...]) -> None:
    done = aligntune(*arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_help_has_its_short_form_everywhere() -> None:
    assert "quickstart" in aligntune("-h").stdout
    assert "--resume" in aligntune("train", "-h").stdout
    assert "status" in aligntune("jobs", "-h").stdout


@pytest.mark.slow
def test_commands_are_completed_in_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "aligntune"  # the name that completion knows the program by
    script.write_text("from aligntune.cli import console\nconsole()\n")
    shell = {
        "_ALIGNTUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": "aligntune qu",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **shell},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["quickstart"], done.stderr


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_help_lists_every_command_and_says_where_to_read_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = help_of("", capsys)
    assert all(name in said for name, _, _ in COMMANDS)
    assert "docs/configuration.md" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["train", "quickstart", "plan", "submit", "evaluate", "doctor", "launch slurm"]
)
def test_a_command_that_takes_much_shows_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.strip() for line in help_of(command, capsys).splitlines()]
    assert any(line.startswith(f"aligntune {command}") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "key"), [("train", "eval.every_steps=N"), ("evaluate", "eval.completions")]
)
def test_the_help_names_the_key_that_says_how_much_is_evaluated(
    command: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert key in help_of(command, capsys)


def test_the_help_of_train_names_every_algorithm() -> None:
    names = ALGORITHMS.replace(" or", "").split(", ")
    assert names == [*sorted(registry.names(), key=names.index), *PREFERENCE, "module:Class"]


def test_the_commonest_keys_are_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(
        "aligntune.commands.train_cli.trainer_of", lambda a, **g: made.update(g, a=a)
    )
    flags = "--steps 7 --lr 1e-5 --prompt-column question --eval held.jsonl data.eval_path=mine"
    with pytest.raises((SystemExit, AttributeError)):
        main(["train", "config.yaml", *flags.split()])
    assert (made["max_steps"], made["learning_rate"]) == (7, 1e-5)
    assert made["a"] == [
        "data.prompt_column=question",
        "data.eval_path=held.jsonl",
        "config.yaml",
        "data.eval_path=mine",
    ]


def test_a_config_file_is_one_also_where_its_path_has_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr("aligntune.trainers.create_rl_trainer", made.update)
    config = tmp_path / "lr=1e-6" / "config.yaml"
    config.parent.mkdir()
    config.write_text("{}")
    trainer_of([str(config), "train.steps=7"])
    assert (made["config"], made["overrides"]) == (str(config), ["train.steps=7"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train --algorythm grpo", "No such option: --algorythm; did you mean '--algorithm'?"),
        ("train --step 5 a.yaml", "No such option: --step; did you mean '--steps'?"),
        ("train --steps many a.yaml", "--steps: Input should be a valid integer"),
        (
            "train --backend unslot a.yaml",
            "--backend: 'unslot' is not one of 'trl', ",
        ),
        ("train a.yaml -x", "see `aligntune train --help`"),
        ("launch slurn a.yaml", "did you mean 'slurm'?; see `aligntune launch --help`"),
        ("evaluate", "Missing argument 'RUN|CONFIG.yaml|MODEL'; see `aligntune evaluate --help`"),
        ("jobs list", "Missing option '--address' (env var: 'RAY_API_SERVER_ADDRESS')"),
        ("tran a.yaml", "No such command 'tran'; did you mean 'train'?; see"),
    ],
)
def test_a_slip_is_told_with_what_was_meant_and_where_the_help_is(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


GOOD = """
algorithm: grpo
model: {name: Qwen/Qwen2.5-0.5B-Instruct}
data: {path: tasks.jsonl}
rewards: [math]
output_dir: run
rollout: {engine: transformers}
"""
RUN = """
algorithm: grpo
model: {name: tiny}
data: {path: rows.jsonl}
rewards: [exact_match]
output_dir: runs/grpo
"""
TINY = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}

LIGHT = """
import os, signal, sys
import aligntune.config.load, aligntune.commands.plan, aligntune.commands.submit, cluster.plan.plan
from aligntune.cli import main
for number, arguments in enumerate(sys.stdin):
    child = os.fork()  # each is as if it were the first, and the program is imported once
    if child == 0:
        signal.alarm(int(sys.argv[1]))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(f"{number}.out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(f"{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        try:
            main(arguments.split())
        finally:
            heavy = {"torch", "ray", "transformers", "vllm", "trl", "datasets", "pyarrow"}
            heavy &= sys.modules.keys()
            assert not heavy, f"loaded {heavy}"
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
DEADLINE_S = 60  # of one command; the slowest takes about 2 s on two idle cores
Told = Callable[[str], tuple[int, str, str]]
SLIPS = [
    ("train nowhere.yaml", "no config file at nowhere.yaml"),
    ("train", "give a config file, or --algorithm, --model and --dataset"),
    ("train a.yaml b.yaml", "one config file, not 2: a.yaml, b.yaml"),
    ("train --algorythm grpo", "No such option: --algorythm"),
    ("launch ray-up good.yaml", "ray-up needs --storage"),
    ("train twice.yaml", "twice.yaml:2: not valid YAML: 'model' stands twice"),
    ("train empty.yaml train", "one config file, not 2"),
    ("train good.yaml train.steps=[", "the value of train.steps"),
    ("train --algorithm dpo --model m --dataset d --reward math", "dpo has no argument"),
    ("train good.yaml train.stpes=5", "unknown key 'train.stpes'; did you mean 'train.steps'?"),
    ("train good.yaml algorithm.bata=0", "unknown key 'algorithm.bata'"),
    ("train good.yaml train.groups_per_step=0", "train.groups_per_step"),
    ("train good.yaml algorithm=gpro", "unknown algorithm 'gpro': did you mean 'grpo'?"),
    ("train good.yaml algorithm=dpo rewards=null train.stpes=5", "unknown key 'train.stpes'"),
    ("train run.yaml model.name=./nowhere", "model.name: model folder './nowhere' does not exist"),
    ("train run.yaml data.path=row.jsonl", "row.jsonl: no such file or folder; did you mean rows"),
    ("train run.yaml rollout.max_prompt_length=9 data.path=no.jsonl", "no.jsonl: no such file"),
    ("train run.yaml data.eval_path=no.jsonl", "no.jsonl: no such file or folder"),
    ("train run.yaml --reward exact_mach", "did you mean 'exact_match'"),
    ("train run.yaml --reward-model ./nowhere", "'./nowhere' does not exist"),
    ("data run.yaml data.path=no.jsonl", "no.jsonl: no such file or folder"),
    (
        "train --algorithm dpo --model nowhere --dataset rows.jsonl",
        "folder 'nowhere' does not exist",
    ),
    ("train --algorithm dpo --model tiny --dataset no.jsonl", "no.jsonl: no such file or folder"),
    (
        "train --algorithm sft --model tiny --dataset rows.jsonl data.eval_path=no.jsonl",
        "no.jsonl: no",
    ),
    ("plan good.yaml train.stpes=5", "unknown key 'train.stpes'; did you mean 'train.steps'?"),
    ("data good.yaml train.stpes=5", "unknown key 'train.stpes'; did you mean 'train.steps'?"),
    ("evaluate good.yaml train.stpes=5", "unknown key 'train.stpes'; did you mean"),
    ("evaluate nowhere.yaml", "'nowhere.yaml' does not exist"),
    ("plan nowhere.yaml", "'nowhere.yaml' does not exist"),
    ("submit nowhere.yaml --address head:8265", "'nowhere.yaml' does not exist"),
    ("nosuch", "No such command 'nosuch'; see `aligntune --help`"),
]
LOOKS = [
    ("--help", "quickstart"),
    ("train --help", "--dry-run"),
    ("algorithms", "grpo"),
    ("plan good.yaml --nodes 2 --gpus-per-node 8 --gpu h100-80gb", "node-0"),
    ("plan good.yaml model.name=tiny", "this machine"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Calls a command in a process of its own: its exit code, its errors and what it says."""
    folder = tmp_path_factory.mktemp("called-in")
    (folder / "twice.yaml").write_text("model: {name: a}\nmodel: {name: b}\n")
    (folder / "good.yaml").write_text(GOOD)
    (folder / "run.yaml").write_text(RUN)
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(TINY))
    numbers = itertools.count()
    with subprocess.Popen(
        [sys.executable, "-c", LIGHT, str(DEADLINE_S)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "RAY_ADDRESS": "local"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        asked, answers = program.stdin, program.stdout

        def call(arguments: str) -> tuple[int, str, str]:
            print(arguments, file=asked, flush=True)
            code, number = answers.readline(), next(numbers)
            assert code, "the program has ended"
            error, said = ((folder / f"{number}.{name}").read_text() for name in ("err", "out"))
            return int(code), error, said

        yield call
        asked.close()


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), SLIPS)
def test_a_slip_is_told_before_anything_heavy_is_loaded(
    told: Told, arguments: str, said: str
) -> None:
    code, error, _ = told(arguments)
    assert code == 2, error
    assert said in error
    assert len(error.splitlines()) == 1, error


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), LOOKS)
def test_what_looks_at_names_and_sizes_alone_loads_nothing_heavy(
    told: Told, arguments: str, said: str
) -> None:
    code, error, answer = told(arguments)
    assert code == 0, error
    assert said in answer


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\n",
        b"[]\n",
        b"5\n",
        b"{}\n",
        b'{"seq": 0, "event": "nope"}\n',
        b'{"seq": 0, "event": "move", "groups": [1], "to": "X"}\n',
        b'{"seq": 0, "event": "adopt"}\n',
        b'{"seq": 0, "event": "restore", "step": "x"}\n',
        b"[" * 100_000 + b"\n",
        b'{"seq": ' + b"9" * 5000 + b"}\n",
        b"\0" * 100 + b"\n",
    ],
    ids=range(11),
)
def test_the_audit_of_a_damaged_ledger_is_one_line_that_names_it(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(line)
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(tmp_path)])
    assert ended.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/ledger.jsonl:1: " in said


def test_the_audit_leaves_out_a_torn_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b'{"seq": 0, "event": "admit", "group": 0}\n'
    (tmp_path / "ledger.jsonl").write_bytes(good + b'{"seq": 1, "event": "mo')
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(tmp_path)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("1 admitted = ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["audit", "x" * 300], "cannot be read"),
        (["quickstart", "--out", "/proc/none/x"], "cannot be written to"),
        (["quickstart", "--seed", "-5"], "train.seed"),
    ],
)
def test_places_and_numbers_that_cannot_be(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir()), "it is said before anything is made"


def test_a_working_directory_that_was_deleted_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as ended:
        main(["rewards", "list"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aligntune: the working directory has been deleted")


def test_a_disk_that_takes_nothing_ends_a_command_in_one_line_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/step-000050")

    monkeypatch.setattr("aligntune.commands.train_cli.trainer_of", full)
    with pytest.raises(SystemExit) as ended:
        main(["train", "config.yaml"])
    assert ended.value.code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "No space left on device: '/disk/step-000050'" in first
    assert second == "resume with: aligntune train config.yaml"


@pytest.mark.slow
def test_the_audit_of_a_folder_above_a_run_names_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quickstart" / "run").mkdir(parents=True)
    (tmp_path / "quickstart" / "run" / "ledger.jsonl").touch()
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "metrics.jsonl").touch()
    for folder, said in (
        ("quickstart", f"did you mean {tmp_path}/quickstart/run?"),
        ("dpo", "a preference job trains on every pair and keeps none"),
        ("nowhere", "name a run directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["audit", str(tmp_path / folder)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
