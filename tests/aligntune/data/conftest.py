"""Tokenizers made on the spot: one token a byte, with a chat template and without."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, template: str | None = None, bos: bool = False, eos: bool = False) -> Any:
    """One token a UTF-8 byte; with `bos`, behind a beginning-of-sequence token, and with `eos`
    before an end-of-sequence token."""
    vocabulary = {"<bos>": 0, "<eos>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos or eos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}",
            special_tokens=[("<bos>", 0), ("<eos>", 1)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", model_max_length=64
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def plain() -> Any:
    """Without a chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat() -> Any:
    """With a chat template, which refuses the role tool."""
    return byte_tokenizer(template=TEMPLATE)


@pytest.fixture(scope="session")
def plain_bos() -> Any:
    """Without a chat template; adds a beginning-of-sequence token."""
    return byte_tokenizer(bos=True)
