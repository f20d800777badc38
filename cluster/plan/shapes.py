"""The sizes of a model: from its own config.json, or from the shipped table of public models.

Nothing is downloaded and no weight is read. Counts are of parameters; a decoder of the Llama family
is assumed (gated MLP, RMSNorm), with experts or with compressed attention (MLA) where the config
says so. Where a folder has safetensors files their heads give the exact count instead, unless they
are quantised: several weights are packed into one element then.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cluster.tables import DATA, UnknownName, nearest

# What is put behind the names of one model's variants, all of one shape. How weights are packed
# stands last, so it goes first.
PACKED = ("unsloth-bnb-4bit", "bnb-4bit")
VARIANTS = (
    "instruct",
    "base",
    "chat",
    "it",
    "hf",
    "instruct-2507",
    "thinking-2507",
    "0324",
    "0528",
)
NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "vocabulary": ("vocab_size",),
}
# fmt: off
ADAPTED_EXPERTS = frozenset((
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa",
    "hunyuan_v1_moe", "longcat_flash", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "solar_open",
))
# fmt: on
"""Types of models whose experts and routers PEFT takes for linear layers too."""
CLASSIFIERS = ("ForSequenceClassification", "RewardModel")
"""How the names of architectures end that have a score in place of logits."""


class BadModelConfig(ValueError):
    """A config.json that does not say how large the model is."""


@dataclass(frozen=True)
class ModelShape:
    """What memory and time follow from."""

    name: str
    parameters: int  # all of them, tied ones once
    active: int  # that one token meets, the input embedding left out
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    head_dim: int  # of a query
    kv_elements: int  # keys and values that one token leaves behind, over all layers
    kv_heads: int  # over which shards divide the cache; MLA has one vector for all
    mlp: int  # width of the MLP that one token meets: of its experts together
    linear: tuple[tuple[int, int], ...]  # (in, out) of every linear layer but the head, for LoRA
    adapted: int  # elements that adapters of rank 1 have on experts and routers, over all layers
    experts: float  # share of the weights of expert layers that one token meets; 1 if dense
    routed: float  # experts that one token is sent to in a layer, in the mean; 0 if dense
    expert_parameters: int  # in routed experts
    tied: bool
    source: str  # where the sizes are from
    caps: bool = False  # scores of its attention, which is eager then: SDPA would not

    def lora_parameters(self, rank: int, experts: bool = True) -> int:
        """Of adapters on every linear layer: rank * (in + out) each (Hu et al. 2021, 4.1). With
        `experts` each has its own, of twice the rank on its two halves: one weight to PEFT."""
        more = self.adapted if experts else 0
        return rank * (more + sum(rows + columns for rows, columns in self.linear))

    @property
    def shards(self) -> tuple[int, ...]:
        """Tensor-parallel sizes with which vLLM starts: each shard has as many query heads, and
        keys and values of as many whole heads, or all of them one head that they repeat."""
        return tuple(
            n
            for n in range(1, self.heads + 1)
            if self.heads % n == 0 and 0 in (self.kv_heads % n, n % self.kv_heads)
        )

    def uneven(self, setting: str) -> str:
        """One line on a `setting` that makes none of `shards`."""
        *most, last = map(str, self.shards)
        fit = f"{', '.join(most)} or {last}" if most else last
        return (
            f"{setting}: vLLM gives each GPU of a replica as many of the {self.heads} attention "
            f"heads ({self.kv_heads} of keys and values) of {self.name}; use {fit}"
        )

    def keeps_scores(self, attention: str) -> bool:
        """Whether its attention keeps a matrix of scores where `attention` is asked for."""
        return attention == "eager" or (attention == "sdpa" and self.caps)


def from_config(config: Mapping[str, Any], name: str, source: str) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        BadModelConfig: a size is missing.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    sizes = {key: _first(config, names, key, name) for key, names in NAMES.items()}
    hidden, layers, heads = sizes["hidden_size"], sizes["layers"], sizes["heads"]
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    inner = int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)
    attention, kv_width, query_dim = _attention(config, hidden, heads, kv_heads, head_dim)
    gated = 1 if config.get("model_type") in ("gpt2", "opt", "gpt_neox", "phi", "falcon") else 2
    mlp = [(hidden, inner)] * gated + [(inner, hidden)]

    routed = int(_either(config, "num_experts", "num_local_experts", "n_routed_experts") or 0)
    chosen = int(config.get("num_experts_per_tok") or 0)
    dense_layers = int(config.get("first_k_dense_replace") or 0) if routed else layers
    width = int(config.get("moe_intermediate_size") or inner)
    shared_width = width * int(config.get("n_shared_experts") or 0)
    expert = [(hidden, width)] * gated + [(width, hidden)]
    shared = [(hidden, shared_width)] * gated + [(shared_width, hidden)] if shared_width else []
    sparse_layers = layers - dense_layers

    # Experts are fused tensors, so no linear layers.
    linear = attention * layers + mlp * dense_layers + shared * sparse_layers
    in_experts = sparse_layers * routed * _count(expert)
    router = sparse_layers * hidden * routed
    adapted = 0
    if routed and config.get("model_type") in ADAPTED_EXPERTS:
        halves, down = 2 * (hidden + 2 * width), width + hidden
        adapted = sparse_layers * (routed * (halves + down) + hidden + routed)
    norms = _norms(config, hidden, head_dim) * layers + hidden
    biases = _biases(config, heads, kv_heads, head_dim) * layers
    embedding = sizes["vocabulary"] * hidden
    tied = bool(config.get("tie_word_embeddings", False))
    body = _count(linear) + router + norms + biases
    share = chosen / routed if routed else 1.0
    return ModelShape(
        name=name,
        parameters=body + in_experts + embedding * (1 if tied else 2),
        active=int(body + in_experts * share) + embedding,
        layers=layers,
        hidden=hidden,
        vocabulary=sizes["vocabulary"],
        heads=heads,
        head_dim=query_dim,
        kv_elements=kv_width * layers,
        kv_heads=1 if config.get("kv_lora_rank") else kv_heads,
        mlp=(inner * dense_layers + (chosen * width + shared_width) * sparse_layers) // layers,
        linear=tuple(linear),
        adapted=adapted,
        experts=share,
        routed=chosen * sparse_layers / layers,
        expert_parameters=in_experts,
        tied=tied,
        source=source,
        caps=bool(config.get("attn_logit_softcapping")),
    )


def _attention(
    config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[list[tuple[int, int]], int, int]:
    """Linear layers of one attention block, kept elements a token, and a query's size.

    MLA keeps one compressed vector and one rotary key a token (DeepSeek-V2, 2405.04434, 2.1).
    """
    rank = config.get("kv_lora_rank")
    if not rank:
        width = heads * head_dim
        kv = kv_heads * head_dim
        return [(hidden, width), (hidden, kv), (hidden, kv), (width, hidden)], 2 * kv, head_dim
    rope, nope = int(config["qk_rope_head_dim"]), int(config["qk_nope_head_dim"])
    value = int(config["v_head_dim"])
    query = heads * (rope + nope)
    low = config.get("q_lora_rank")
    queries = [(hidden, int(low)), (int(low), query)] if low else [(hidden, query)]
    keys = [(hidden, int(rank) + rope), (int(rank), heads * (nope + value))]
    return [*queries, *keys, (heads * value, hidden)], int(rank) + rope, rope + nope


def _norms(config: Mapping[str, Any], hidden: int, head_dim: int) -> int:
    """Norm weights of a layer."""
    kind = str(config.get("model_type", ""))
    around = 4 if kind.startswith(("gemma2", "gemma3")) else 2
    queries = 2 * head_dim if kind.startswith(("qwen3", "gemma3")) else 0
    return around * hidden + queries


def _biases(config: Mapping[str, Any], heads: int, kv_heads: int, head_dim: int) -> int:
    """Attention biases of a layer; those of experts are too few to count."""
    qkv = (heads + 2 * kv_heads) * head_dim
    return qkv if config.get("model_type") in ("qwen2", "gpt_oss", "qwen2_moe") else 0


def _count(layers: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in layers)


def _either(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key)), None)


def _first(config: Mapping[str, Any], keys: tuple[str, ...], size: str, name: str) -> int:
    found = _either(config, *keys)
    if not isinstance(found, int):
        raise BadModelConfig(
            f"the config.json of model {name!r} has no {keys[0]}, so its {size.replace('_', ' ')} "
            "is not known; a plan needs a decoder-only language model"
        )
    return found


def from_folder(folder: Path, name: str) -> ModelShape:
    """The shape of a local model; parameters counted over its safetensors files where it has them,
    but for the head of a classifier, in whose place others have a table of the vocabulary or none.

    Raises:
        BadModelConfig: there is no config.json, it is not JSON, or it lacks a size; or a file with
            weights that is there, or that the index names, cannot be read.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModelConfig(f"{path} cannot be read: {error}") from error
    shape = from_config(config, name, str(path))
    if config.get("quantization_config"):
        return shape
    tensors = [each for path in _weights(folder) for each in _tensors(path)]
    exact = sum(map(math.prod, tensors))
    if not exact:
        return shape
    if any(each.endswith(CLASSIFIERS) for each in config.get("architectures") or ()):
        exact -= shape.hidden
    table = shape.vocabulary * shape.hidden
    tables = tensors.count([shape.vocabulary, shape.hidden])
    tied = tables == 1 if tables else shape.tied  # a config may leave its family's default out
    counted = shape.parameters + (shape.tied - tied) * table
    active = round(shape.active * exact / counted)
    return replace(shape, parameters=exact, active=active, tied=tied)


