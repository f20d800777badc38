"""What a run is made of before it starts: preference data for every algorithm, open settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.messages import Prompt
from actors.scoring.criteria import RewardCriterion
from actors.specs import LoRASpec, ModelSpec, RewardFunctionSpec
from aligntune import create_rl_trainer
from aligntune.config.auto import tree_of
from aligntune.config.load import load_config
from aligntune.config.tree import dump
from aligntune.data import sources
from aligntune.decisions import lora_note
from aligntune.errors import UserError
from aligntune.online import settle_resources
from aligntune.online.first_prompt import NOTE, try_rewards
from aligntune.online.inputs import RunInputs
from aligntune.online.trainer import OnlineTrainer
from aligntune.preference import settle_workers
from aligntune.preference.trainer import PreferenceTrainer
from aligntune.runs.measure import measure
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind
from cluster.machines import Machines
from cluster.resources import described
from tests.aligntune.online.test_starting import save
from tests.stand_ins import write_reward_model


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Sums with a right and a wrong answer; in one both are equal, and one is long."""
    rows = [{"prompt": f"{i}+1", "chosen": str(i + 1), "rejected": "7"} for i in range(10, 32)]
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[9]["prompt"] = "+".join("1" * 30)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tiny_model: Path, pairs: Path, tmp_path: Path) -> Any:
    """A trainer on the pairs, with nothing set but what is given."""

    def trainer(algorithm: str, **given: Any) -> OnlineTrainer | PreferenceTrainer:
        return create_rl_trainer(
            model_name=str(tiny_model),
            dataset_name=str(pairs),
            algorithm=algorithm,
            output_dir=str(tmp_path / "run"),
            **given,
        )

    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "drgrpo", "dapo", "gspo"])
def test_a_group_algorithm_runs_on_preferences_with_nothing_else_set(
    make: Any, algorithm: str
) -> None:
    trainer = make(algorithm)
    trainer.check()
    assert [criterion.name for criterion in trainer.criteria] == ["preference"]
    assert trainer.config.rollout.max_prompt_length == 6
    assert len(trainer.prompts) == 20
    assert trainer.prompts.prompt_at(0).columns.keys() == {"chosen", "rejected"}
    *settled, dropped = trainer.inputs.events()
    assert {fields["path"] for kind, fields in settled if kind is EventKind.SETTLED} == {
        "rewards",
        "rollout.max_prompt_length",
        "rollout.max_completion_length",  # the default is more than the model reads
    }
    assert dropped[0] is EventKind.ROWS_DROPPED
    summary = trainer.summary()
    assert "settled: rewards=['preference']" in summary
    assert "train: 2 of 22 rows dropped: 1 equal, 1 too long" in summary


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_a_summary_says_what_the_machines_decide_and_asks_them_once(
    make: Any, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    asked: list[object] = []

    def one_gpu(spec: object) -> Machines:
        asked.append(spec)
        return Machines(described(1, 1, "h100-80gb"), 16, here=True)

    for module in (settle_resources, settle_workers):
        monkeypatch.setattr(module, "machines", one_gpu)
    trainer = make(algorithm, use_peft=True)
    summary = trainer.summary()
    assert "settled: model.dtype=bfloat16" in summary
    rate = "train.learning_rate" if algorithm == "dpo" else "policy.learning_rate"
    assert re.search(rf"^{rate}=1e-06 is the default, .* {rate}=1e-05$", summary, re.MULTILINE)
    assert re.search(r"^(policy|trainer): 1 x .* 1 GPU$", summary, re.MULTILINE)
    assert trainer.config.model.dtype == "bfloat16"
    trainer.settle()
    assert trainer.summary() == summary
    assert len(asked) == 1


def test_nothing_is_said_of_a_rate_that_was_given_to_lora_or_is_of_no_lora() -> None:
    adapted = ModelSpec(name="m", lora=LoRASpec())
    assert len(lora_note(adapted, "policy.learning_rate", 1e-6, 1e-6)) == 1
    assert lora_note(adapted, "policy.learning_rate", 1e-5, 1e-6) == []
    assert lora_note(ModelSpec(name="m"), "policy.learning_rate", 1e-6, 1e-6) == []


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_adapters_that_cannot_be_are_refused_before_anything_starts(
    make: Any, tiny_model: Path, algorithm: str
) -> None:
    config = tiny_model / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "tie_word_embeddings": True}))
    try:
        for name, why in {"lm_head": "are one weight", "nowhere": "not found"}.items():
            trainer = make(algorithm, overrides=[f"model.lora.target_modules=[{name}]"])
            with pytest.raises(UserError, match=f"model.lora: LoRA could not be added.*{why}"):
                trainer.check()
    finally:
        config.write_text(text)


