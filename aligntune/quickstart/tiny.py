"""The tiny model and tokenizer that the quickstart's tasks share, and a step of their warm-up.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.models.auto import import_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
VOCABULARY_SIZE = 128  # a multiple of 64, to which vLLM pads anyway


@dataclass(frozen=True)
class Assets:
    """The files of a quickstart's task under `root`, by their one name."""

    root: Path

    @property
    def model(self) -> Path:
        """Folder in Hugging Face format."""
        return self.root / "model"

    @property
    def train(self) -> Path:
        """JSONL: prompt (the agent's are messages), answer."""
        return self.root / "train.jsonl"

    @property
    def eval(self) -> Path:
        """As `train`, of the held-out questions."""
        return self.root / "eval.jsonl"

    @property
    def pairs(self) -> Path:
        """JSONL: prompt, chosen, rejected; of the training questions. The agent has none."""
        return self.root / "pairs.jsonl"

    @property
    def eval_pairs(self) -> Path:
        """As `pairs`, of the held-out questions."""
        return self.root / "eval_pairs.jsonl"

    @property
    def accuracy(self) -> Path:
        """JSON: held-out, greedy, after the warm-up. It is written last: where it is, all is."""
        return self.root / "accuracy.json"


def tiny_tokenizer(
    special: Sequence[str], chat_template: str, positions: int, pieces: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, one each of `special` and one each of the texts
    `pieces`; it ends turns by `END`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    import_transformers()
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


@dataclass(frozen=True)
class WarmUp:
    """How long supervised learning goes on, and where it may stop: with something known and
    something to learn."""

    decay_steps: int
    every: int  # steps between two looks at what is reached, from three quarters of `decay_steps`
    window: tuple[float, float]  # held-out greedy success
    settled: float  # least share of held-out answers that are one of the teacher's
    max_steps: int

    def run(
        self,
        model: PreTrainedModel,
        batch_of: Callable[[random.Random], Sequence[torch.Tensor]],
        reached: Callable[[], tuple[float, float]],
        seed: int,
    ) -> float:
        """Learn, in place, from `batch_of`'s ids, masks and targets until `reached` gives a success
        in the window and a settled share; returns the success. On one thread, so that the weights
        do not depend on the number of cores.

        Raises:
            RuntimeError: that point was not reached in `max_steps`.
        """
        import torch

        rng = random.Random(seed)
        peak, last = 4e-3, (0.0, 0.0)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01
        )
        with one_thread():
            for step in range(1, self.max_steps + 1):
                # Up over 30 steps, down to a tenth from the middle of `decay_steps`: low rates even
                # out the odds between two answers, which decide how much there is for RL to find.
                rate = min(1.0, step / 30, max(0.1, 2 * (1 - step / self.decay_steps)))
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
                loss = supervised_loss(model, *batch_of(rng))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if step >= self.decay_steps * 3 // 4 and step % self.every == 0:
                    last = reached()
                    if self.window[0] <= last[0] <= self.window[1] and last[1] >= self.settled:
                        return last[0]
        raise RuntimeError(
            f"the quickstart's warm-up did not settle in {self.max_steps} steps with seed {seed}: "
            f"held-out success {last[0]:.2f} (wanted {self.window[0]} to {self.window[1]}), "
            f"answers settled {last[1]:.2f} (wanted {self.settled}); choose another seed"
        )


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
