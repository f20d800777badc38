"""Hidden states of an encoder, a local folder or hub name, for rewards that compare meaning.

A text beyond the model's positions is read in windows, and none of it is left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from actors.models.auto import import_transformers
from actors.models.caps import caps_scores

SPARE = 2  # positions that some encoders keep for padding
CACHED = 64  # texts whose states are kept; the answers of one group come one after the other


class Encoder:
    """A loaded encoder, in float32 on the CPU."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._window = int(getattr(model.config, "max_position_embeddings", 512)) - SPARE
        self.states = lru_cache(maxsize=CACHED)(self._states)

    def _states(self, text: str) -> tuple[Any, Any]:
        """The last hidden states of a text's tokens [T, H], and which are special tokens [T]."""
        import torch

        windows = self._tokenizer(
            [text], truncation=True, max_length=self._window, return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )  # fmt: skip
        states, special = [torch.zeros(0, self._model.config.hidden_size)], []
        with torch.no_grad():
            for ids, mask in zip(windows["input_ids"], windows["special_tokens_mask"], strict=True):
                if ids:
                    inputs = torch.tensor([ids])
                    states.append(self._model(input_ids=inputs).last_hidden_state[0])
                    special += mask
        return torch.cat(states), torch.tensor(special, dtype=torch.bool)

    def mean(self, text: str) -> Any:
        """The mean of a text's states [H]; zeros where it has no tokens."""
        states, _ = self.states(text)
        return states.mean(0) if len(states) else states.new_zeros(states.shape[1])

    def words(self, text: str) -> Any:
        """The states of a text's own tokens [T, H], each of length 1, without special tokens."""
        import torch

        states, special = self.states(text)
        return torch.nn.functional.normalize(states[~special], dim=1)


@lru_cache(maxsize=1)
def encoder(name: str) -> Encoder:
    """The encoder of a local folder or hub name. Raises ValueError."""
    import torch

    import_transformers()
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        attention = "eager" if caps_scores(AutoConfig.from_pretrained(name)) else None
        model = AutoModel.from_pretrained(
            name, dtype=torch.float32, attn_implementation=attention
        ).eval()
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"the embedding model {name!r} could not be loaded ({str(error).splitlines()[0]}); "
            "give option 'model' a local folder or the hub name of an encoder"
        ) from error
    return Encoder(tokenizer, model)


def similarity(name: str, one: str, other: str) -> float:
    """(1 + cosine) / 2 of the mean states of two texts, 0 to 1. Raises ValueError."""
    import torch

    model = encoder(name)
    cosine = torch.nn.functional.cosine_similarity(model.mean(one), model.mean(other), dim=0)
    return min(1.0, max(0.0, (1 + float(cosine)) / 2))
