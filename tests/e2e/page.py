"""Local stand-ins for the models and data that the page's six examples name, made here alone.

Their tokenizer reads any text, a byte a token, and their data have the form and the oddities of
human preference transcripts: several turns, equal sides, an empty side, one row of thousands of
tokens, CRLF and single line ends.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

PACKED = "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"
WHOLE = "unsloth/Llama-3.2-1B-Instruct"  # the same weights, as its owner has them too
LONG = 3000  # tokens of the one long row
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a UTF-8 byte, behind the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|pad|>": 0, "<|end|>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left"
    )
    tokenizer.chat_template = template
    return tokenizer


def write_page_models(root: Path) -> None:
    """The four models of the page under their names, of a few thousand parameters each; that one
    of them is packed by bitsandbytes, and its whole weights lie beside it."""
    import torch
    from transformers import (
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    tokenizer = byte_tokenizer()
    common = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "dtype": "float32",
    }
    made = {
        "Qwen/Qwen3-0.6B": (Qwen3ForCausalLM, Qwen3Config(**common, head_dim=32)),
        "Qwen/Qwen2-1.5B-Instruct": (Qwen2ForCausalLM, Qwen2Config(**common)),
        WHOLE: (LlamaForCausalLM, LlamaConfig(**common)),
        "your-reward-model": (
            LlamaForSequenceClassification,
            LlamaConfig(**common, num_labels=1),
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, (model, config) in made.items():
            model(config).float().save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    packed = LlamaForCausalLM.from_pretrained(
        root / WHOLE, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    packed.save_pretrained(root / PACKED)
    tokenizer.save_pretrained(root / PACKED)


def preference_rows(rows: int = 150, seed: int = 0) -> list[dict[str, str]]:
    """Rows `chosen` and `rejected` in the form of hh-rlhf, every tenth of them odd in some way."""
    rng = random.Random(seed)
    words = ["what", "where", "how", "why", "can", "find", "make", "drive", "a", "car", "cake"]

    def say(least: int, most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))

    made = []
    for row in range(rows):
        turns = [f"\n\nHuman: {say(2, 6)}?\n\nAssistant: {say(2, 6)}." for _ in range(row % 3)]
        start = "".join(turns) + f"\n\nHuman: {say(3, 8)}?\n\nAssistant:"
        chosen, rejected = f" Yes, {say(3, 9)}.", f" No, {say(3, 9)}."
        match row:
            case 10 | 60:
                rejected = chosen
            case 20:
                rejected = ""
            case 30:
                start = f"\n\nHuman: {'why ' * (LONG // 4)}\n\nAssistant:"
        sides = {"chosen": start + chosen, "rejected": start + rejected}
        if row in (40, 41):
            sides = {name: text.replace("\n", "\r\n") for name, text in sides.items()}
        if row in (50, 51):
            sides = {name: text.replace("\n\n", "\n") for name, text in sides.items()}
        made.append(sides)
    return made


def write_page_data(root: Path) -> None:
    """The data of the page under their name, as the hub has them: a folder with a train split."""
    folder = root / "Anthropic" / "hh-rlhf"
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in preference_rows()]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
