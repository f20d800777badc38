"""What all launch files have in common: what must be there, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aligntune import cli
from cluster import await_nodes
from tests.cluster.launch.options import AWS, HOSTS, IMAGE, OPEN, URL, VENV
from tests.stand_ins import REPOSITORY


@pytest.mark.parametrize("target", ["ray-up", "kuberay", "slurm"])
def test_code_of_the_users_own_is_said_to_be_needed_where_the_run_starts(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"ray-up": [*HOSTS, *VENV], "kuberay": ["--image", "x"], "slurm": []}[target]
    storage = str(tmp_path) if target == "slurm" else "/shared"
    needed = f"# rewards.1.function is mine.own:f: mine must lie in {storage}, where the run starts"
    rewards = "rewards=[math, 'mine.own:f', 'aligntune.rewards.text:contains']"
    code, text, err = launch(target, *options, rewards)
    assert code == 0, err
    assert needed in text
    assert text.count("must lie in") == 1
    assert "must lie in" not in launch(target, *options)[1]


@pytest.mark.parametrize(
    ("setting", "name", "needed"),
    [
        ("rewards=['sub/a.py:f']", "sub/a.py:f", "every node must have it as /shared/sub/a.py."),
        ("rewards=['./a.py:f']", "./a.py:f", "every node must have it as /shared/a.py."),
        ("rewards=['/my/a.py:f']", "/my/a.py:f", "every node must have it as /my/a.py."),
        ("tools=['a.py:add']", "a.py:add", "every node must have it as /shared/a.py."),
        ("environment='my.games:Chess'", "my.games:Chess", "my must lie in /shared, where the run"),
        ("agent='../a.py:play'", "../a.py:play", "every node must have it as /a.py."),
    ],
)
def test_files_and_every_kind_of_code_are_said_to_be_needed(
    launch: Any, setting: str, name: str, needed: str
) -> None:
    code, text, err = launch("kuberay", "--image", "x", setting)
    assert code == 0, err
    key = {"rewards": "rewards.0.function", "tools": "tools.0"}.get(kind := setting.split("=")[0])
    assert f"# {key or kind} is {name}: {needed}" in text


def test_models_and_data_that_lie_here_are_said_to_be_needed(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my/model", "my/encoder", "my/data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my/data/a.jsonl").touch()
    code, text, err = launch(
        *("kuberay", "--image", "x", "model.name=my/model", "data.path=my/data/*.jsonl"),
        *("data.eval_path=/my/held.jsonl", "data.name=null"),
        "rewards=[{function: embedding, options: {model: my/encoder}}]",
    )
    assert code == 0, err
    for needed in (
        "model.name is my/model if it is in /shared, else a hub name.",
        "data.path is my/data/*.jsonl: it must be in /shared.",
        "data.eval_path is /my/held.jsonl: every node must have it there.",
        "rewards.0.options.model is my/encoder if it is in /shared, else a hub name.",
    ):
        assert f"# {needed}\n" in text


def test_the_wait_for_nodes_ends_when_all_are_there_or_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joining = iter([["a"], ["a", "b"], ["a", "b", "c"]])
    monkeypatch.setattr(await_nodes, "EVERY_S", 0.0)
    monkeypatch.setattr(await_nodes, "living_nodes", lambda: next(joining))
    assert await_nodes.await_nodes(3, 60.0) == 3
    monkeypatch.setattr(await_nodes, "living_nodes", lambda: ["a"])
    assert await_nodes.await_nodes(3, 0.0) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ray-up", "--storage", "/shared"], "give --head-ip"),
        (["ray-up", *HOSTS[:4]], "needs --storage"),
        (["ray-up", *HOSTS, "--nodes", "2"], "name 2, or change --nodes"),
        (["ray-up", *HOSTS, "--head-ip", "10.0.0.2"], "10.0.0.2 is named twice"),
        (["ray-up", *HOSTS, "--head-ip", "head"], "'head' is no IP address"),
        (["ray-up", *HOSTS, "--provider", "awz"], "did you mean 'aws'?"),
        (["ray-up", "--provider", "aws", "--storage", "/s"], "needs --nfs"),
        (["ray-up", "--provider", "aws", "--storage", "/s", "--nfs", "x:/"], "needs --region"),
        (["ray-up", *AWS, *URL], "needs --image-id"),
        (["ray-up", *AWS, *URL, "--image-id", "latest_dlami"], "is no image of AWS"),
        (
            ["ray-up", *HOSTS],
            "needs --venv, an environment with aligntune on every node, or --inst",
        ),
        (["ray-up", *AWS, *IMAGE], "needs --venv"),
        (["ray-up", *HOSTS, "--install", "aligntune==0.1.0"], "or --venv, an environment"),
        (["ray-up", *HOSTS, *VENV, "--install", "aligntune"], "no package index has aligntune"),
        (["ray-up", *HOSTS, "--install", "dist/no.whl"], "is no file here"),
        (["ray-up", *HOSTS, *URL, *OPEN], "say with --gpus-per-node"),
        (["ray-up", *HOSTS, "output_dir=/elsewhere"], "does not lie in /shared"),
        (["ray-up", *HOSTS[:5], "shared"], "is no absolute path"),
        (["kuberay"], "needs --image"),
        (["kuberay", "--image", "x", "--kind", "rayjobs"], "did you mean 'rayjob'?"),
        (["kuberay", "--image", "x", "output_dir=../up"], "does not lie in /shared"),
        (["slurm", "--time", "tomorrow"], "is no time limit of Slurm"),
        (["slurm", "--time", "19:59"], "--time 19:59 is too short"),
        (["slurm", "--time", "0"], "is too short"),
        (["slurm", "--gpus-per-node", "1"], "one rollout (1 CPU, 2 GPU)"),
        (["slurm", "--nodes", "0"], "--nodes is 0"),
        (["slurm", "train.stepz=3"], "did you mean 'train.steps'?"),
        (["slurm", "cluster.object_store_gib=2"], "with cluster.address=auto no Ray is started"),
        (["slurm", "--out", "/no/such/folder/x"], "no folder /no/such/folder"),
        (["slrm"], "did you mean 'slurm'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_one_line(launch: Any, arguments: list[str], said: str) -> None:
    code, out, err = launch(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_examples_can_be_launched(capsys: pytest.CaptureFixture[str]) -> None:
    for example in sorted((REPOSITORY / "examples").glob("*.yaml")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["launch", "kuberay", str(example), "--image", "x"])
        assert not ended.value.code, capsys.readouterr().err
