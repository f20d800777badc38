"""What chat templates decide of a run: the day that they write is one; a turn has a known end."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.engines.base import name_ends, stop_token_ids
from actors.environments.rendered import chat_tokens
from actors.models.loading import load_tokenizer
from actors.models.templates import turn_ends
from actors.specs import ModelSpec
from aligntune import create_rl_trainer
from aligntune.chat import Asking, Conversation, asked_by_run
from aligntune.commands.evaluations import target_of
from aligntune.errors import UserError
from aligntune.runs.rundir import RunDir
from aligntune.template_settings import DAY, STOPS
from tests.actors.environments.chat import make_model, make_tokenizer
from tests.aligntune.data.conftest import byte_tokenizer
from tests.stand_ins import write_reward_model

FIRST, SECOND = "2026-03-01", "2026-03-02"
WRITES = "{{ strftime_now('%Y%m%d') }}"
ROW = {"prompt": "2+3", "chosen": "5", "rejected": "6", "completion": "5"}
ALGORITHMS = ("grpo", "sft", "dpo", "reward_model")
Make = Callable[..., Any]


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the day of templates and of the run."""

    def on(day: str) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Clock:
                return cls.fromisoformat(f"{day}T23:59:00")

        class Today(datetime.date):
            @classmethod
            def today(cls) -> Today:
                return cls.fromisoformat(day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        monkeypatch.setattr("aligntune.template_settings.date", Today)

    return on


@pytest.fixture
def dated(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose chat template writes today's date first."""
    return with_template(shutil.copytree(tiny_model, tmp_path / "dated"), before=WRITES)


def with_template(folder: Path, before: str) -> Path:
    template = folder / "chat_template.jinja"
    template.write_text(before + template.read_text())
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def trainer(algorithm: str, model: Path, out: str = "run", *overrides: str, **more: Any) -> Any:
        (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        return create_rl_trainer(
            algorithm=algorithm,
            dataset_name=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / out),
            config={"model": {"name": str(model)}, **more},
            overrides=list(overrides),
        )

    return trainer


def mark(trainer: Any) -> str:
    """What a run that goes on has to have again."""
    inputs = trainer.inputs
    return str(inputs.prompts.fingerprint if hasattr(inputs, "prompts") else inputs.digest)


def text(trainer: Any) -> str:
    """The first row as text."""
    if hasattr(trainer.inputs, "prompts"):
        return str(trainer.inputs.prompts.prompt_at(0).text)
    columns = trainer.inputs.pairs.columns
    ids = columns.get("prompt_ids") or columns.get("input_ids") or columns["chosen_ids"]
    return str(trainer.inputs.tokenizer.decode(ids[0]))


def leave(trainer: Any, folder: Path) -> None:
    """Write what a run has left once it has trained a step."""
    folder.mkdir(exist_ok=True)
    RunDir(folder).describe(trainer.config)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_goes_on_after_midnight_with_the_day_on_which_it_began(
    make: Make, dated: Path, today: Callable[[str], None], tmp_path: Path, algorithm: str
) -> None:
    today(FIRST)
    began = make(algorithm, dated)
    before = mark(began)
    assert text(began).startswith("20260301")
    assert began.config.model.chat_template_day == FIRST
    leave(began, tmp_path / "run")
    today(SECOND)
    goes_on = make(algorithm, dated)
    assert mark(goes_on) == before
    assert text(goes_on).startswith("20260301")
    (decided,) = [each for each in goes_on.inputs.settle() if each.path == DAY]
    assert (decided.value, decided.why) == (FIRST, "as the run in output_dir has it")
    assert text(make(algorithm, dated, "other")).startswith("20260302")
    named = make(algorithm, dated, "other", f"{DAY}=2020-02-20")
    assert text(named).startswith("20200220")


def test_prompts_that_are_rendered_anew_after_midnight_are_as_before(
    make: Make, dated: Path, today: Callable[[str], None]
) -> None:
    today(FIRST)
    prompts = make("grpo", dated).prompts
    before = prompts.prompt_at(0)
    today(SECOND)
    prompts._prompt.cache_clear()
    assert prompts.prompt_at(0).text == before.text


def test_the_day_of_a_checkpoint_is_the_day_of_the_run_that_wrote_it(
    make: Make, dated: Path, today: Callable[[str], None], tmp_path: Path
) -> None:
    today(FIRST)
    began = make("grpo", dated)
    before = mark(began)
    leave(began, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    today(SECOND)
    elsewhere = make("grpo", dated, "elsewhere")
    assert text(elsewhere).startswith("20260302")
    elsewhere._begin(str(checkpoint))
    elsewhere.inputs.settle(str(checkpoint))
    assert text(elsewhere).startswith("20260301")
    assert mark(elsewhere) == before


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_a_run_that_has_lost_its_folder_has_its_day_from_the_storage(
    make: Make, dated: Path, today: Callable[[str], None], tmp_path: Path, algorithm: str
) -> None:
    today(FIRST)
    storage = f"checkpoint.storage=file://{tmp_path / 'storage'}"
    leave(make_settled(make(algorithm, dated, "run", storage)), tmp_path / "storage")
    today(SECOND)
    assert text(make(algorithm, dated, "run", storage)).startswith("20260301")


def make_settled(trainer: Any) -> Any:
    trainer.inputs.settle()
    return trainer


def test_a_reward_model_that_writes_the_date_writes_the_runs(
    make: Make, tiny_model: Path, today: Callable[[str], None], tmp_path: Path
) -> None:
    write_reward_model(tmp_path / "judge", tiny_model)
    with_template(tmp_path / "judge", WRITES)
    rewards = {"rewards": [{"model": str(tmp_path / "judge")}]}
    today(FIRST)
    leave(make_settled(make("grpo", tiny_model, **rewards)), tmp_path / "run")
    today(SECOND)
    (criterion,) = make("grpo", tiny_model, **rewards).criteria
    tokenizer = load_tokenizer(criterion.model)
    asked = [{"role": "user", "content": "1"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False).startswith("20260301")


def test_a_talk_with_the_model_of_a_run_is_on_its_day(
    make: Make, dated: Path, today: Callable[[str], None], tmp_path: Path
) -> None:
    today(FIRST)
    leave(make_settled(make("grpo", dated)), tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").touch()
    asking = asked_by_run(tmp_path / "run")
    assert asking.day == FIRST
    today(SECOND)
    for each, day in ((asking, "20260301"), (Asking(), "20260302")):
        talk = Conversation(dated, each, 0.0, 1)
        ids = talk._inputs("1")["input_ids"][0]
        assert talk._tokenizer.decode(ids).startswith(day)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_template_that_writes_no_date_and_ends_as_the_model_decides_nothing(
    make: Make, tiny_model: Path, algorithm: str
) -> None:
    trainer = make(algorithm, tiny_model)
    assert not {each.path for each in trainer.inputs.settle()} & {DAY, STOPS}
    assert trainer.config.model.stop_token_ids is None


def test_what_is_no_day_is_refused(make: Make, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=rf"^{DAY}: .*1\.3\.2026"):
        make("grpo", tiny_model, "run", f"{DAY}=1.3.2026")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model with Qwen's chat template: turns end by another token than text."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    make_model(tmp_path / "base", tokenizer)
    return tmp_path / "base"


def ids_of(folder: Path, *names: str) -> list[int]:
    return [
        int(load_tokenizer(ModelSpec(name=str(folder))).convert_tokens_to_ids(n)) for n in names
    ]


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_a_base_model_ends_its_turns_as_its_template_does(
    make: Make, base: Path, algorithm: str
) -> None:
    text_end, turn_end = ids_of(base, "<|endoftext|>", "<|im_end|>")
    trainer = make(algorithm, base)
    (decided,) = [each for each in trainer.inputs.settle() if each.path == STOPS]
    assert decided.value == [turn_end]
    assert "ends a turn by <|im_end|>, which neither eos_token, <|endoftext|>," in decided.why
    assert stop_token_ids(trainer.config.model) == tuple(sorted((text_end, turn_end)))
    plain = make(algorithm, base, "run", "data.apply_chat_template=false")
    none = make(algorithm, base, "run", "model.stop_token_ids=[]")
    for each in (plain, none):
        each.inputs.settle()
        assert stop_token_ids(each.config.model) == (text_end,)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
@pytest.mark.parametrize("had", [None, [3], []])
def test_a_run_that_goes_on_ends_its_turns_as_it_did(
    make: Make, base: Path, tmp_path: Path, algorithm: str, had: list[int] | None
) -> None:
    """None: it is of an earlier version, whose config has no such key."""
    leave(
        make(algorithm, base, "run", f"{STOPS}={'null' if had is None else had}"), tmp_path / "run"
    )
    config = tmp_path / "run" / "config.yaml"
    if had is None:
        tree = yaml.safe_load(config.read_text())
        tree["model"].pop("stop_token_ids", None)
        config.write_text(yaml.safe_dump(tree))
    goes_on = make_settled(make(algorithm, base))
    assert goes_on.config.model.stop_token_ids == had
    in_other_words = make_settled(make(algorithm, base, "run", f"model.name={base}/"))
    assert in_other_words.config.model.stop_token_ids == had
    evaluated = make_settled(target_of(str(tmp_path / "run"), None, []).trainer)
    assert evaluated.config.model.stop_token_ids == had
    anew = make_settled(make(algorithm, base, "other"))
    assert anew.config.model.stop_token_ids == ids_of(base, "<|im_end|>")


def test_where_the_generation_config_knows_the_end_nothing_is_decided(
    make: Make, base: Path
) -> None:
    ends = ids_of(base, "<|endoftext|>", "<|im_end|>")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    trainer = make("grpo", base)
    assert STOPS not in {each.path for each in trainer.inputs.settle()}
    assert stop_token_ids(trainer.config.model) == tuple(sorted(ends))


def test_the_end_of_a_turn_is_of_the_model_that_has_it(
    make: Make, base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    leave(make_settled(make("grpo", base)), tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    for model, wanted in ((base, ids_of(base, "<|im_end|>")), (tiny_model, None)):
        assert target_of(str(model), config, []).trainer.config.model.stop_token_ids == wanted


def test_a_reward_model_has_no_turns_to_end(make: Make, base: Path) -> None:
    assert STOPS not in {each.path for each in make("reward_model", base).inputs.settle()}
    with pytest.raises(UserError, match=rf"^{STOPS} would do nothing: a reward model writes no"):
        make("reward_model", base, "run", f"{STOPS}=[1]")


def test_a_saved_model_ends_where_its_run_did(base: Path, tmp_path: Path) -> None:
    text_end, turn_end = ids_of(base, "<|endoftext|>", "<|im_end|>")
    saved = tmp_path / "generation_config.json"
    saved.write_text(json.dumps({"eos_token_id": text_end, "do_sample": True}))
    before = saved.read_text()
    name_ends(tmp_path, ModelSpec(name=str(base)))
    assert saved.read_text() == before
    name_ends(tmp_path, ModelSpec(name=str(base), stop_token_ids=[turn_end]))
    assert json.loads(saved.read_text()) == {
        "eos_token_id": sorted((text_end, turn_end)),
        "do_sample": True,
    }


def test_a_turn_that_was_cut_is_ended_as_the_template_does(base: Path) -> None:
    (turn_end,) = ids_of(base, "<|im_end|>")
    tokens = chat_tokens(ModelSpec(name=str(base), stop_token_ids=[turn_end]))
    told = [{"role": "user", "content": "2"}]
    assert tokens.between(told, cut=True) == [turn_end, *tokens.between(told)]


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        ("<|im_end|>\n", ["<|im_end|>"]),
        ("</think><|im_end|><|im_start|>", ["<|im_end|>", "<|im_start|>"]),
        ("</think>\n", []),
        ("{{ raise_exception('no') }}", []),
    ],
)
def test_what_ends_a_turn_is_a_special_token_after_the_answer(
    after: str, wanted: list[str]
) -> None:
    begin = "{% for m in messages %}<|im_start|>{{ m.content }}"
    tokenizer = make_tokenizer(begin + after + "{% endfor %}")
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == wanted
    assert turn_ends(byte_tokenizer()) == []
