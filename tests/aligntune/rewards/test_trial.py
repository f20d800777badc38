"""`aligntune rewards`, options with types, and the call of every reward on the first row."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from actors.scoring.model import ModelScorer, ModelStuck
from actors.specs import RewardFunctionSpec
from aligntune import cli
from aligntune.rewards.catalogue import REWARDS
from aligntune.rewards.registry import resolve
from aligntune.rewards.trial import short_completions
from tests.actors.scoring.test_classifiers import logits
from tests.actors.scoring.test_classifiers import scores as classifier_scores
from tests.actors.scoring.test_classifiers import write as write_classifier
from tests.e2e.page import byte_tokenizer

OWN = """
def correct(completions, answer, **columns):
    print("saw", completions)
    return [float(str(a) in c) for c, a in zip(completions, answer)]

def unsure(completions, **columns):
    return [None for _ in completions]

def broken(completions, **columns):
    return [1 / len(c) for c in completions]

def words(completions, **columns):
    return "good"

def roles(completions, **columns):
    wanted = ["assistant", "tool", "assistant"]
    return [float([message["role"] for message in said] == wanted) for said in completions]

async def hangs(completions, **columns):
    import asyncio
    await asyncio.sleep(3600)


def given(prompts, completions):
    print(prompts, completions)
    return [0.0 for _ in completions]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards_tried.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_rewards_tried", None)


Ran = Callable[..., tuple[int, str, str]]


@pytest.fixture
def aligntune(capfd: pytest.CaptureFixture[str]) -> Ran:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["rewards", *arguments])
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def test_every_reward_is_listed_with_its_range(aligntune: Ran) -> None:
    for arguments in ((), ("list",)):
        code, out, _ = aligntune(*arguments)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == list(REWARDS)
    assert "-1 to 0  minus the share of its n-grams that repeat an earlier one" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REWARDS))
def test_one_is_shown_with_formula_source_and_options(aligntune: Ran, name: str) -> None:
    code, out, _ = aligntune("show", name)
    assert code == 0
    for part in (REWARDS[name].description, "Formula: ", "Source: ", "Options:"):
        assert part in out


@pytest.mark.slow
def test_options_are_shown_with_type_bound_and_default(aligntune: Ran) -> None:
    _, out, _ = aligntune("show", "length")
    assert "  target           integer > 0  (must be given)" in out
    assert "  unit=characters  characters or words" in out
    assert "list of text" in aligntune("show", "tags")[1]
    assert "did you mean 'length'" in aligntune("show", "lenght")[2]


@pytest.mark.slow
def test_a_registered_reward_scores_texts(aligntune: Ran) -> None:
    code, out, _ = aligntune(
        "try", "math", "--completion", "it is 1/2", "--completion", "", "--column", "answer=0.5"
    )
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["row", "math", "completion"],
        ["0", "1", "it", "is", "1/2"],
        ["0", "0", "''"],
    ]


@pytest.mark.slow
def test_a_function_of_a_file_scores_rows_in_its_own_process(aligntune: Ran, folder: Path) -> None:
    rows = [{"prompt": "1+1", "completion": ["2", "3"], "answer": 2},
            {"prompt": "1+2", "completion": "3", "answer": 3}]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = aligntune("try", "own_rewards_tried.py:correct", "--data", "rows.jsonl")
    assert code == 0
    assert "saw ['2', '3']" in out
    assert out.splitlines()[-3:] == [
        "   0             1  2",
        "   0             0  3",
        "   1             1  3",
    ]
    one = aligntune("try", "own_rewards_tried.py:correct", "--data", "rows.jsonl", "-n", "1")[1]
    assert one.splitlines()[-1].startswith("   0  ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "text", "reward"),
    [("p", "4", ["exact_match"]), ("p<think>\n", "4</think>", ["tags", "tags=[think]"])],
)
def test_the_samples_of_a_run_are_scored_again(
    aligntune: Ran, folder: Path, prompt: str, text: str, reward: list[str]
) -> None:
    sample = {"step": 1, "prompt": prompt, "columns": {"answer": "4"},
              "completions": [{"text": text, "reward": 0}, {"text": "5", "reward": 1}]}  # fmt: skip
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    code, out, _ = aligntune("try", *reward, "--data", "samples.jsonl")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["1", "0"]


@pytest.mark.slow
def test_samples_of_a_conversational_run_are_messages_as_in_the_run(
    aligntune: Ran, folder: Path
) -> None:
    sample = {"step": 1, "source": [{"role": "user", "content": "1+3"}], "prompt": "<user>1+3",
              "columns": {"answer": "4"}, "completions": [{"text": "4", "reward": 0}]}  # fmt: skip
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    code, out, _ = aligntune("try", "own_rewards_tried.py:given", "--data", "samples.jsonl")
    assert code == 0
    assert "[{'role': 'user', 'content': '1+3'}]" in out
    assert "[{'role': 'assistant', 'content': '4'}]" in out


