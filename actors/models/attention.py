"""Attention of packed rows: a row sees itself alone, and no mask over the whole pack is made.

On a GPU in bfloat16 this is torch's attention by variable length, whose kernels come with torch;
elsewhere it is SDPA, row by row. Both cost the sum of the rows' squares; a dense mask costs the
square of the pack. Rows that are padded instead go through SDPA as ever.

Where a pack holds a group's prompt once, its rows are pieces: the prompt, and each completion. The
keys and values of a completion are the prompt's and then its own; its queries are its own.

Shapes: L tokens of a pack, S rows or pieces in it, d width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from actors.models.caps import CAP, attention_of
from actors.models.configuration import ModelError
from actors.specs import ModelSpec

PACKED_ROWS = "packed_rows"  # among the attention implementations of transformers
FLASH = "flash_attention"  # how the names of those begin that read row ends themselves
ANYWHERE = "eager"  # what every model has, on every device
LAYERS = {"full_attention", "sliding_attention"}
AMPERE = (8, 0)  # compute capability from which the kernels run
WIDEST = 256  # d that they take


@dataclass(frozen=True)
class Pieces:
    """How a pack is cut where prompts are shared: a piece sees itself, and the piece before it."""

    lengths: tuple[int, ...]  # [S] tokens
    after: tuple[int | None, ...]  # [S] the piece of a completion's prompt; None: of a prompt

    @property
    def seen(self) -> tuple[int, ...]:
        """[S] tokens that the last token of each piece sees, itself included."""
        return tuple(
            length + (0 if before is None else self.lengths[before])
            for length, before in zip(self.lengths, self.after, strict=True)
        )

    def with_prompts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """[S] keys or values [1, heads, `seen`, d] of each piece, from those [1, heads, L, d] of
        the pack. Splitting and joining gives a gradient in a fixed order of sums."""
        own = tensor.split(self.lengths, dim=2)
        return [
            piece if before is None else torch.cat([own[before], piece], dim=2)
            for piece, before in zip(own, self.after, strict=True)
        ]


_maskless: ContextVar[bool] = ContextVar("maskless", default=False)


def settle(
    packing: bool | Literal["auto"],
    spec: ModelSpec,
    model: Any,
    device: torch.device,
    shared: bool = False,
) -> tuple[bool, str]:
    """Whether rows of `model` (transformers', not yet on its `device`) are packed, and one line on
    how they attend. Where they are, and it can be, the model attends by rows from here on.

    `auto` packs where a kernel by variable length runs, and where prompts are to be `shared`.

    Raises:
        ModelError: prompts are to be shared, which this model's attention cannot do.
    """
    attention = attention_of(spec.attention, model.config)
    against = unfit(model, spec.attention)
    kernel = _kernel(device, spec.dtype)
    own = attention.startswith(FLASH)
    if shared:
        if against is not None:
            raise ModelError(
                f"policy.shared_prompts does not go with model {spec.name!r}: {against}; set "
                "policy.shared_prompts to false"
            )
        packing = True
    if packing == "auto":
        packing = own or (against is None and kernel is not None)
    if not packing:
        return False, f"padded rows, {attention}"
    if own:
        return True, f"packed rows, {attention}"
    if against is not None:
        return True, f"packed rows, {attention} with a dense mask: {against}"
    _register()
    model.set_attn_implementation(PACKED_ROWS)
    prompts = ", prompts shared" if shared else ""
    return True, f"packed rows, {kernel or 'sdpa row by row'}{prompts}"


def unfit(model: Any, attention: str) -> str | None:
    """Why `model` cannot attend by rows here; None where it can."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    other = set(getattr(text, "layer_types", None) or ()) - LAYERS
    if getattr(text, CAP, None):
        return "its attention caps scores"
    if attention != "sdpa":
        return f"model.attention is {attention}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if getattr(text, "kv_lora_rank", None) or any(n.endswith(".sinks") for n in _names(model)):
        return "its attention has sinks or values of another width"
    if other:
        return f"it has layers of {', '.join(sorted(other))}"
    if width > WIDEST or width % 8:
        return f"its heads have a width of {width}"
    return None


def _names(model: Any) -> Iterator[str]:
    return (name for name, _ in model.named_parameters())


def _kernel(device: torch.device, dtype: str) -> str | None:
    """What attends by variable length there; None: nothing does."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    if torch.cuda.get_device_capability(device) < AMPERE:
        return None
    return "attention by variable length (torch)"


def causal_alone(model: Any) -> bool:
    """Whether a padded batch needs no mask: padding comes after all that a row's tokens see, and
    the kernels that take causal rows without a mask are the fast ones."""
    return model.config._attn_implementation in ("sdpa", "eager", PACKED_ROWS)


@contextmanager
def on_its_device(model: Any) -> Iterator[None]:
    """Around a check of `model`, plain or under PEFT, where its weights lie. Flash kernels are of
    GPUs alone: on a CPU, where a model is loaded, one that is to use them attends without."""
    flash = []
    if next(model.parameters()).device.type == "cpu":
        configs = {id(part.config): part.config for part in model.modules() if _attends(part)}
        flash = [(each, each._attn_implementation) for each in configs.values()]
        flash = [(config, used) for config, used in flash if used and "flash" in used]
    try:
        for config, _ in flash:
            config._attn_implementation_internal = ANYWHERE
        yield
    finally:
        for config, used in flash:
            config._attn_implementation_internal = used


def _attends(part: Any) -> bool:
    return hasattr(getattr(part, "config", None), "_attn_implementation_internal")


def row_arguments(
    model: Any, row_ends: torch.Tensor | None, longest: int, pieces: Pieces | None = None
) -> dict[str, Any]:
    """What `model`, from transformers, is told of the rows of a pack; nothing where it looks at the
    positions instead. `row_ends` [S + 1] int32 begins with 0, `longest` is in tokens.

    Raises:
        ValueError: prompts are shared, and the model has an attention that knows nothing of it.
    """
    used = model.config._attn_implementation
    if pieces is not None and used != PACKED_ROWS:
        raise ValueError(f"a pack with shared prompts was given to a model with {used} attention")
    if row_ends is None or not (used == PACKED_ROWS or used.startswith(FLASH)):
        return {}
    told: dict[str, Any] = {
        "cu_seq_lens_q": row_ends,
        "cu_seq_lens_k": row_ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if pieces is not None:
        ends = [0, *accumulate(pieces.seen)]
        told["cu_seq_lens_k"] = torch.tensor(ends, dtype=torch.int32, device=row_ends.device)
        told["pieces"] = pieces
    return told


@contextmanager
def without_mask(arguments: dict[str, Any]) -> Iterator[None]:
    """Around a forward pass with `row_arguments`: no mask is made where there are any."""
    token = _maskless.set(bool(arguments))
    try:
        yield
    finally:
        _maskless.reset(token)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_ROWS, attend)
    AttentionMaskInterface.register(PACKED_ROWS, _mask)


def _mask(*args: Any, **options: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _maskless.get() else sdpa_mask(*args, **options)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int = 0,
    pieces: Pieces | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' layers call it: query [1, heads, L, d], key and value with as many
    heads or fewer; the answer is [1, L, heads, d]. Without row ends it is SDPA.

    Raises:
        ValueError: a layer asks for something that is not done here.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    unknown = [k for k in ("softcap", "s_aux", "position_bias") if options.get(k) is not None]
    if unknown or dropout or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} asks packed rows for {unknown or 'dropout or a mask'}, which "
            "attention by rows does not do: set policy.packing to false"
        )
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if query.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        # Rotary positions of a float32 residual stream make queries and keys float32.
        low = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(low), key.to(low), value.to(low)
    if query.device.type == "cuda" and query.dtype != torch.float32:
        key_ends = cu_seq_lens_q
        if pieces is not None:
            assert cu_seq_lens_k is not None
            key_ends = cu_seq_lens_k
            key, value = (torch.cat(pieces.with_prompts(part), dim=2) for part in (key, value))
        ends = (cu_seq_lens_q, key_ends)
        return _by_length(query, key, value, ends, max_length_q, scaling, window), None
    return _row_by_row(query, key, value, cu_seq_lens_q, scaling, window, pieces), None


def _by_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """`ends` [S + 1] int32 are those of queries and of keys; the last query sees the last key."""
    from torch.nn.attention.varlen import varlen_attn

    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [L, heads, d]
    left = -1 if window is None else window - 1  # a token sees itself and `window` - 1 before it
    found: torch.Tensor = varlen_attn(
        *flat,
        *ends,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        **_fewer_keys(),
    )
    return found[None]


@cache
def _fewer_keys() -> dict[str, bool]:
    """Older versions of torch take fewer heads of keys without being told."""
    from torch.nn.attention.varlen import varlen_attn

    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if known else {}


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_ends: torch.Tensor,
    scaling: float | None,
    window: int | None,
    pieces: Pieces | None = None,
) -> torch.Tensor:
    if pieces is None:
        lengths = row_ends.diff().tolist()
        pieces = Pieces(tuple(lengths), (None,) * len(lengths))
    queries = query.split(pieces.lengths, dim=2)
    found = []
    for q, k, v in zip(queries, pieces.with_prompts(key), pieces.with_prompts(value), strict=True):
        count, seen = q.shape[2], k.shape[2]
        causal = window is None and count == seen
        found.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if causal else _band(count, seen, window, q.device),
                is_causal=causal,
                scale=scaling,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        )
    return torch.cat(found, dim=2).transpose(1, 2).contiguous()


def _band(count: int, seen: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[count, seen] bool, of the last `count` of `seen` tokens: itself and the tokens before it, of
    which it sees `window` - 1."""
    place = torch.arange(seen, device=device)
    back = place[seen - count :, None] - place[None]
    return back >= 0 if window is None else (back >= 0) & (back < window)