def test_a_reference_that_reads_other_tokens_is_refused_before_anything_starts(
    make: Any, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, tmp_path / "same")
    make("grpo", overrides=[f"reference.model={tmp_path / 'same'}"]).check()
    shutil.copytree(tiny_model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(tmp_path / "other")
    trainer = make("grpo", overrides=[f"reference.model={tmp_path / 'other'}"])
    with pytest.raises(UserError, match=r"reference\.model.*another vocabulary than the policy"):
        trainer.check()


@pytest.mark.parametrize("algorithm", ["dpo", "reward_model"])
def test_a_job_on_pairs_drops_the_same_rows(make: Any, algorithm: str) -> None:
    trainer = make(algorithm)
    trainer.check()
    assert trainer.config.data.max_length == trainer.inputs.max_length < 12
    assert len(trainer.pairs) == 20
    assert "train: 2 of 22 rows dropped: 1 equal, 1 too long" in trainer.summary()


def test_a_job_ends_rows_where_they_would_change_those_beside_them_and_says_where_they_do(
    make: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "dynamic")
    config = json.loads((model / "config.json").read_text())
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
    changed = {"max_position_embeddings": 6, "rope_parameters": scaling}
    (model / "config.json").write_text(json.dumps(config | changed))
    named = f"model.name={model}"
    decided = make("dpo", overrides=[named]).inputs.settle()
    length = {decision.path: decision for decision in decided}["data.max_length"]
    assert length.value == 6
    assert length.why.startswith("max_position_embeddings of dynamic scaling, beyond which")
    told = make("dpo", overrides=[named, "data.max_length=12"]).inputs.told()
    assert told[-1].startswith("data.max_length=12 takes rows of more than 6 tokens (max_position_")


@pytest.mark.parametrize(
    ("template", "asked", "option", "refused"),
    [
        (False, "messages", {}, True),
        (True, "messages", {"apply_chat_template": False}, True),
        (True, "messages", {}, False),
        (False, "messages", {"reads": "completion"}, False),
        (False, "text", {}, False),
    ],
)
def test_a_reward_model_that_reads_text_alone_is_refused_messages_at_the_start(
    make: Any,
    tiny_model: Path,
    tmp_path: Path,
    template: bool,
    asked: str,
    option: dict[str, Any],
    refused: bool,
) -> None:
    judge, data = tmp_path / "judge", tmp_path / "prompts.jsonl"
    write_reward_model(judge, tiny_model)
    if not template:
        (judge / "chat_template.jinja").unlink()
    prompt: Any = "1+1" if asked == "text" else [{"role": "user", "content": "1+1"}]
    data.write_text(json.dumps({"prompt": prompt}) + "\n")
    rewards = [{"model": str(judge), **option}]
    for read, place in (("prompts", "data.path"), ("held_out", "data.eval_path")):
        overrides = [f"{place}={data}"]
        inputs = make("grpo", config={"rewards": rewards}, overrides=overrides).inputs
        if refused:
            with pytest.raises(UserError, match=r"'judge' reads .* prompt of row 0 is messages"):
                getattr(inputs, read)
        else:
            assert len(getattr(inputs, read)) == 1


def test_rewards_that_read_no_answer_take_preference_data_as_prompts(make: Any) -> None:
    trainer = make("grpo", reward_functions="tests.e2e.rewards:digits")
    trainer.check()
    assert [criterion.name for criterion in trainer.criteria] == ["digits"]
    assert len(trainer.prompts) == 20


def test_a_reward_may_be_called_reward_and_none_as_the_sum_of_all(make: Any) -> None:
    digits = {"function": "tests.e2e.rewards:digits"}
    trainer = make("grpo", config={"rewards": [digits | {"name": "reward"}]})
    assert [criterion.name for criterion in trainer.criteria] == ["reward"]
    with pytest.raises(UserError, match="'weighted sum' is the sum of all; give"):
        make("grpo", config={"rewards": [digits | {"name": "weighted sum"}]}).check()


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_rows_that_are_held_out_are_not_trained_on_and_many_are_told(
    make: Any,
    algorithm: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sources, "MANY", 20)
    short = ["rollout.max_completion_length=8"] if algorithm == "grpo" else []
    trainer = make(algorithm, overrides=["data.eval_split=train[20:]", *short])
    with pytest.raises(UserError, match=r"train on 2 of the 2 rows that it holds out; give each"):
        trainer.check()
    make(algorithm, overrides=["data.split=train[:20]", "data.eval_split=train[20:]"]).check()
    assert re.findall(r"checking (\d+) rows of .*pairs.jsonl\n", capsys.readouterr().out) == ["20"]
    started = RunDir(Path(trainer.config.output_dir))  # by an older version, which did not look
    started.path.mkdir(parents=True)
    started.describe(trainer.config)
    (started.path / "metrics.jsonl").write_text('{"step": 1}\n')
    trainer.check()


@pytest.mark.slow
def test_held_out_rows_are_dropped_and_counted_too(make: Any, pairs: Path) -> None:
    held_out = shutil.copy(pairs, pairs.with_name("held.jsonl"))
    trainer = make("grpo", overrides=[f"data.eval_path={held_out}"])
    trainer.check()
    assert len(trainer.eval_prompts) == 20
    assert "eval: 2 of 22 rows dropped" in trainer.summary()


def test_held_out_rows_without_a_column_that_a_reward_needs_are_refused(
    make: Any, pairs: Path
) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    held_out = pairs.with_name("held.jsonl")
    held_out.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    given = [f"data.eval_path={held_out}", "rollout.max_completion_length=8"]
    said = r"^data\.eval_path: reward 'preference' needs column 'chosen', which the data lack"
    with pytest.raises(UserError, match=said):
        make("grpo", overrides=given).check()


@pytest.mark.slow
def test_a_measure_is_another_where_completions_end_otherwise(make: Any, pairs: Path) -> None:
    held_out = shutil.copy(pairs, pairs.with_name("held.jsonl"))

    def inputs(*overrides: str) -> RunInputs:
        given = (f"data.eval_path={held_out}", "rollout.max_completion_length=8", *overrides)
        trainer = make("grpo", overrides=[*given])
        trainer.check()
        return trainer.inputs

    plain = inputs()
    assert plain.held_out is not None
    nothing = {"tools": [], "environment": None, "agent": None}
    before = measure(
        plain.held_out.fingerprint, [{"function": "preference"}], [1, 0.0], 8, nothing, [16, 32]
    )
    assert plain.measure == before, "as versions had it that did not look"
    assert inputs("model.stop_token_ids=[5]").measure != before


def test_ppo_on_preferences_needs_a_reward_model(make: Any) -> None:
    with pytest.raises(UserError, match="ppo needs a reward model"):
        make("ppo")


def test_nothing_is_read_before_it_is_asked_for(make: Any, pairs: Path) -> None:
    pairs.unlink()
    trainer = make("grpo")
    assert trainer.config.rollout.max_prompt_length is None
    with pytest.raises(UserError, match="no such file"):
        trainer.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "values"),
    [
        ("grpo", ["rollout.max_prompt_length=20", "rollout.max_completion_length=8"]),
        ("dpo", ["data.max_length=30"]),
    ],
)
def test_a_run_that_goes_on_is_the_same_run_with_the_values_it_had(
    make: Any, tmp_path: Path, algorithm: str, values: list[str]
) -> None:
    first = make(algorithm)
    first.check()
    run = tmp_path / "run"
    run.mkdir()
    settled = load_config(json.loads(first.config.model_dump_json()), values)
    (run / "config.yaml").write_text(dump(settled))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    again = make(algorithm)
    rundir = again.check()
    assert again.config == settled
    assert rundir.changed == {}
    assert "as the run in output_dir has it" in again.summary()


