"""Embedding similarity and BERTScore by a tiny encoder, against formulas written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune.rewards.encoder import encoder
from aligntune.rewards.meaning import bertscore, embedding
from tests.e2e.page import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = byte_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 1)]
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def states(model: str, text: str) -> Any:
    """The last hidden states [T + 1, H] of a short text and the end that follows it."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return AutoModel.from_pretrained(model).eval()(input_ids=ids).last_hidden_state[0]


def test_embeddings_are_compared_by_the_cosine_of_their_means(model: str) -> None:
    one, other = states(model, "abc").mean(0), states(model, "xyz").mean(0)
    cosine = float(one @ other / (one.norm() * other.norm()))
    assert embedding(["abc"], model=model, answer=["xyz"]) == [pytest.approx((1 + cosine) / 2)]
    assert embedding(["abc"], model=model, answer=[["xyz", "abc"]]) == [pytest.approx(1.0)]


def test_bertscore_matches_each_token_with_its_nearest(model: str) -> None:
    own, wanted = (
        [state / state.norm() for state in states(model, text)[:-1]] for text in ("abc", "axyz")
    )
    recall = sum(max(float(w @ o) for o in own) for w in wanted) / 4
    precision = sum(max(float(w @ o) for w in wanted) for o in own) / 3
    given = {"model": model, "answer": ["axyz"]}
    assert bertscore(["abc"], measure="recall", **given) == [pytest.approx(recall)]
    assert bertscore(["abc"], measure="precision", **given) == [pytest.approx(precision)]
    f1 = 2 * precision * recall / (precision + recall)
    assert bertscore(["abc"], **given) == [pytest.approx(f1)]


def test_the_answer_itself_is_the_best_and_an_empty_text_has_no_token(model: str) -> None:
    texts = ["four", "five", ""]
    same, other, empty = bertscore(texts, model=model, answer=["four"] * 3)
    assert same == pytest.approx(1.0)
    assert other < same
    assert empty == 0.0


def test_special_tokens_are_left_out_and_a_long_text_is_read_whole(model: str) -> None:
    assert len(encoder(model).words("a" * 50)) == 50  # of a model with 24 positions
    assert len(encoder(model).states("abc")[0]) == 4
    assert len(encoder(model).words("abc")) == 3


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not be loaded .* give option 'model'"):
        bertscore(["a"], model=str(tmp_path / "no"), answer=["b"])