SAID = "{% for message in messages %}{{ message.role[0] }}{{ message.content }}{% endfor %}"
TALK = [
    {"role": "user", "content": "1+3"},
    {"role": "assistant", "content": "I ask the tool."},
    {"role": "tool", "content": "It is 5."},
    {"role": "assistant", "content": "4"},
]


def write_episodes(path: Path, *completions: dict[str, Any]) -> str:
    row = {"step": 1, "prompt": "1+3", "columns": {"answer": "4"}, "completions": completions}
    path.write_text(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.slow
def test_an_episode_is_scored_by_what_was_said_last_as_the_run_does(
    aligntune: Ran, folder: Path
) -> None:
    text = "I ask the tool.It is 5.4"  # all that was written
    wrong = [*TALK[:3], {"role": "assistant", "content": "5"}]
    data = write_episodes(
        folder / "samples.jsonl",
        {"text": text, "messages": TALK, "asked": 1},
        {"text": text, "messages": wrong, "asked": 1},
    )
    for reward, wanted in (("exact_match", ["1", "0"]), ("own_rewards_tried.py:roles", ["1", "1"])):
        code, out, error = aligntune("try", reward, "--data", data)
        assert code == 0, error
        assert [line.split()[1:] for line in out.splitlines()[-2:]] == [
            [wanted[0], "4"],
            [wanted[1], "5"],
        ]


def test_a_reward_model_is_tried_on_the_whole_of_an_episode_as_in_the_run(
    aligntune: Ran, folder: Path
) -> None:
    model = write_classifier(folder / "model", "qwen2", num_labels=1)
    tokenizer = byte_tokenizer(template=SAID)
    tokenizer.save_pretrained(model)
    data = write_episodes(folder / "s.jsonl", {"text": "x", "messages": TALK, "asked": 1})
    code, out, error = aligntune("try", model, "--data", data)
    assert code == 0, error
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    (wanted,) = logits(model, whole).tolist()
    assert float(out.splitlines()[-1].split()[1]) == pytest.approx(wanted, abs=1e-4)


def test_a_reward_model_that_answers_no_more_fails_the_rows_that_are_left(
    aligntune: Ran, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter([[1.0]])

    async def score(*_: Any) -> list[float]:
        for scores in said:
            return scores
        raise ModelStuck("m: RuntimeError: CUDA error: unspecified launch failure")

    monkeypatch.setattr(ModelScorer, "score", score)
    model = write_classifier(folder / "model", "qwen2", num_labels=1)
    rows = [{"prompt": "1+1", "completion": str(n)} for n in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, error = aligntune("try", model, "--data", "rows.jsonl")
    assert code == 2
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["1", "failed", "failed"]
    assert "row 1: reward 'model' failed (died): m: RuntimeError: CUDA error" in error
    assert "(2 of 3 rows failed)" in error


def test_a_reward_model_reads_a_transcript_of_samples_in_its_own_form(
    aligntune: Ran, folder: Path
) -> None:
    model = write_classifier(folder / "model", "qwen2", num_labels=1)  # without a template
    forms = {"spoken": TALK[:1], "written": "\n\nHuman: 1+3\n\nAssistant: "}
    sample = {"step": 1, "source": TALK[:1], "prompt": "<user>1+3", "columns": {},
              "transcript": forms, "completions": [{"text": "4", "reward": 0}]}  # fmt: skip
    (folder / "s.jsonl").write_text(json.dumps(sample) + "\n")
    code, out, error = aligntune("try", model, "--data", "s.jsonl")
    assert code == 0, error
    (wanted,) = logits(model, f"{forms['written']}4<|end|>").tolist()
    assert float(out.splitlines()[-1].split()[1]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "completion",
    [{"text": "4", "messages": TALK}, {"text": None, "messages": None, "asked": None}],
    ids=["of an older run", "lost"],
)
def test_an_episode_that_is_not_whole_is_refused(
    aligntune: Ran, folder: Path, completion: dict[str, Any]
) -> None:
    whole = {"text": "4", "messages": TALK, "asked": 1}
    data = write_episodes(folder / "samples.jsonl", whole, completion)
    code, _, error = aligntune("try", "exact_match", "--data", data)
    assert code == 2
    assert "not every episode has its `messages`" in error


def test_a_reward_that_abstains_says_so(aligntune: Ran, folder: Path) -> None:
    assert "abstains" in aligntune("try", "own_rewards_tried.py:unsure", "--completion", "a")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["own_rewards_tried.py:broken"], "failed (raised): File"),
        (["own_rewards_tried.py:words"], "failed (wrong_count): it returned a str"),
        (["own_rewards_tried.py:hangs", "--timeout", "0.2"], "no answer within 0.2 s"),
        (["own_rewards_tried.py:correct"], "needs column 'answer'"),
        (["own_rewards_tried.py:corect"], "did you mean 'correct'"),
        (["own_rewards.py:correct"], "there is no file"),
        (["lenght"], "did you mean 'length'"),
        (["length"], "needs option 'target'"),
        (["length", "target=0"], "option 'target' is 0, and integer > 0 is wanted"),
        (["length", "target"], "option 'target': write it as KEY=VALUE"),
        (["length", "target=3", "tagret=4"], "takes no option 'tagret'; did you mean 'target'?"),
        (["required"], "ValueError: reward options: give either phrases or column"),
        (["json", "--data", "none.jsonl"], "--column are for a try without --data"),
    ],
)
def test_what_is_wrong_ends_with_code_2_and_the_reason(
    aligntune: Ran, folder: Path, arguments: list[str], told: str
) -> None:
    extra = ["--column", "a=1"] if "--data" in arguments else ["--completion", ""]
    code, _, error = aligntune("try", *arguments, *extra)
    assert code == 2
    assert told in error
    assert error.startswith("aligntune: ")
    assert ("own_rewards_tried.py" in error) or len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_service_is_tried_by_its_url(aligntune: Ran) -> None:
    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [len(text) + asked["columns"]["level"][0] for text in asked["completions"]]
            body = json.dumps({"scores": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/score"
        code, out, _ = aligntune("try", url, "--completion", "abc", "--column", "level=2")
        server.shutdown()
    assert code == 0
    assert out.splitlines()[-1].split() == ["0", "5", "abc"]
    code, _, error = aligntune("try", url, "retrys=1", "--completion", "a")
    assert code == 2
    assert "option 'retrys'" in error


@pytest.mark.slow
def test_a_reward_model_is_tried_by_its_folder(aligntune: Ran, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model", "bert", num_labels=1)
    given = ("--prompt", "1+1=", "--completion", "2")
    code, out, _ = aligntune("try", folder, *given)
    assert code == 0
    assert float(out.splitlines()[-1].split()[1]) == pytest.approx(
        classifier_scores(folder, "2")[0], abs=1e-4
    )
    code, _, error = aligntune("try", folder, "label=good", *given)
    assert code == 2
    assert "has no label 'good'" in error


@pytest.mark.slow
def test_preference_rows_are_tried_as_a_run_has_them(aligntune: Ran, folder: Path) -> None:
    asked = "\n\nHuman: hi\n\nAssistant:"
    pair = {"chosen": f"{asked} Good day to you.", "rejected": f"{asked} What is it now?"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    data = ("--data", "pairs.jsonl", "--completions", "chosen")
    code, out, error = aligntune("try", "own_rewards_tried.py:given", *data)
    assert code == 0, error
    assert str([asked]) + " ['Good day to you.']" in out
    code, out, error = aligntune("try", "preference", *data)
    assert code == 0, error
    assert float(out.splitlines()[-1].split()[1]) > 0.5


@pytest.mark.slow
def test_a_reward_model_reads_the_prompt_and_the_tools_of_a_row(
    aligntune: Ran, folder: Path
) -> None:
    model = write_classifier(folder / "model", "qwen2", num_labels=1)
    tokenizer = byte_tokenizer(template="{{ tools[0].function.name }}" + SAID)
    tokenizer.save_pretrained(model)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    row = {"prompt": "1+1", "completion": "2", "tools": [tool]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, out, error = aligntune("try", model, "--data", "rows.jsonl")
    assert code == 0, error
    talk = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    (wanted,) = logits(model, tokenizer.apply_chat_template(talk, tools=[tool], tokenize=False))
    assert float(out.splitlines()[-1].split()[1]) == pytest.approx(float(wanted), abs=1e-4)
    (folder / "rows.jsonl").write_text(json.dumps({"completion": "2"}) + "\n")
    code, _, error = aligntune("try", model, "--data", "rows.jsonl")
    assert code == 2
    assert "has no column 'prompt', which reward 'model' reads" in error


@pytest.mark.slow
def test_trying_a_reward_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, aligntune.commands.rewards_shown; "
        "print(sorted({'torch', 'ray', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("length", {"target": "3"}, "option 'target' is '3', and integer > 0 is wanted"),
        ("length", {"target": True}, "option 'target' is True"),
        ("length", {"target": 3, "side": "left"}, "both or over or under is wanted"),
        ("repetition", {"n": 0}, "integer >= 1"),
        ("required", {"phrases": []}, "list of text"),
        ("required", {"phrases": "a"}, "option 'phrases' is 'a', and list of text is wanted"),
        ("readability", {"low": 1, "high": float("nan")}, "option 'high' is nan"),
        ("exact_match", {"column": 3}, "option 'column' is 3, and text is wanted"),
        ("json", {"schema": "a.json"}, "mapping is wanted"),
    ],
)
def test_an_option_of_a_wrong_type_or_size_is_refused_before_the_run(
    name: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match="reward") as refused:
        resolve(RewardFunctionSpec(function=name, options=options))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_library_that_is_missing_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = __import__("importlib").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "textstat" else found(name)
    )
    with pytest.raises(ValueError, match="'readability' needs textstat: pip install textstat"):
        resolve(RewardFunctionSpec(function="readability", options={"low": 1, "high": 2}))


def test_a_short_completion_is_made_of_the_first_text_of_the_row() -> None:
    assert short_completions({"level": 3, "answer": "4 " * 500}) == ("", ("4 " * 500)[:200])
    assert short_completions({}) == ("", "A short answer.")
