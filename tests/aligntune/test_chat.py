"""Talking to a model: whose it is, what it says, and what it remembers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aligntune.chat import NO_ROOM, Asking, Conversation, TooLong, asked_by_run, model_folder
from aligntune.cli import app
from aligntune.errors import UserError
from aligntune.quickstart.task import make_model, make_tokenizer
from tests.actors.policy_cases import VOCABULARY, make_composite_folder, make_model_folder
from tests.aligntune.data.conftest import byte_tokenizer


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
    return Conversation(talker, Asking(), temperature=0.0, max_tokens=5)


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


def test_an_answer_is_computed_on_the_gpu_where_there_is_one(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    conversation = Conversation(talker, Asking(), 0.0, 5)
    assert conversation._device == "cuda"
    seen: list[str] = []

    def generate(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> None:
        weight = next(conversation._model.parameters())
        seen.extend(each.device.type for each in (input_ids, attention_mask, weight))

    conversation._device = "meta"  # stands for it
    monkeypatch.setattr(conversation._model, "generate", generate)
    conversation.answer("7", lambda piece: None)
    assert seen == ["meta"] * 3


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("to", torch.AcceleratorError("CUDA error: out of memory")),
        ("generate", torch.OutOfMemoryError("CUDA out of memory")),
        ("generate", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
    ],
)
def test_where_the_gpu_has_no_room_an_answer_is_heard_anew_from_the_cpu(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, fails: str, error: RuntimeError
) -> None:
    wanted = conversation.answer("7", lambda piece: None)
    conversation.forget()
    method, calls = getattr(conversation._model, fails), []

    def crowded(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            return method(*args, **options)
        if fails == "generate":
            options["streamer"].on_finalized_text("half of it")
        raise error

    monkeypatch.setattr(conversation, "_device", "cpu:0")  # for a GPU
    monkeypatch.setattr(conversation._model, fails, crowded)
    heard: list[str] = []
    assert conversation.answer("7", heard.append) == wanted
    half, _, rest = "".join(heard).partition(NO_ROOM)
    assert (half, rest) == ("half of it" if fails == "generate" else "", wanted)
    assert conversation._messages[-1]["content"] == wanted


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
    (tmp_path / "config.yaml").write_text("algorithm: {name: grpo}\n")
    with pytest.raises(UserError, match=f"aligntune export {tmp_path} --out FOLDER"):
        model_folder(tmp_path)
    (tmp_path / "config.yaml").write_text("algorithm: {name: dpo}\n")
    with pytest.raises(UserError, match="call `aligntune train` with its config again to end it"):
        model_folder(tmp_path)


def test_a_model_that_writes_no_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["architectures"] = ["Qwen2ForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = f"^the model in {tmp_path} writes no text: it is a Qwen2ForSequenceClassification$"
    with pytest.raises(UserError, match=said):
        Conversation(tmp_path, Asking(), 0.0, 5)


@pytest.mark.parametrize("made", ["GPT2LMHeadModel", "Gemma3ForConditionalGeneration"])
def test_a_model_that_writes_is_talked_to_whatever_it_was_saved_as(
    made: str, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    words, folder = make_model_folder(tmp_path / "words"), tmp_path / "model"
    if made == "GPT2LMHeadModel":
        shutil.copytree(words, folder)
        sizes = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        GPT2LMHeadModel(sizes).save_pretrained(folder)
    else:
        make_composite_folder(folder, words)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [made]
    heard: list[str] = []
    said = Conversation(folder, Asking(), 0.0, 3).answer("w5 w6", heard.append)
    assert said == "".join(heard)


def test_of_the_folders_generation_config_nothing_but_the_ends_holds(
    talker: Path, conversation: Conversation, tmp_path: Path
) -> None:
    said = conversation.answer("7", lambda piece: None)
    folder = shutil.copytree(talker, tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"repetition_penalty": 100.0, "no_repeat_ngram_size": 1, "min_new_tokens": 4}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert Conversation(folder, Asking(), 0.0, 5).answer("7", lambda piece: None) == said
    first = make_tokenizer()(said, add_special_tokens=False)["input_ids"][0]
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"eos_token_id": [config["eos_token_id"], first]})
    )
    short = Conversation(folder, Asking(), 0.0, 5).answer("7", lambda piece: None)
    assert (len(short), said.startswith(short)) == (1, True)


def shapes(conversation: Conversation, text: str) -> list[int]:
    return conversation._inputs(text)["input_ids"][0].tolist()


def test_a_model_is_asked_as_its_run_asked_it(talker: Path, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path / "model")
    (tmp_path / "events.jsonl").touch()
    data = {"path": "d", "system_prompt": "1+1", "apply_chat_template": True}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    run = asked_by_run(tmp_path)
    assert run == Asking(system="1+1")
    told = [Conversation(talker, each, 0.0, 1) for each in (run, Asking(), run.told("9"))]
    as_run, without, other = (shapes(each, "7") for each in told)
    assert len(as_run) > len(without)
    assert len(other) < len(as_run), "--system is taken in place of the run's"
    assert run.told("") == Asking()

    data = {"path": "d", "apply_chat_template": False}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    plain = Conversation(talker, asked_by_run(tmp_path / "model"), 0.0, 1)
    assert shapes(plain, "7") == make_tokenizer()("7")["input_ids"]
    plain._tokenizer = byte_tokenizer(bos=True, eos=True)
    assert plain._tokenizer.decode(shapes(plain, "<bos>7")) == "<bos>7"
    with pytest.raises(UserError, match="--system: the run applied no chat template"):
        Conversation(talker, asked_by_run(tmp_path).told("1"), 0.0, 1)


def test_a_template_that_refuses_what_is_told_first_is_said_before_the_first_line(
    talker: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(talker, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuses + template)
    with pytest.raises(UserError, match=r"refuses the messages \(no system\); leave --system out"):
        Conversation(folder, Asking(system="1"), 0.0, 1)
    assert Conversation(folder, Asking(), 0.0, 1)


def test_a_conversation_that_the_model_cannot_read_is_told_and_begun_anew(
    talker: Path, conversation: Conversation, tmp_path: Path
) -> None:
    length = len(shapes(conversation, "7"))
    folder = shutil.copytree(talker, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = length + 2
    (folder / "config.json").write_text(json.dumps(config))
    short = Conversation(folder, Asking(), 0.0, 5)
    first = short.answer("7", lambda piece: None)
    with pytest.raises(TooLong, match=f"the model reads {length + 2}; an empty line starts anew"):
        short.answer("7", lambda piece: None)
    short.forget()
    assert short.answer("7", lambda piece: None) == first
    lines = CliRunner().invoke(app, ["chat", str(folder)], input="7\n7\n\n7\n")
    assert lines.exit_code == 0, lines.output
    assert lines.output.count("an empty line starts anew") == 2, "at the start, and when full"


def test_the_model_of_a_checkpoint_is_made_beside_it_and_goes_again(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: m}\n")
    made: list[tuple[Path, str | None, list[str]]] = []

    def exported(run: Path, out: Path, which: str | None, overrides: list[str]) -> int:
        made.append((out, which, overrides))
        shutil.copytree(talker, out)
        return 3

    monkeypatch.setattr("aligntune.commands.model_cli.exported", exported)
    keys = ["cluster.address=local"]
    line = ["chat", str(tmp_path), *keys, "--checkpoint", "best", "--max-tokens", "2"]
    done = CliRunner().invoke(app, line, input="7\n")
    assert done.exit_code == 0, done.output
    ((out, which, overrides),) = made
    assert (out.parent.parent, which, overrides) == (tmp_path, "best", keys)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]

    refused = CliRunner().invoke(app, ["chat", str(talker), *keys])
    assert "cluster.address=local would do nothing without --checkpoint" in str(refused.exception)


def test_what_a_model_writes_is_shown_and_acts_on_no_terminal(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: Conversation, text: str, say: Callable[[str], None]) -> None:
        say("\x1b]0;title\x07a\rb\n\tc\ud800")

    monkeypatch.setattr(Conversation, "answer", answer)
    done = CliRunner().invoke(app, ["chat", str(talker)], input="7\n")
    assert done.exit_code == 0, done.output
    assert "<U+001B>]0;title<U+0007>a<U+000D>b\n\tc<U+D800>\n" in done.stdout


def test_the_command_answers_line_by_line_until_the_input_ends(talker: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(talker), "--max-tokens", "5"], input="7\n\n7\n")
    assert done.exit_code == 0, done.output
    _, first, nothing, again, *_ = done.stdout.split("> ")
    assert first.strip()
    assert (nothing, again) == ("", first), "an empty line starts anew"
