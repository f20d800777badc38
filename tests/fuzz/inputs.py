"""The kinds of input that are tried, each through the function that meets it first."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import csv
import functools
import io
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from actors.environments import channel as play_channel
from actors.scoring import channel
from actors.scoring.calling import checked
from actors.scoring.criteria import RewardFailed
from aligntune.config.load import load_config
from aligntune.config.tree import dump
from aligntune.errors import RunFailed, UserError
from aligntune.rewards.remote import NoAnswer, scores_of
from aligntune.runs.checkpoint import Checkpoints, intact
from aligntune.runs.rundir import RunDir
from tests.fuzz import broken
from tests.fuzz.trial import NotRight, Refused, Try, one_line

REPOSITORY = Path(__file__).parents[2]


@functools.cache
def examples() -> list[str]:
    """The configs in the repository."""
    return [path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("examples/*.yaml"))]


@functools.cache
def whole_trees() -> list[dict[str, Any]]:
    """The examples with every key written out."""
    return [yaml.safe_load(dump(load_config(yaml.safe_load(text)))) for text in examples()]


# Configs


def _read(source: Any, overrides: list[str]) -> Refused | None:
    try:
        config = load_config(source, overrides)
    except UserError as error:
        return one_line(error)
    again = load_config(yaml.safe_load(dump(config)))
    if dump(again) != dump(config):
        raise NotRight(f"written and read again it is another: {dump(config)}")
    return None


def config_file(dice: random.Random, folder: Path) -> Refused | None:
    """A YAML file: an example whose tree or whose bytes are spoilt."""
    path = folder / "config.yaml"
    if dice.random() < 0.5:
        tree = copy.deepcopy(dice.choice(whole_trees()))
        for _ in range(dice.choice((1, 1, 2, 3))):
            tree = broken.mutate(dice, tree)
        try:
            raw = yaml.safe_dump(tree, allow_unicode=dice.random() < 0.5).encode("utf-8", "replace")
        except (yaml.YAMLError, ValueError):  # of a number of 5,000 digits
            raw = repr(tree)[:200].encode("utf-8", "replace")
    else:
        raw = broken.spoil(dice, dice.choice(examples()).encode())
    path.write_bytes(raw)
    return _read(path, [])


def config_text(dice: random.Random, folder: Path) -> Refused | None:
    """A YAML file of what YAML has that settings have not."""
    path = folder / "config.yaml"
    head = dice.choice(examples())
    tail = dice.choice(
        (
            "train: &a {steps: *a}\n",
            "x: &x [1]\ny: [*x, *x]\n",
            "\n".join(f"a{i}: &a{i} [*a{max(0, i - 1)}, 1]" for i in range(dice.randint(1, 40))),
            "train:\n" + "".join(" " * i + "a:\n" for i in range(1, dice.choice((5, 200, 2000)))),
            "? [a, b]\n: c\n",
            "? {a: b}\n: c\n",
            "!!set {a, b}\n",
            "!!binary aGVsbG8=\n",
            "train: !!python/tuple [1]\n",
            "<<: {train: {steps: 3}}\n",
            "train: {<<: [{steps: 1}, {seed: 2}]}\n",
            "---\na: 1\n---\nb: 2\n",
            "%YAML 1.1\n---\na: 1\n",
            "train: {steps: 0o17, seed: 0x_}\n",
            "data: !!omap [a: 1]\n",
            "a: !!float x\n",
            "a: !!int ''\n",
            "a: !!bool maybe\n",
            "a: !!timestamp 2001-99-99\n",
            "{" * dice.choice((10, 900, 5000)),
            "- " * dice.choice((10, 5000)),
            "a: " + "9" * 5000 + "\n",
            "a: 1" + "_" * 500 + "\n",
            "a: .\n",
            "a: 0x\n",
            "\t\n",
            "\ufeff",
        )
    )
    path.write_text(dice.choice((head + "\n" + tail, tail, tail + "\n" + head)), encoding="utf-8")
    return _read(path, [])


def overrides(dice: random.Random, folder: Path) -> Refused | None:
    """`key.path=value`, of keys that there are and keys that there are not."""
    tree = dice.choice(whole_trees())
    given = []
    for _ in range(dice.choice((1, 1, 2, 4))):
        path = ".".join(map(str, dice.choice(broken.paths(tree))))
        path = dice.choice((path, path, path, broken.misspelt(dice, path), broken.text(dice)))
        path += dice.choice(("", "", "", "", ".0", ".x", ".", "..", " "))
        said = dice.choice((broken.text(dice), repr(broken.value(dice, 2))[:300], json_like(dice)))
        given.append(dice.choice((f"{path}={said}", f"{path}={said}", f"{path}", f"={said}")))
    return _read(copy.deepcopy(tree), given)


def json_like(dice: random.Random) -> str:
    """A value as people write it on a command line."""
    try:
        return json.dumps(broken.value(dice, 2))[:300]
    except ValueError:
        return "9" * 400


def mapping(dice: random.Random, folder: Path) -> Refused | None:
    """A config as a mapping of Python's, which may hold what no file holds."""
    tree: Any = copy.deepcopy(dice.choice(whole_trees()))
    odd = (b"x", Path("x"), {1, 2}, (1, 2), object(), lambda x: x, np.float32(1), 1j, range(3))
    for _ in range(dice.choice((1, 2))):
        tree = broken.mutate(dice, tree)
        places = broken.paths(tree)
        if places and dice.random() < 0.5:
            *above, last = dice.choice(places)
            node = tree
            for step in above:
                node = node[step]
            node[last] = dice.choice(odd)
    if not isinstance(tree, dict):
        return None
    return _read(tree, [])


