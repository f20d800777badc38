"""The text a reward model scores, what is refused as one, and how configs name one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from actors.messages import Prompt
from actors.models.configuration import ModelError
from actors.models.loading import load_tokenizer
from actors.models.reward import check_reward_model, load_reward_model, new_reward_model
from actors.scoring.criteria import RewardFailed, RewardFailure
from actors.scoring.model import (
    ModelScorer,
    ModelStuck,
    RewardModelCriterion,
    scored_ids,
    scored_text,
)
from actors.specs import ModelSpec, RewardFunctionSpec, RewardModelSpec
from aligntune.config.keywords import build_tree
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.rewards.registry import check_columns, resolve_all
from aligntune.runs.failure import reason


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained but complete reward model."""
    folder = tmp_path_factory.mktemp("reward-model")
    new_reward_model(ModelSpec(name=str(tiny_model)), seed=1).save_pretrained(folder)
    load_tokenizer(ModelSpec(name=str(tiny_model))).save_pretrained(folder)
    return folder


@pytest.fixture
def criterion(reward_model: Path) -> Callable[..., RewardModelCriterion]:
    def make(**changes: Any) -> RewardModelCriterion:
        given = {"name": "rm", "model": ModelSpec(name=str(reward_model)), "batch_size": 2}
        return RewardModelCriterion(**{**given, "timeout_s": 60.0, **changes})  # type: ignore[arg-type]

    return make


def prompt(source: Any = "1+1") -> Prompt:
    return Prompt(0, source, "p", np.array([1], np.int32), {})


def score(criterion: RewardModelCriterion, source: Any, *completions: str) -> list[float]:
    async def body() -> list[float]:
        scorer = ModelScorer(criterion)
        await scorer.start()
        return await scorer.score(prompt(source), completions)

    return asyncio.run(body())


class TestScoredText:
    def test_a_chat_template_renders_prompt_and_completion_as_one_conversation(
        self, reward_model: Path
    ) -> None:
        tokenizer = load_tokenizer(ModelSpec(name=str(reward_model)))
        whole = "<|user|>1+1<|assistant|>2<|end|>"
        assert scored_text(tokenizer, "1+1", "2", True) == (whole, False)
        asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}]
        said = [{"role": "assistant", "content": "2"}]
        assert scored_text(tokenizer, asked, said, True) == ("<|system|>s" + whole, False)

    def test_without_a_template_the_text_is_prompt_completion_and_the_end_once(
        self, reward_model: Path
    ) -> None:
        tokenizer = load_tokenizer(ModelSpec(name=str(reward_model)))
        assert scored_text(tokenizer, "1+1=", "2", False) == ("1+1=2<|end|>", True)
        assert scored_text(tokenizer, "1+1=", "2<|end|>", False) == ("1+1=2<|end|>", True)
        with pytest.raises(ValueError, match="no chat template in use"):
            scored_text(tokenizer, [{"role": "user", "content": "1+1"}], "2", False)