@pytest.mark.slow
def test_a_checkpoint_that_was_copied_alone_keeps_what_its_run_had_whatever_was_settled_before(
    make: Any, tmp_path: Path
) -> None:
    first = make("grpo")
    first.check()
    had = ["model.dtype=bfloat16", "rollout.max_prompt_length=20"]
    short = "rollout.max_completion_length=8"
    settled = load_config(json.loads(first.config.model_dump_json()), [*had, short])
    made = save(tmp_path / "other", 1, config=tree_of(settled))
    alone = shutil.copytree(made.path, tmp_path / "alone")
    fresh = first.summary()
    assert "settled: model.dtype=float32: no GPU computes here" in fresh
    assert first.eval_prompts == []
    summary = first.summary(str(alone))
    for setting in (*had, short):
        assert f"settled: {setting}: as the run" in summary
    assert first.config.rollout.max_length == settled.rollout.max_length == 28
    first.check(str(alone))
    assert first.config.model.dtype == "bfloat16"
    first.settle()  # for no start of its own
    assert first.config.model.dtype == "bfloat16"
    assert first.summary("never") == fresh


@pytest.mark.slow
@pytest.mark.parametrize("changed", [False, True])
def test_a_run_that_has_ended_without_a_checkpoint_at_its_end_is_not_trained_again(
    make: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: bool,
) -> None:
    class Starts(Exception):
        """The run would train."""

    def starts(*_: Any) -> None:
        raise Starts

    monkeypatch.setattr("aligntune.online.trainer.recorded", starts)
    given: dict[str, Any] = {
        "max_steps": 2,
        "overrides": ["checkpoint.at_end=false", "tracking.trackers=[]"],
    }
    first = make("grpo", **given)
    first.settle()
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text(dump(first.config))
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "reward/mean": 0.5}\n')
    (run / "events.jsonl").write_text('{"kind": "run_finished", "step": 2}\n')
    (run / "ledger.jsonl").touch()
    if changed:
        given["overrides"] += ["policy.learning_rate=0.5"]
        with pytest.raises(Starts):
            make("grpo", **given).train()
        return
    again = make("grpo", **given).train()
    assert (again.steps, again.already) == (2, True)
    assert again.metrics == {"reward/mean": 0.5}
    told = capsys.readouterr().out.splitlines()[-1]
    assert f"the run in {run} has ended at step 2 and its config is the same" in told
    monkeypatch.setattr("aligntune.runs.jsonl.LONG", 0)  # as of a ledger that takes minutes
    make("grpo", **given).train()
    assert capsys.readouterr().out.splitlines()[-1] == "reading the books (0.0 GB)"


