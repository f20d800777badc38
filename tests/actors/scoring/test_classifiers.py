"""Reward models of several architectures, and labels of classifiers, against their own logits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.messages import Prompt
from actors.models.configuration import ModelError
from actors.scoring.criteria import RewardFailed, RewardFailure
from actors.scoring.model import ModelScorer
from actors.specs import RewardModelSpec
from aligntune.rewards.registry import resolve_model
from tests.e2e.page import byte_tokenizer

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
ENCODERS = ("bert", "deberta-v2", "roberta", "xlm-roberta")


def write(folder: Path, kind: str, **config: Any) -> str:
    """A complete classifier of a kind, with a tokenizer that reads any text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = byte_tokenizer(template=None)
    if kind in ENCODERS:  # which begin and end every text themselves, and know no eos
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 1)]
        )
        tokenizer.eos_token = None
    given = AutoConfig.for_model(kind, **SIZES, vocab_size=len(tokenizer), pad_token_id=0, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(given).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scores(folder: str, *completions: str, prompt: str = "1+1=", **spec: Any) -> list[float]:
    async def body() -> list[float]:
        scorer = ModelScorer(resolve_model(RewardModelSpec(model=folder, **spec)))
        await scorer.start()
        return await scorer.score(Prompt(0, prompt, "p", np.array([1], np.int32)), completions)

    return asyncio.run(body())


def logits(folder: str, text: str) -> Any:
    """[L] of one text, as the model's own tokenizer makes it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
        return model(input_ids=ids).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ENCODERS, "qwen2", "llama"])
def test_a_reward_model_of_any_architecture_scores_prompt_and_completion(
    tmp_path: Path, kind: str
) -> None:
    folder = write(tmp_path, kind, num_labels=1)
    end = "" if kind in ENCODERS else "<|end|>"
    wanted = [float(logits(folder, f"1+1={said}{end}")[0]) for said in ("2", "three")]
    assert scores(folder, "2", "three") == pytest.approx(wanted, abs=1e-5)
    (chance,) = scores(folder, "2", output="probability")
    assert chance == pytest.approx(float(torch.tensor(wanted[0]).sigmoid()), abs=1e-5)
    narrow = torch.tensor(scores(folder, "2", "three", dtype="bfloat16"))
    assert (narrow.bfloat16() != narrow).any(), "three digits would tie what the model tells apart"


@pytest.mark.parametrize(
    ("kind", "most", "spec", "why"),
    [
        ("bert", 64, {}, "the model reads 64; shorten"),
        ("bert", 64, {"max_tokens": 100}, "the model reads 64; shorten"),
        ("roberta", 63, {}, "the model reads 63; shorten"),
        ("xlm-roberta", 63, {"max_tokens": 64}, "the model reads 63; shorten"),
        (
            "roberta",
            20,
            {"max_tokens": 20},
            "max_tokens is 20; raise it if the model can read more",
        ),
    ],
)
def test_a_text_that_just_fits_is_scored_and_one_token_more_is_too_long(
    tmp_path: Path, kind: str, most: int, spec: Any, why: str
) -> None:
    folder = write(tmp_path, kind, num_labels=1)
    text = "a" * (most - 2)  # and the tokens that begin and end it
    assert len(scores(folder, text, prompt="", **spec)) == 1
    with pytest.raises(RewardFailed, match=f"{most + 1} tokens and {why}") as failed:
        scores(folder, text, text + "a", prompt="", **spec)
    assert failed.value.reason is RewardFailure.TOO_LONG


class TestLabels:
    @pytest.fixture(scope="class")
    def classifier(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return write(tmp_path_factory.mktemp("classifier"), "bert", id2label=LABELS)

    @pytest.mark.slow
    def test_a_label_has_its_logit_and_its_probability_among_all(self, classifier: str) -> None:
        own = logits(classifier, "1+1=2")
        for index, label in LABELS.items():
            (score,) = scores(classifier, "2", label=label)
            assert score == pytest.approx(float(own[index]), abs=1e-5)
            (chance,) = scores(classifier, "2", label=label, output="probability")
            assert chance == pytest.approx(float(own.softmax(0)[index]), abs=1e-5)

    def test_the_completion_may_be_read_alone(self, classifier: str) -> None:
        own = logits(classifier, "2")
        for prompt in ("1+1=", "something else"):
            (score,) = scores(classifier, "2", prompt=prompt, label="neutral", reads="completion")
            assert score == pytest.approx(float(own[1]), abs=1e-5)

    def test_labels_that_do_not_exclude_each_other_have_each_their_own_probability(
        self, tmp_path: Path
    ) -> None:
        kind = "multi_label_classification"
        folder = write(tmp_path, "bert", id2label=LABELS, problem_type=kind)
        (chance,) = scores(folder, "2", label="positive", output="probability")
        assert chance == pytest.approx(float(logits(folder, "1+1=2")[2].sigmoid()), abs=1e-5)

    def test_a_label_that_is_not_there_or_not_named_is_refused_with_those_there_are(
        self, classifier: str
    ) -> None:
        names = "'negative', 'neutral', 'positive'"
        with pytest.raises(ModelError, match=f"has no label 'good'; it has {names}"):
            resolve_model(RewardModelSpec(model=classifier, label="good"))
        with pytest.raises(ModelError, match=f"has 3 labels.*by 'label': {names}"):
            resolve_model(RewardModelSpec(model=classifier))