class TestScoring:
    @pytest.mark.slow
    def test_scores_are_those_of_the_model_whatever_the_batch_size(
        self, reward_model: Path, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        texts = ("2", "31", "", "12345678")
        spec = ModelSpec(name=str(reward_model))
        tokenizer, model = load_tokenizer(spec), load_reward_model(spec)
        expected = [
            model(torch.tensor([ids])).logits[0, 0].item()
            for ids in scored_ids(tokenizer, [("1+1", text) for text in texts], True)
        ]
        for size in (1, 3, 16):
            assert score(criterion(batch_size=size), "1+1", *texts) == pytest.approx(
                expected, abs=1e-5
            )
        assert len(set(expected)) == len(texts)

    @pytest.mark.slow
    @pytest.mark.parametrize("padding", [None, -1, 7, "eos"])
    def test_a_text_is_read_to_the_token_that_the_model_s_own_padding_leaves_last(
        self, tiny_model: Path, tmp_path: Path, padding: int | str | None
    ) -> None:
        """Where a tokenizer has no padding its end stands for it, and ends each text too."""
        tokenizer = load_tokenizer(ModelSpec(name=str(tiny_model)))
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            pad_token_id=tokenizer.eos_token_id if padding == "eos" else padding,
        )
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path)
        spec = ModelSpec(name=str(tmp_path))
        model, texts = load_reward_model(spec), ("2", "31", "", "12345678")
        expected = [
            model(torch.tensor([ids])).logits[0, 0].item()
            for ids in scored_ids(load_tokenizer(spec), [("1+1", text) for text in texts], True)
        ]
        given = RewardModelCriterion("rm", spec, batch_size=3, timeout_s=60.0)
        assert score(given, "1+1", *texts) == pytest.approx(expected, abs=1e-5)
        assert len(set(expected)) == len(texts)

    def test_a_text_over_the_limit_is_refused_and_never_cut(
        self, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        assert len(score(criterion(max_tokens=7), "1+1", "2")) == 1  # 3 + 1 and three markers
        with pytest.raises(RewardFailed, match="max_tokens is 7") as failed:
            score(criterion(max_tokens=7), "1+1", "2", "22")
        assert failed.value.reason is RewardFailure.TOO_LONG
        with pytest.raises(RewardFailed, match="max_tokens is 64"):
            score(criterion(), "1" * 80, "2")

    def test_a_prompt_that_the_chat_template_refuses_fails_the_group(
        self, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        async def body() -> None:
            scorer = ModelScorer(criterion())
            await scorer.start()
            scorer._tokenizer.chat_template = "{{ raise_exception('not like this') }}"
            await scorer.score(prompt(), ["2"])

        with pytest.raises(RewardFailed, match=r"template refuses .*not like this") as failed:
            asyncio.run(body())
        assert failed.value.reason is RewardFailure.RAISED

    def test_a_score_that_is_not_finite_fails_the_group(
        self, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        async def body() -> None:
            scorer = ModelScorer(criterion())
            await scorer.start()
            torch.nn.init.constant_(scorer._model.score.weight, float("nan"))
            await scorer.score(prompt(), ["2"])

        with pytest.raises(RewardFailed, match="completion 0 is nan") as failed:
            asyncio.run(body())
        assert failed.value.reason is RewardFailure.NOT_FINITE

    def test_a_call_that_takes_too_long_fails_and_the_next_one_is_served(
        self, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        async def body() -> list[float]:
            scorer = ModelScorer(criterion(timeout_s=0.2))
            await scorer.start()
            free, forward = asyncio.Event(), scorer._forward
            loop = asyncio.get_running_loop()

            def held(rows: list[list[int]]) -> list[float]:
                asyncio.run_coroutine_threadsafe(free.wait(), loop).result(60)
                return forward(rows)

            scorer._forward = held  # type: ignore[method-assign]
            with pytest.raises(RewardFailed) as failed:
                await scorer.score(prompt(), ["2"])
            assert failed.value.reason is RewardFailure.TIMEOUT
            scorer._criterion = criterion()  # a busy machine takes longer than 0.2 s to go on
            free.set()
            return await scorer.score(prompt(), ["2"])

        assert asyncio.run(body()) == score(criterion(), "1+1", "2")

    @pytest.mark.slow
    def test_a_model_that_hangs_is_found_by_the_next_group(
        self, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        async def body() -> None:
            scorer = ModelScorer(criterion(timeout_s=0.2))
            await scorer.start()
            free = threading.Event()
            scorer._forward = lambda rows: [float(free.wait(60))]  # type: ignore[method-assign]
            with pytest.raises(RewardFailed, match="no scores within"):
                await scorer.score(prompt(), ["2"])
            with pytest.raises(ModelStuck, match="has had the model for"):
                await scorer.score(prompt(), ["2"])
            free.set()

        asyncio.run(body())

    def test_one_text_that_does_not_fit_and_a_token_without_a_row_are_told_with_what_helps(
        self, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        async def body() -> None:
            scorer = ModelScorer(criterion(batch_size=1))
            await scorer.start()
            tokens, scorer._tokens = scorer._tokens, 1
            with pytest.raises(RewardFailed, match=r"gives token \d+, and its table .* has 1$"):
                await scorer.score(prompt(), ["2"])
            scorer._tokens = tokens

            def full(**_: Any) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory.")

            scorer._model.forward = full
            with pytest.raises(RewardFailed, match=r"1 texts .*: name a smaller reward model, or"):
                await scorer.score(prompt(), ["2"])

        asyncio.run(body())

    @pytest.mark.parametrize(
        ("raised", "kind", "said"),
        [
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                RewardFailed,
                r"2 texts of up to 7 tokens do not fit .*lower this reward's batch_size below 2, "
                r"or raise reward\.resources\.gpus where it shares one",
            ),
            (
                RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
                RewardFailed,
                r"2 texts of up to 7 tokens do not fit .*lower this reward's batch_size below 2, ",
            ),
            (IndexError("index out of range in self"), RewardFailed, "IndexError: index out of"),
            (
                RuntimeError("CUDA error: unspecified launch failure\nmore"),
                ModelStuck,
                "rm: .*CUDA",
            ),
        ],
        ids=["memory", "library", "any", "CUDA"],
    )
    def test_what_a_model_raises_is_told_as_this_reward_s_failure_and_ends_no_run(
        self,
        criterion: Callable[..., RewardModelCriterion],
        raised: Exception,
        kind: type[Exception],
        said: str,
    ) -> None:
        async def body() -> None:
            scorer = ModelScorer(criterion())
            await scorer.start()
            forward = scorer._model.forward

            def broken(**_: Any) -> None:
                raise raised

            scorer._model.forward = broken
            with pytest.raises(kind, match=said) as failed:
                await scorer.score(prompt(), ["2", "3"])
            assert "policy." not in reason(failed.value), "what helps is this reward's"
            if isinstance(failed.value, RewardFailed):
                assert failed.value.reason is RewardFailure.RAISED
            scorer._model.forward = forward
            assert len(await scorer.score(prompt(), ["2", "3"])) == 2

        asyncio.run(body())

    def test_no_keys_and_values_are_kept_for_a_next_token_that_nobody_writes(
        self, criterion: Callable[..., RewardModelCriterion]
    ) -> None:
        async def body() -> Any:
            scorer, found = ModelScorer(criterion()), []
            await scorer.start()
            scorer._model.register_forward_hook(lambda *given: found.append(given[-1]))
            await scorer.score(prompt(), ["2"])
            return found[0].past_key_values

        assert asyncio.run(body()) is None


class TestHead:
    @pytest.mark.slow
    @pytest.mark.parametrize("lora", [False, True])
    def test_a_score_under_autocast_has_the_digits_of_float32_and_its_gradient(
        self, tiny_model: Path, lora: bool
    ) -> None:
        model = new_reward_model(ModelSpec(name=str(tiny_model)), seed=0)
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"])
            )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.arange(3, 9)[None]).logits
        assert logits.dtype == torch.float32
        assert logits.bfloat16() != logits
        logits.sum().backward()
        (head,) = (w for n, w in model.named_parameters() if "score" in n and w.requires_grad)
        assert head.dtype == torch.float32
        assert bool(head.grad.any())


class TestRefusals:
    def test_a_causal_lm_is_named_as_one(self, tiny_model: Path) -> None:
        with pytest.raises(ModelError, match="is a causal language model"):
            check_reward_model(ModelSpec(name=str(tiny_model)))

    def test_a_model_with_two_labels_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
        model.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="has 2 labels"):
            check_reward_model(ModelSpec(name=str(tmp_path)))
        with pytest.raises(ModelError, match="has 2 labels"):
            new_reward_model(ModelSpec(name=str(tmp_path)), seed=0)

    def test_a_model_without_its_head_is_refused(self, reward_model: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(reward_model / "model.safetensors")
        del weights["score.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((reward_model / "config.json").read_text())
        with pytest.raises(ModelError, match=r"lacks 1 weights, 'score\.weight'"):
            load_reward_model(ModelSpec(name=str(tmp_path)))

    def test_a_new_head_depends_on_the_seed_alone(self, tiny_model: Path) -> None:
        spec = ModelSpec(name=str(tiny_model))
        heads = [new_reward_model(spec, seed).score.weight for seed in (0, 0, 1)]
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])


class TestConfig:
    @staticmethod
    def config(rewards: list[Any], algorithm: str = "grpo") -> RunConfig:
        return load_config(
            {
                "algorithm": algorithm,
                "model": {"name": "m"},
                "data": {"path": "d"},
                "output_dir": "o",
                "rewards": rewards,
                "train": {"groups_per_step": 64},
            }
        )

    def test_functions_and_models_stand_in_one_list_in_its_order(self) -> None:
        config = self.config(["math", {"model": "m", "weight": 2}, {"function": "length"}])
        assert [type(spec) for spec in config.rewards] == [
            RewardFunctionSpec,
            RewardModelSpec,
            RewardFunctionSpec,
        ]
        import yaml

        assert load_config(yaml.safe_load(dump(config))) == config

    def test_a_wrong_key_of_either_kind_is_met_with_the_nearest(self) -> None:
        with pytest.raises(UserError, match=r"batch_sise'; did you mean 'rewards\.0\.batch_size'"):
            self.config([{"model": "m", "batch_sise": 2}])
        with pytest.raises(UserError, match=r"did you mean 'rewards\.0\.weight'"):
            self.config([{"function": "math", "wieght": 2}])
        with pytest.raises(UserError, match=r"rewards\.0\.batch_size: .* got 0"):
            self.config([{"model": "m", "batch_size": 0}])

    @pytest.mark.parametrize("rewards", [[], ["math"]])
    def test_ppo_without_a_reward_model_is_refused(self, rewards: list[str]) -> None:
        with pytest.raises(UserError, match="ppo needs a reward model") as refused:
            self.config(rewards, "ppo")
        assert "\n" not in str(refused.value)
        assert self.config([{"model": "m"}], "ppo").rewards

    def test_reward_model_name_becomes_the_first_criterion(self) -> None:
        tree, _, _ = build_tree({"reward_model_name": "rm", "reward_functions": ["math"]})
        assert tree["rewards"] == [{"model": "rm"}, {"function": "math"}]
        file = {"rewards": ["math", {"model": "old"}]}
        tree, _, _ = build_tree({"reward_model_name": "rm", "config": file})
        assert tree["rewards"] == [{"model": "rm"}, "math"]

    def test_criteria_keep_their_order_and_a_model_needs_no_column(
        self, reward_model: Path
    ) -> None:
        criteria = resolve_all(
            [RewardModelSpec(model=f"{reward_model}/"), RewardFunctionSpec(function="math")]
        )
        assert [criterion.name for criterion in criteria] == [reward_model.name, "math"]
        check_columns(criteria[0], [])