# Python arguments


def arguments(dice: random.Random, folder: Path) -> Refused | None:
    """What `create_rl_trainer` is called with."""
    from aligntune.trainers import create_rl_trainer

    good: dict[str, Any] = {
        "model_name": "m",
        "dataset_name": "d",
        "algorithm": dice.choice(("grpo", "ppo", "dpo")),
        "reward_functions": "length",
        "max_steps": 3,
        "num_generations": 4,
        "batch_size": 4,
    }
    names = [*create_rl_trainer.__annotations__][:-1]
    odd: Any = (
        b"x",
        Path("x"),
        {1, 2},
        (1, 2),
        object(),
        len,
        np.float32(1),
        1j,
        [len, "math"],
        "x",
    )
    for _ in range(dice.choice((1, 1, 2, 3))):
        name = dice.choice((*names, *names, broken.misspelt(dice, dice.choice(names))))
        good[name] = dice.choice((broken.value(dice, 2), dice.choice(odd)))
    if dice.random() < 0.3:
        good.pop(dice.choice(list(good)))
    try:
        create_rl_trainer(**good)
    except UserError as error:
        return one_line(error)
    return None


# Data


@functools.cache
def tokenizers() -> list[Any]:
    """With a chat template, without, and with one that carries tools."""
    from aligntune.quickstart.agent import make_agent_tokenizer
    from tests.aligntune.data.conftest import TEMPLATE, byte_tokenizer

    tools = byte_tokenizer(template=make_agent_tokenizer().chat_template)
    return [byte_tokenizer(template=TEMPLATE), byte_tokenizer(), tools]


def rows_of(dice: random.Random) -> list[dict[str, Any]]:
    """Rows that are good, most of them."""
    count = dice.randint(1, 12)
    kind = dice.choice(("text", "chat", "pairs", "sharegpt", "tools"))
    rows: list[dict[str, Any]] = []
    for index in range(count):
        asked, said = f"{index}+1", f"{index + 1}"
        user = {"role": "user", "content": asked}
        row: dict[str, Any] = {
            "text": {"prompt": asked, "answer": said},
            "chat": {"prompt": [user], "answer": said},
            "pairs": {"prompt": asked, "chosen": said, "rejected": f"{said}0"},
            "sharegpt": {"conversations": [{"from": "human", "value": asked}]},
            "tools": {
                "prompt": [user],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            },
        }[kind]
        if dice.random() < 0.15:
            broken.mutate(dice, row)
        rows.append(row)
    return rows


