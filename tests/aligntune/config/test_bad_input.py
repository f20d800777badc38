"""Wrong input is one line on standard error and exit code 2, before Ray starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aligntune.cli import main

Fail = Callable[..., str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(10, 18)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def fail(
    tiny_model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Fail:
    """Runs `aligntune train` on good input with one thing changed; returns the one line."""
    import ray

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("Ray was started for input that is wrong")

    monkeypatch.setattr(ray, "init", refuse)

    def run(*changes: str, **flags: str) -> str:
        options = {
            "algorithm": "grpo",
            "model": str(tiny_model),
            "dataset": str(data),
            "reward": "exact_match",
            "out": str(tmp_path / "run"),
            **flags,
        }
        arguments = [part for k, v in options.items() if v for part in (f"--{k}", v)]
        with pytest.raises(SystemExit) as stopped:
            main(["train", *arguments, "train.steps=1", *changes])
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2, error
        assert "\n" not in error
        assert error.startswith("aligntune: ")
        return error

    return run


def test_unknown_config_key(fail: Fail) -> None:
    assert "did you mean 'rollout.temperature'" in fail("rollout.temprature=1")


@pytest.mark.slow
def test_unknown_algorithm(fail: Fail) -> None:
    assert "did you mean 'grpo'" in fail(algorithm="grpoo")
    error = fail(algorithm="gpro")
    assert (
        "did you mean 'grpo'? known are ppo, grpo, dapo, gspo, drgrpo, dpo, reward_model" in error
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_run_directory_that_cannot_be(fail: Fail, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    assert "output_dir" in fail(out=str(tmp_path / name))
    assert "cannot be used" in fail(out=str(tmp_path / name))


@pytest.mark.slow
def test_values_that_no_run_can_have(fail: Fail) -> None:
    assert "train.seed" in fail("train.seed=-5")
    assert "a name, or a section with a name, not 5" in fail("algorithm=5")
    assert "train.steps" in fail("train.steps=2024-13-45")
    assert "train.steps" in fail("train.steps=yes")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.groups_per_step=true", "train.groups_per_step"),
        ("algorithm.beta=true", "algorithm.beta"),
        ("cluster.placement_timeout_s=true", "cluster.placement_timeout_s"),
        ("policy.adam_betas=[false,0.9]", "policy.adam_betas.0"),
        ("rewards.0.weight=false", "rewards.0.weight"),
    ],
)
def test_a_truth_is_no_number(fail: Fail, change: str, key: str) -> None:
    assert f"{key}: a number is wanted, not " in fail(change)


@pytest.mark.slow
def test_numbers_and_texts_that_nothing_can_hold(fail: Fail) -> None:
    assert "train.seed: the number is too large" in fail(f"train.seed={10**20}")
    assert "NUL character" in fail('data.system_prompt="a\\0b"')
    assert "data.prompt_column" in fail("data.prompt_column=" + "[" * 150 + "]" * 150)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("checkpoint.storage=s3://key:Rumpel417@bucket/runs", "checkpoint.storage"),
        ("checkpoint.storage=s3://bucket/runs?secret_key=Rumpel417", "checkpoint.storage"),
        ("rewards.0.options.api_key=Rumpel417", "rewards.0.options.api_key"),
        ("rewards.0.options={judge: {password: Rumpel417}}", "rewards.0.options.judge.password"),
        ("rewards.0.options.extra=hf_" + "Rumpel417" * 4, "rewards.0.options.extra"),
        ("rewards.0.options.token=Rumpel417Rumpel417Rumpel", "rewards.0.options.token"),
    ],
)
def test_a_credential_is_refused_by_its_key_and_not_shown(
    fail: Fail, change: str, key: str
) -> None:
    error = fail(change)
    assert key in error
    assert "credential" in error
    assert "Rumpel" not in error


@pytest.mark.parametrize("where", ["/proc/run", "/sys/run"])
def test_a_run_directory_where_nothing_can_be_written(fail: Fail, where: str) -> None:
    assert "nothing can be written" in fail(out=where)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "1", "answer": ' + "9" * 5000 + "}", "line 9: a number in the JSON has too"),
        ('{"prompt": "1", "answer": ' + "[" * 9**5 + "]" * 9**5 + "}", "nested too deeply"),
    ],
)
def test_json_that_python_cannot_read(fail: Fail, data: Path, row: str, said: str) -> None:
    rows = data.read_text()
    data.write_text(rows + row + "\n")
    assert said in fail()
    whole = data.with_suffix(".json")
    whole.write_text("[" + ", ".join([*rows.splitlines(), row]) + "]")
    assert said.removeprefix("line 9: ") in fail(dataset=str(whole))


def test_a_section_that_would_be_ignored_is_taken_out_from_the_command_line(fail: Fail) -> None:
    without = ("algorithm.beta=0", "reference.replicas=2")
    assert "reference=null takes it out" in fail(*without)
    assert "no-such" in fail(*without, "reference=null", model="no-such/model")


def test_missing_model_folder(fail: Fail, tmp_path: Path) -> None:
    assert "no-such-model" in fail(model=str(tmp_path / "no-such-model"))


def test_missing_data_file(fail: Fail, tmp_path: Path) -> None:
    assert "absent.jsonl" in fail(dataset=str(tmp_path / "absent.jsonl"))


def test_empty_data_file(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    error = fail(dataset=str(tmp_path / "empty.jsonl"))
    assert "empty" in error.replace("empty.jsonl", "")


def test_broken_json_is_named_with_file_and_line(fail: Fail, data: Path) -> None:
    data.write_text(data.read_text() + '{"prompt": "1+\n')
    assert "data.jsonl, line 9: broken JSON" in fail()


def test_no_prompt_column_lists_the_columns(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "1+1", "answer": "2"}\n')
    error = fail(dataset=str(path))
    assert "it has question, answer" in error


def test_no_reward(fail: Fail) -> None:
    assert "no reward" in fail(reward="")


@pytest.mark.slow
def test_reward_that_cannot_be_imported(fail: Fail) -> None:
    assert "tests.e2e.rewards" in fail(reward="tests.e2e.rewards:digitz")
    assert "no_such_module" in fail(reward="no_such_module:f")
    assert "did you mean 'exact_match'" in fail(reward="exact_mach")


def test_reward_whose_column_the_data_lack(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "1+1"}\n')
    assert "'answer'" in fail(dataset=str(path))


@pytest.mark.parametrize(
    "change",
    [
        "rewards.0.weight=.nan",
        "rewards.0.weight=.inf",
        "policy.learning_rate=.inf",
        "rollout.temperature=.inf",
    ],
)
def test_a_number_that_is_not_finite(fail: Fail, change: str) -> None:
    path = change.partition("=")[0]
    error = fail(change)
    assert path in error
    assert "finite" in error


@pytest.mark.parametrize("key", ["rollout.temperature", "eval.temperature"])
def test_a_temperature_that_vllm_would_raise(fail: Fail, key: str) -> None:
    error = fail(f"{key}=0.005")
    assert key in error
    assert "0.01" in error


def test_an_option_that_does_not_fit_the_run_is_named_as_the_algorithm_s(fail: Fail) -> None:
    small = ("train.groups_per_step=2", "train.groups_per_minibatch=2")
    error = fail("algorithm.metric=corect", *small, algorithm="dapo")
    assert error.startswith("aligntune: algorithm: ")
    assert "exact_match, score" in error


def test_settings_of_a_reference_that_is_not_there(fail: Fail) -> None:
    small = ("train.groups_per_step=2", "train.groups_per_minibatch=2")
    assert "dapo has no reference" in fail("reference.replicas=2", *small, algorithm="dapo")


def test_a_causal_lm_as_reward_model(fail: Fail, tiny_model: Path) -> None:
    error = fail(f"rewards=[{{model: {tiny_model}}}]", reward="")
    assert "causal" in error.lower()


def test_group_size_one(fail: Fail) -> None:
    assert "use 2 or more" in fail("train.completions_per_group=1")


def test_prompts_over_the_budget_are_counted(fail: Fail) -> None:
    error = fail("rollout.max_prompt_length=5")
    assert "8 of 8 rows cannot be used (8 too long)" in error
    assert "raise rollout.max_prompt_length" in error


def test_budgets_beyond_the_models_positions(fail: Fail) -> None:
    error = fail("rollout.max_prompt_length=40", "rollout.max_completion_length=30")
    assert "are 70 tokens, and the model reads 64" in error
    assert "lower rollout.max_prompt_length to 34 or less" in error
    assert "rollout.max_completion_length to 24 or less" in error


def test_more_rows_that_cannot_be_used_than_may_be_dropped(fail: Fail, data: Path) -> None:
    data.write_text(data.read_text() + '{"prompt": " ", "answer": "1"}\n')
    error = fail()
    assert "1 of 9 rows cannot be used (1 empty)" in error
    assert "raise data.max_dropped_fraction" in error
    assert "data.jsonl, row 8 (line 9)" in error
    error = fail("data.bad_rows=error", "data.max_dropped_fraction=0.5")
    assert "data.jsonl, row 8 (line 9): the prompt is empty" in error


def test_an_output_directory_with_something_else_in_it(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    assert "not empty" in fail()


@pytest.mark.slow
def test_a_start_that_was_refused_or_killed_stands_in_nobody_s_way(
    fail: Fail, tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoints" / "step-000004.partial").mkdir(parents=True)
    (tmp_path / "run" / "run.lock").touch()
    assert "--resume: " in fail(resume=str(tmp_path / "nowhere"))
    assert "--resume: " in fail(resume=str(tmp_path / "nowhere"))
    (tmp_path / "run" / "checkpoints" / "step-000004").mkdir()
    assert "not empty" in fail()


def test_an_output_directory_that_holds_another_run(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("algorithm: {name: dapo}\n")
    assert "holds another run: algorithm.name was 'dapo'" in fail()


def test_resume_never_on_a_run(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("algorithm: {name: grpo}\n")
    assert "resume=never" in fail(resume="never")


def test_no_config_and_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "give a config file, or --algorithm, --model and --dataset" in capsys.readouterr().err


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--algorythm", "grpo"])
    assert stopped.value.code == 2
    assert "--algorythm" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_starts_nothing_and_prints_the_resolved_tree(
    fail: Fail, tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(
            f"train --algorithm grpo --model {tiny_model} --dataset {data} --reward exact_match "
            f"--out {tmp_path / 'dry'} --dry-run train.groups_per_step=4".split()
        )
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "completions_per_group: 8" in printed
    assert "grpo: 2 steps of 4 groups x 8 completions" in printed
    assert not (tmp_path / "dry").exists()
