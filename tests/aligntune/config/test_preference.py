"""Configs of preference jobs: which kind a tree is, defaults, round trip, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aligntune import create_rl_trainer
from aligntune.config.auto import open_settings
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import PreferenceConfig, check_passes
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.preference.trainer import PreferenceTrainer


def config(*overrides: str, algorithm: Any = "dpo", **sections: Any) -> PreferenceConfig:
    tree = {"model": {"name": "m"}, "data": {"path": "d"}, "output_dir": "o", **sections}
    loaded = load_config({"algorithm": algorithm, **tree}, overrides)
    assert isinstance(loaded, PreferenceConfig)
    return loaded


def test_the_name_of_the_algorithm_says_which_kind_a_config_is() -> None:
    for name in ("dpo", "DPO", "reward_model", "reward-model", {"name": "Reward Model"}):
        assert config(algorithm=name).algorithm_name in ("dpo", "reward_model")
    online = {"algorithm": "grpo", "model": {"name": "m"}, "data": {"path": "d"}}
    assert isinstance(load_config({**online, "output_dir": "o", "rewards": ["math"]}), RunConfig)


def test_a_dumped_config_is_read_back_equal() -> None:
    for given in (
        config("algorithm.loss_type=[sigmoid, sft]", "algorithm.loss_weights=[1, 0.5]"),
        config("algorithm.center_coefficient=0.01", algorithm="reward_model"),
    ):
        assert load_config(yaml.safe_load(dump(given))) == given


def test_auto_is_a_value_where_the_machines_decide_nothing() -> None:
    given = {"zero_optimization": {"reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"}}
    made = config(train={"deepspeed": given, "workers": "auto"}, data={"path": "d"})
    for one in (made, load_config(yaml.safe_load(dump(made)))):
        assert isinstance(one, PreferenceConfig)
        assert one.train.deepspeed == given
        assert "train.workers" in open_settings(one)
    with pytest.raises(UserError, match=r"train\.steps: .* got 'auto'"):
        config("train.steps=auto")


def test_defaults_are_those_of_the_algorithm() -> None:
    resolved = config()
    assert (resolved.train.learning_rate, resolved.train.epochs) == (1e-6, 1.0)
    assert resolved.algorithm.beta == 0.1  # type: ignore[union-attr]
    assert config("train.steps=3").train.epochs is None


REFUSED = {
    "label_smoothing has no effect on loss_type sigmoid": ["algorithm.label_smoothing=0.1"],
    "label_smoothing has no effect on loss_type ipo": [
        "algorithm.loss_type=[ipo, sft]",
        "algorithm.label_smoothing=0.1",
    ],
    "must be below 0.5": ["algorithm.loss_type=robust", "algorithm.label_smoothing=0.6"],
    "exo_pair needs label_smoothing": ["algorithm.loss_type=exo_pair"],
    "1 loss_weights for 2 losses": [
        "algorithm.loss_type=[sigmoid, sft]",
        "algorithm.loss_weights=[1]",
    ],
    "no loss is called 'sigmod'; did you mean 'sigmoid'?": ["algorithm.loss_type=sigmod"],
    "no loss is called 'hing'; did you mean 'hinge'?": ["algorithm.loss_type=[ipo, hing]"],
    "loss_weights.1: Input should be greater than 0": [
        "algorithm.loss_type=[sigmoid, sft]",
        "algorithm.loss_weights=[1, 0]",
    ],
    "loss_type sft alone reads no rejected side": ["algorithm.loss_type=sft"],
    "f_divergence forward_kl does not go with loss_type nca_pair": [
        "algorithm.loss_type=[sigmoid, nca_pair]",
        "algorithm.f_divergence=forward_kl",
    ],
    "weighting does not go with loss_type sft": [
        "algorithm.loss_type=[sigmoid, sft]",
        "algorithm.weighting=true",
    ],
    "weighting does not go with loss_type aot": [
        "algorithm.loss_type=aot",
        "algorithm.weighting=true",
    ],
    "leaves no reference to precompute": [
        "algorithm.reference_free=true",
        "algorithm.precompute_reference=true",
    ],
    "eval section is set and there is no held-out data": ["eval.every_steps=5"],
    "both say how long": ["train.steps=1", "train.epochs=1"],
    "'algorithm.betta'; did you mean 'algorithm.beta'": ["algorithm.betta=1"],
    "'train.worker'; did you mean 'train.workers'": ["train.worker=1"],
    "'rollout'": ["rollout.temperature=1"],
    "needs the chat template": ["data.system_prompt=s", "data.apply_chat_template=false"],
    "train.deepspeed has the section optimizer": [
        "train.deepspeed={optimizer: {type: Lamb, params: {lr: auto}}}"
    ],
    "train.deepspeed has the section scheduler": [
        "train.deepspeed={scheduler: {type: WarmupLR, params: {warmup_num_steps: auto}}}"
    ],
    "stage 3 and model.lora": [
        "train.deepspeed={zero_optimization: {stage: 3}}",
        "model.lora={}",
    ],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(reason: str) -> None:
    with pytest.raises(UserError) as refused:
        config(*REFUSED[reason])
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_loss_that_sorts_pairs_wants_two_a_pass_where_a_run_starts_and_is_read() -> None:
    one = config("algorithm.loss_type=[sigmoid, aot]", "train.pairs_per_worker=1")
    assert isinstance(one, PreferenceConfig)
    with pytest.raises(UserError, match=r"train\.pairs_per_worker=1 does not go .* aot, which"):
        check_passes(one, held_out=False)
    loss = ("algorithm.loss_type=aot_unpaired", "data.eval_path=e")
    held_out = config(*loss, "eval.pairs_per_worker=1")
    with pytest.raises(UserError, match=r"eval\.pairs_per_worker=1 does not go .* aot_unpaired,"):
        check_passes(held_out, held_out=True)
    check_passes(held_out, held_out=False)


def test_losses_that_use_label_smoothing_may_have_it() -> None:
    for loss in ("robust", "exo_pair", "aot", "aot_unpaired", "[sigmoid, exo_pair]"):
        config(f"algorithm.loss_type={loss}", "algorithm.label_smoothing=0.1")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.system_prompt=s", "scores prompts as the data have them"),
        ("data.long_rows=keep_end", "never reads a part of a text"),
        ("backend=unsloth", "does not run with backend=unsloth"),
        ("algorithm.beta=1", "unknown key 'algorithm.beta'"),
    ],
)
def test_a_reward_model_refuses_what_its_scores_could_not_keep(override: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        config(override, algorithm="reward_model")


class TestKeywords:
    def test_familiar_arguments_reach_the_tree(self) -> None:
        trainer = create_rl_trainer(
            model_name="m",
            dataset_name="d",
            algorithm="dpo",
            backend="trl",
            batch_size=4,
            learning_rate=1e-5,
            max_seq_length=77,
            max_steps=3,
            beta=0.3,
            use_peft=True,
            lora_r=4,
            seed=9,
        )
        assert isinstance(trainer, PreferenceTrainer)
        tree = trainer.config.model_dump()
        assert tree["algorithm"]["beta"] == 0.3
        assert tree["data"]["max_length"] == 77
        assert tree["model"]["lora"]["r"] == 4
        assert tree["output_dir"] == "runs/dpo"
        train = tree["train"]
        assert (train["pairs_per_worker"], train["learning_rate"]) == (4, 1e-5)
        assert (train["steps"], train["seed"]) == (3, 9)

    def test_arguments_of_online_training_are_refused(self) -> None:
        with pytest.raises(UserError, match="dpo has no argument 'num_generations'"):
            create_rl_trainer(model_name="m", dataset_name="d", algorithm="dpo", num_generations=8)


class TestBeforeAnythingStarts:
    def test_prompt_only_data_are_no_pairs(self, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
        trainer = create_rl_trainer(
            model_name=str(tiny_model),
            dataset_name=str(tmp_path / "prompts.jsonl"),
            algorithm="dpo",
            output_dir=str(tmp_path / "run"),
        )
        with pytest.raises(UserError, match="holds no preference pairs; its columns are prompt"):
            trainer.train()
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_more_workers_than_the_cluster_can_hold_are_refused(
        self, tiny_model: Path, tmp_path: Path, ray_session: None
    ) -> None:
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "1", "chosen": "2", "rejected": "3"}\n')
        trainer = create_rl_trainer(
            model_name=str(tiny_model),
            dataset_name=str(tmp_path / "pairs.jsonl"),
            algorithm="dpo",
            output_dir=str(tmp_path / "run"),
            overrides=["train.workers=17", "tracking.trackers=[]"],
        )
        with pytest.raises(UserError, match=r"asks for 17 CPU .* have 16"):
            trainer.train()