def written(dice: random.Random, rows: list[dict[str, Any]], folder: Path) -> Path | None:
    """The rows as a file of some kind, spoilt here and there; None where they cannot be written."""
    kind = dice.choice(("jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz"))
    path = folder / f"train.{kind}"
    try:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
            raw = path.read_bytes()
        elif kind == "csv":
            text = io.StringIO()
            names = list(dict.fromkeys(str(name) for row in rows for name in row))
            out = csv.writer(text)
            out.writerows([names, *([str(row.get(name, "")) for name in names] for row in rows)])
            raw = text.getvalue().encode("utf-8", "surrogatepass")
        else:
            parts = [json.dumps(row, ensure_ascii=dice.random() < 0.5) for row in rows]
            text_of = "[" + ",\n".join(parts) + "]" if kind == "json" else "\n".join(parts) + "\n"
            raw = text_of.encode("utf-8", "surrogatepass")
    except Exception:  # noqa: BLE001 - of whatever cannot be written there is no file
        return None
    if dice.random() < 0.5:
        raw = broken.spoil(dice, raw)
    if kind.endswith(".gz"):
        import gzip

        raw = gzip.compress(raw)
        if dice.random() < 0.3:
            raw = broken.spoil(dice, raw)
    path.write_bytes(raw)
    return path


def data(dice: random.Random, folder: Path) -> Refused | None:
    """Training rows, as prompts: none is lost in silence."""
    from aligntune.data.prompts import training_prompts, training_rows
    from aligntune.data.spec import DataSpec

    path = written(dice, rows_of(dice), folder)
    if path is None:
        return None
    spec = DataSpec(
        path=str(path),
        max_dropped_fraction=dice.choice((0.1, 1.0, 1.0)),
        bad_rows=dice.choice(("drop", "drop", "error")),
        fold_duplicates=dice.random() < 0.2,
        long_rows=dice.choice(("drop", "error", "keep_end")),
        split=dice.choice(("train", "train", "train[:50%]", "train[2:]", "train[:3]")),
    )
    tokenizer = dice.choice(tokenizers())
    try:
        rows = training_rows(spec, tokenizer)
        source = training_prompts(spec, rows, tokenizer, max_prompt_length=64, seed=0)
        prompts = list(source.epoch())
    except UserError as error:
        return one_line(error)
    dropped = source.dropped
    if len(prompts) + dropped.count + dropped.folded != dropped.rows:
        raise NotRight(f"{len(prompts)} prompts of {dropped}")
    if len({prompt.row for prompt in prompts}) != len(prompts):
        raise NotRight("a row comes twice")
    for prompt in prompts:
        if not 0 < len(prompt.token_ids) <= 64:
            raise NotRight(f"a prompt has {len(prompt.token_ids)} tokens")
    for line in dropped.lines():
        one_line(ValueError(line.strip()))
    return None


def pairs(dice: random.Random, folder: Path) -> Refused | None:
    """Rows as pairs of answers, for DPO and reward models."""
    from aligntune.data.pair_tokens import tokenise_pairs
    from aligntune.data.sources import load_rows
    from aligntune.data.spec import RowRules

    rows = rows_of(dice)
    for row in rows:
        row.setdefault("chosen", "a")
        row.setdefault("rejected", "b")
        if dice.random() < 0.1:
            broken.mutate(dice, row)
    path = written(dice, rows, folder)
    if path is None:
        return None
    rules = RowRules("drop", "drop", 1.0, "data.max_length")
    try:
        read = load_rows(str(path))
        made = tokenise_pairs(
            read,
            dice.choice(tokenizers()),
            dice.choice(("dpo", "reward_model")),
            prompt_column="prompt",
            chosen_column="chosen",
            rejected_column="rejected",
            apply_chat_template=True,
            system_prompt=None,
        ).within(64, rules)
    except UserError as error:
        return one_line(error)
    if len(made) + made.dropped.count != len(read):
        raise NotRight(f"{len(made)} pairs and {made.dropped} of {len(read)} rows")
    return None


