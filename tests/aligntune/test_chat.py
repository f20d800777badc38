"""Talking to a model: whose it is, what it says, and what it remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aligntune.chat import Conversation, model_folder
from aligntune.cli import app
from aligntune.errors import UserError
from aligntune.quickstart.task import make_model, make_tokenizer


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose likeliest tokens are letters."""
    folder = tmp_path_factory.mktemp("talker")
    make_model(seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def conversation(talker: Path) -> Conversation:
    """A new one; the likeliest tokens, five at most."""
    return Conversation(talker, None, temperature=0.0, max_tokens=5)


def test_an_answer_is_heard_as_it_is_made_and_is_the_likeliest_one(
    conversation: Conversation, talker: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    heard: list[str] = []
    said = conversation.answer("7", heard.append)
    assert "".join(heard) == said
    assert said

    tokenizer = AutoTokenizer.from_pretrained(talker)
    model = AutoModelForCausalLM.from_pretrained(talker)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    made: list[int] = []
    while len(made) < 5 and (not made or made[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *made]])).logits
        made.append(int(logits[0, -1].argmax()))
    assert said == tokenizer.decode(made, skip_special_tokens=True)


def test_what_was_said_is_remembered_until_it_is_forgotten(conversation: Conversation) -> None:
    first = conversation.answer("1+2", lambda piece: None)
    seen = conversation._inputs("3+4")["input_ids"].shape[1]
    conversation.answer("3+4", lambda piece: None)
    assert conversation._inputs("5")["input_ids"].shape[1] > seen
    conversation.forget()
    assert conversation.answer("1+2", lambda piece: None) == first


def test_the_model_of_a_run_of_a_quickstart_and_of_a_folder(tmp_path: Path) -> None:
    for place in ("plain", "run/model", "quickstart/run/model"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    assert model_folder(tmp_path / "plain") == tmp_path / "plain"
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "model"
    assert model_folder(tmp_path / "quickstart") == tmp_path / "quickstart" / "run" / "model"


def test_a_run_without_a_model_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        model_folder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"aligntune export {tmp_path} --out FOLDER"):
        model_folder(tmp_path)


def test_a_model_that_writes_no_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["architectures"] = ["Qwen2ForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="writes no text: it is a Qwen2ForSequenceClassification"):
        Conversation(tmp_path, None, 0.0, 5)


def test_the_command_answers_line_by_line_until_the_input_ends(talker: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(talker), "--max-tokens", "5"], input="7\n\n7\n")
    assert done.exit_code == 0, done.output
    _, first, nothing, again, *_ = done.stdout.split("> ")
    assert first.strip()
    assert (nothing, again) == ("", first), "an empty line starts anew"