def _weights(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: one, else those of the index. Others, such as
    consolidated.safetensors, are copies."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadModelConfig(f"{index} cannot be read: {error!r}") from error
    return [folder / name for name in sorted(names)]


def _tensors(path: Path) -> list[list[int]]:
    """The sizes of the tensors of a safetensors file, whose head is a length and JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(min(length, path.stat().st_size)))
    except (OSError, ValueError, struct.error) as error:
        raise BadModelConfig(f"{path} cannot be read: {error}") from error
    return [head[key]["shape"] for key in head if key != "__metadata__"]


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    table: dict[str, Mapping[str, Any]] = json.loads((DATA / "models.json").read_text())["models"]
    return table


def from_table(name: str) -> ModelShape:
    """The shape of a public model by its hub name, of a variant too (…-Instruct).

    Raises:
        UnknownName: the table does not have it; names the nearest that it has.
    """
    by_key = {_key(known): known for known in _table()}
    by_last = {_key(known.rpartition("/")[2]): known for known in _table()}
    found = by_key.get(_key(name)) or by_last.get(_key(name.rpartition("/")[2]))
    if found is None:
        raise UnknownName(
            f"the shape of model {name!r} is not known; {nearest(name, _table())} or give a local "
            "folder with its config.json"
        )
    row = _table()[found]
    config = _table()[row["same_as"]]["config"] if "same_as" in row else row["config"]
    return from_config(config, name, f"the table of public models ({found})")


def _key(name: str) -> str:
    """A name in lower case without what tells variants of one shape apart."""
    key = name.lower().replace("meta-llama-3", "llama-3")
    for variant in (*PACKED, *sorted(VARIANTS, key=len, reverse=True)):
        key = key.removesuffix(f"-{variant}")
    return key