# Rewards


class Odd:
    """What looks like a number and is none."""

    def __float__(self) -> float:
        raise ValueError("no number")


def scores(dice: random.Random, folder: Path) -> Refused | None:
    """What a reward function returns."""
    odd: Any = (
        np.float32(0.5),
        np.array(1.0),
        np.array([1.0, 2.0]),
        np.int64(3),
        Odd(),
        b"1",
        {1.0},
        iter([1.0]),
        np.nan,
        10**400,
        1j,
        "0.5",
        [0.5],
        (),
        True,
        None,
        -0.0,
        np.array(["a"]),
        object(),
        range(2),
    )
    count = dice.randint(0, 4)
    made: Any = [dice.choice((0.5, 1, None, *odd, broken.value(dice, 2))) for _ in range(count)]
    kinds = (
        made,
        made,
        tuple(made),
        dice.choice(odd),
        broken.value(dice, 1),
        {str(i): i for i in made},
    )
    given = dice.choice((*kinds[:4], kinds[4]))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        given = dice.choice((given, given, np.array(made, dtype=float)))
    wanted = dice.choice((count, count, count, count + 1))
    try:
        found = checked("mine", given, wanted)
    except RewardFailed as failed:
        return one_line(ValueError(" ".join(str(failed).split())))
    _check_scores(found, wanted)
    return None


def _check_scores(found: list[float | None], wanted: int) -> None:
    if len(found) != wanted:
        raise NotRight(f"{len(found)} scores for {wanted}")
    for number in found:
        if number is not None and (type(number) is not float or not math.isfinite(number)):
            raise NotRight(f"a score is {number!r}")


def reply(dice: random.Random, folder: Path) -> Refused | None:
    """What a remote reward answers."""
    count = dice.randint(0, 4)
    made = [dice.choice((0.5, 1, None, True, "1", broken.value(dice, 2))) for _ in range(count)]
    good = {"scores": made}
    try:
        raw = json.dumps(dice.choice((good, good, made, broken.mutate(dice, dict(good))))).encode()
    except (TypeError, ValueError):
        raw = b'{"scores": [1e999, -Infinity, NaN, ' + b"9" * 5000 + b"]}"
    if dice.random() < 0.5:
        raw = broken.spoil(dice, raw)
    try:
        found = scores_of(raw, count)
    except NoAnswer as error:
        return one_line(error)
    _check_scores(found, count)
    return None


def frames(dice: random.Random, folder: Path) -> Refused | None:
    """What comes over the channel of a child: whoever waits for an answer is told."""
    return asyncio.run(asyncio.wait_for(_frames(dice), 20))


async def _frames(dice: random.Random) -> Refused | None:
    import socket

    from actors.children.process import Child, ChildEnded

    here, there = socket.socketpair()
    mine, lifeline = socket.socketpair()
    mine.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=here, limit=4096)
    parse: Any = dice.choice((channel.parse, play_channel.parse))
    child: Child[Any] = Child(reader, writer, mine, parse)
    words = [f"w{i}" for i in range(dice.randint(1, 4))]
    waits = [child.expect(word) for word in words]
    if dice.random() < 0.2:
        waits[0].cancel()
    raw = b""
    for word in dice.choices(words, k=dice.randint(1, 5)):
        try:
            if parse is channel.parse:
                raw += channel.scored(word, [dice.choice((0.5, None, 1.0))])
            else:
                raw += play_channel.told(word, broken.value(dice, 1))
        except (ValueError, TypeError):
            continue
    if dice.random() < 0.6:
        raw = broken.spoil(dice, raw)
    there.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        there.sendall(raw)
    lifeline.close()
    there.close()
    done, pending = await asyncio.wait(waits, timeout=5)
    if pending:
        raise NotRight(f"{len(pending)} of {len(waits)} calls wait for ever")
    await child.end()
    errors = [wait.exception() for wait in done if not wait.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, ChildEnded):
            raise error
    if (broke := child._listener.exception()) is not None:
        raise broke
    told = next((error for error in errors if error is not None), None)
    return None if told is None else one_line(told)


