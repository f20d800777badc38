"""The tiny model and tokenizer that the quickstart's tasks share, and a step of their warm-up.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
VOCABULARY_SIZE = 128  # a multiple of 64, to which vLLM pads anyway


def tiny_tokenizer(
    special: Sequence[str], chat_template: str, positions: int, pieces: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, one each of `special` and one each of the texts
    `pieces`; it ends turns by `END`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END, UNKNOWN, *special]
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    # Every id the model can sample has a token, so that no engine meets one it cannot decode.
    spare = VOCABULARY_SIZE - len(special) - len(characters) - len(pieces)
    special += [f"<|reserved_{i}|>" for i in range(spare)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), "[\\s\\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[t for t in special if t not in (PAD, END, UNKNOWN)],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=positions,
    )


def tiny_model(seed: int, tokenizer: PreTrainedTokenizerFast, positions: int) -> PreTrainedModel:
    """A Qwen3 of 0.34M parameters in float32, initialised by `seed`; global RNG state is kept."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,  # the smallest that vLLM's attention on CPU takes
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, so that results do not depend on the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def logits_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of left-padded rows; all arguments are [B, T]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits


def supervised_loss(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy over the targets; all arguments are [B, T]."""
    import torch

    logits = logits_of(model, ids, mask)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