OWN = """
import os, time
def process(completions, **columns):
    print("called in", os.getpid())
    return [3, None]
def broken(completions, **columns):
    return [1 / len(text) for text in completions]
def roles(completions, **columns):
    return [float(said[0]["role"] == "assistant") for said in completions]
def correct(completions, answer, **columns):
    return [float(text == right) for text, right in zip(completions, answer)]
def correct_text(completions, answer, **columns):
    return correct([said[-1]["content"] for said in completions], answer)
def sees_no_gpu(completions, **columns):
    if os.environ["CUDA_VISIBLE_DEVICES"] != "":
        raise RuntimeError("No CUDA GPUs should be seen")
    return [1.0 for _ in completions]
def slow(completions, **columns):
    time.sleep(3600)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file with rewards of the user's own."""
    (tmp_path / "first_row_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "first_row_rewards.py"
    sys.modules.pop("first_row_rewards", None)


@pytest.mark.slow
def test_every_function_is_called_once_on_the_first_prompt_in_a_process_of_its_own(
    make: Any, own: str, tmp_path: Path
) -> None:
    given = [f"{own}:process", "preference", f"{own}:sees_no_gpu"]  # as its actor, which has none
    trainer = make("grpo", reward_functions=given)
    trainer.check()
    lines = trainer.inputs.tried(tmp_path / "logs" / "reward.log")
    first = trainer.prompts.prompt_at(0)
    chosen = first.columns["chosen"]
    assert lines == [
        f"reward process: '' -> 3, '{chosen}' -> abstains (row {first.row})",
        f"reward preference: '' -> 0, '{chosen}' -> 1 (row {first.row})",
        f"reward sees_no_gpu: '' -> 1, '{chosen}' -> 1 (row {first.row})",
    ]
    log = (tmp_path / "logs" / "reward.log").read_text()
    called = re.findall(r"called in (\d+)", log)
    assert len(called) == 1
    assert int(called[0]) != os.getpid()
    assert lines == trainer.inputs.tried(), "once"
    assert lines[0] in trainer.summary().splitlines()


def test_where_rollouts_are_episodes_the_first_call_has_messages_too(own: str) -> None:
    """As every call of the run, also where the prompt is text."""
    config = SimpleNamespace(
        plays=True,
        rewards=[RewardFunctionSpec(function=f"{own}:roles")],
        reward=SimpleNamespace(sandbox="auto", resources=SimpleNamespace(gpus=0)),
    )
    criterion = RewardCriterion(
        "roles", "first_row_rewards:roles", 60.0, search_path=(os.getcwd(),)
    )
    first = Prompt(3, "2+3", "2+3", np.zeros(1, np.int32), {"answer": "5"})
    assert try_rewards(config, [criterion], first, None) == [  # type: ignore[arg-type]
        "reward roles: '' -> 1, '5' -> 1 (row 3)",
        f"{NOTE}reward roles gives two completions the same score. {OF_MESSAGES}",
    ]


OF_MESSAGES = "They are lists of messages here: the text of one is completion[-1]['content']"


def test_a_function_that_may_take_messages_for_text_is_told_in_the_run(
    make: Any, own: str, pairs: Path
) -> None:
    asked = [{"role": "user", "content": "2+3"}]
    pairs.write_text(json.dumps({"prompt": asked, "answer": "5"}) + "\n")
    trainer = make("grpo", reward_functions=[f"{own}:correct", f"{own}:correct_text"])
    assert trainer.inputs.tried() == [
        "reward correct: '' -> 0, '5' -> 0 (row 0)",
        f"{NOTE}reward correct gives two completions the same score. {OF_MESSAGES}",
        "reward correct_text: '' -> 0, '5' -> 1 (row 0)",
    ]


@pytest.mark.slow
def test_a_function_that_fails_on_the_first_row_is_refused_with_its_own_frames(
    make: Any, own: str
) -> None:
    trainer = make("grpo", reward_functions=["preference", f"{own}:broken"])
    trainer.check()
    with pytest.raises(UserError) as refused:
        trainer.summary()
    told = str(refused.value)
    assert told.startswith("rewards.1: reward 'broken' failed (raised)")
    assert "first_row_rewards.py" in told
    assert "\nZeroDivisionError: " in told, "its frames stay lines"
    assert "/actors/" not in told
    row = trainer.prompts.prompt_at(0).row
    assert f"row {row} and the completions ['', " in told
    assert told.endswith("rewards.1.try_first=false leaves this call out.")


@pytest.mark.slow
def test_the_time_limit_of_a_reward_holds_on_the_first_row_and_is_named(
    make: Any, own: str
) -> None:
    trainer = make("grpo", reward_functions=f"{own}:slow", overrides=["rewards.0.timeout_s=0.2"])
    trainer.check()
    with pytest.raises(UserError, match=r"no answer within 0\.2 s") as refused:
        trainer.summary()
    assert "raise rewards.0.timeout_s" in str(refused.value)


def test_what_is_not_to_be_tried_and_what_asks_another_machine_is_not_called(
    make: Any, own: str
) -> None:
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m", "rubric": "r"}
    rewards = [
        {"function": f"{own}:broken", "try_first": False},
        {"function": "judge", "options": judge},
        {"url": "http://127.0.0.1:9/score"},
    ]
    trainer = make("grpo", config={"rewards": rewards})
    trainer.check()
    assert trainer.inputs.tried() == []