# What runs leave


@functools.cache
def a_run() -> Path:
    """A run directory as a whole run has left it. Removed with the process."""
    import atexit
    import tempfile

    from tests.histories.history import DEFAULT, History
    from tests.histories.play import play

    folder = Path(tempfile.mkdtemp(prefix="aligntune-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    play(History(0, "grpo", {**DEFAULT, "keep": 3}), folder)
    return folder / "run"


def _spoil_files(dice: random.Random, folder: Path, patterns: tuple[str, ...]) -> set[str]:
    """Break some files of a folder; returns their names."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    files = sorted(path for path in found if path.is_file())
    touched = set()
    for path in dice.sample(files, min(len(files), dice.choice((1, 1, 1, 2, 3)))):
        touched.add(str(path.relative_to(folder)))
        match dice.choice(("spoil", "spoil", "spoil", "json", "remove", "folder")):
            case "remove":
                path.unlink()
            case "folder" if path.name not in ("latest", "run.lock") and dice.random() < 0.3:
                path.unlink()
                path.mkdir()
            case "json":
                path.write_text(_mutated_json(dice, path.read_text(encoding="utf-8")))
            case _:
                path.write_bytes(broken.spoil(dice, path.read_bytes()))
    return touched


def _mutated_json(dice: random.Random, text: str) -> str:
    """JSON, or lines of it, with one thing changed."""
    lines = text.splitlines()
    try:
        return json.dumps(broken.mutate(dice, json.loads(text)), default=str)
    except (ValueError, TypeError):
        pass
    if not lines:
        return "{}"
    at = dice.randrange(len(lines))
    try:
        lines[at] = json.dumps(broken.mutate(dice, json.loads(lines[at])), default=str)
    except (ValueError, TypeError):
        lines[at] = lines[at][: len(lines[at]) // 2]
    return "\n".join(lines) + "\n"


def checkpoints(dice: random.Random, folder: Path) -> Refused | None:
    """A folder of checkpoints: what is taken is whole."""
    shutil.copytree(a_run() / "checkpoints", folder / "checkpoints")
    place = folder / "checkpoints"
    patterns = ("*", "*/*.json", "*/*/*")
    touched = (
        _spoil_files(dice, place, tuple(dice.sample(patterns, dice.choice((1, 2, 3)))))
        if (place / "latest").exists()
        else set()
    )
    if dice.random() < 0.3:
        odd = dice.choice(
            ("step-000002.bak", "step-2", "step-000009.partial", "step-", "x", "step-0000099")
        )
        (place / odd).mkdir(exist_ok=True)
    if dice.random() < 0.2:
        shutil.rmtree(place / "step-000003", ignore_errors=True)
    rundir = RunDir(folder)
    try:
        found = Checkpoints(place, 2)
        checkpoint = rundir.start_from(found, dice.choice(("auto", str(place / "step-000002"))))
    except UserError as error:
        return one_line(error)
    if checkpoint is None:
        return None
    if not intact(checkpoint.path):
        raise NotRight(f"{checkpoint.path.name} was taken, and is not whole: {touched}")
    name = checkpoint.path.name
    for part in sorted((a_run() / "checkpoints" / name).rglob("*")):
        if part.is_file() and part.name != "manifest.json":
            mine = checkpoint.path / part.relative_to(a_run() / "checkpoints" / name)
            if not mine.is_file() or mine.read_bytes() != part.read_bytes():
                if f"{name}/manifest.json" not in touched:
                    raise NotRight(f"{mine} has another content: {touched}")
    found.begin(4)
    found.commit(4, {"step": 4})
    if found.latest() is None:
        raise NotRight("what was just written is not found")
    return None


def run_directory(dice: random.Random, folder: Path) -> Refused | None:
    """A run directory that is gone on with, up to where Ray would start."""
    from aligntune.online.trainer import OnlineTrainer
    from tests.histories.history import DEFAULT, History
    from tests.histories.play import Process, prompt_at

    run = folder / "run"
    shutil.copytree(a_run(), run)
    config = Process(History(0, "grpo", {**DEFAULT, "steps": 4}), 0, run, [])._config()
    RunDir(run).describe(config)
    _spoil_files(
        dice, run, dice.choice((("*.jsonl",), ("*.jsonl", "*.yaml"), ("config.yaml",), ("*",)))
    )
    trainer = OnlineTrainer(config)
    prompts = [prompt_at(position) for position in range(2)]
    source = mock.MagicMock(fingerprint="f", prompt_at=prompt_at)

    @contextlib.contextmanager
    def no_roles(_: Any) -> Iterator[Any]:
        raise RunFailed("here Ray would start")
        yield

    def check(self: OnlineTrainer, resume: str = "auto") -> RunDir:
        made = RunDir(run)
        made.check(config, resume)
        return made

    with (
        mock.patch.object(OnlineTrainer, "_roles", no_roles),
        mock.patch.object(OnlineTrainer, "check", check),
        mock.patch.object(OnlineTrainer, "settle", lambda *_: None),
        mock.patch.object(OnlineTrainer, "prompts", source),
        mock.patch.object(OnlineTrainer, "eval_prompts", prompts),
        mock.patch.object(type(trainer.inputs), "events", lambda _: []),
        mock.patch.object(type(trainer.inputs), "told", lambda _: []),
        mock.patch("os.fsync", lambda _: None),
    ):
        try:
            trainer.train(
                dice.choice(("auto", "auto", "never", str(run / "checkpoints/step-000002")))
            )
        except (UserError, RunFailed, OSError) as error:  # the last is exit code 1
            if "Error" in str(error).split(":")[0] or "traceback" in str(error):
                raise NotRight(f"an error nobody foresaw: {error}") from error
            return one_line(error)
    return None


def audited(dice: random.Random, folder: Path) -> Refused | None:
    """`aligntune audit` of a broken ledger."""
    from aligntune.online.ledger import LedgerError, audit

    path = folder / "ledger.jsonl"
    raw = (a_run() / "ledger.jsonl").read_text(encoding="utf-8")
    if dice.random() < 0.5:
        path.write_text(_mutated_json(dice, raw), encoding="utf-8")
    else:
        path.write_bytes(broken.spoil(dice, raw.encode()))
    try:
        books = audit(path)
    except LedgerError as error:
        return one_line(error)
    if not books.balanced:
        raise NotRight(f"the books do not balance, and nobody says so: {books}")
    return None


KINDS: dict[str, tuple[Try, int]] = {
    "config_file": (config_file, 3000),
    "config_text": (config_text, 800),
    "overrides": (overrides, 2000),
    "mapping": (mapping, 1000),
    "arguments": (arguments, 1500),
    "data": (data, 2000),
    "pairs": (pairs, 1000),
    "scores": (scores, 1500),
    "reply": (reply, 1500),
    "frames": (frames, 1000),
    "checkpoints": (checkpoints, 800),
    "run_directory": (run_directory, 800),
    "audited": (audited, 1000),
}
"""Each kind with how many inputs of it `make fuzz` tries."""
