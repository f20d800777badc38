"""Writes the tables of options in docs/ from the settings classes, so that they cannot drift.

    .venv/bin/python scripts/doc_tables.py

Replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`; the prose around is by hand.
A test fails while a table is not what this would write, and where a section has no table.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from actors.engines.specs import VLLMSpec
from actors.settings import OneOf, is_auto
from actors.specs import (
    REWARD_KINDS,
    LoRASpec,
    ModelSpec,
    RoleResources,
)
from aligntune.algorithms import registry
from aligntune.algorithms.base import Algorithm
from aligntune.commands.rewards_shown import markdown as rewards_table
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import ALGORITHMS, PreferenceConfig
from aligntune.config.records import HubSpec
from aligntune.data.spec import SourceSpec
from aligntune.errors import UserError
from aligntune.online.settle_resources import settle_resources
from aligntune.online.work import work_of
from aligntune.shapes import known_shape
from cluster.machines import Machines
from cluster.plan.plan import make_plan
from cluster.resources import described
from cluster.specs import ClusterSpec

AUTO_MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-70B")
AUTO_CLUSTERS = (
    (1, 1, "l4-24gb"),
    (1, 1, "h100-80gb"),
    (1, 8, "h100-80gb"),
    (16, 8, "h100-80gb"),
)
DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
OURS = ("ppo", "grpo", "dapo", "gspo", "drgrpo")
SHARED: dict[type[BaseModel], str] = {
    RoleResources: "resources",
    ModelSpec: "model",
    LoRASpec: "model.lora",
    ClusterSpec: "cluster",
    HubSpec: "hub",
    SourceSpec: "data.train",
}


def sections() -> dict[str, type[BaseModel]]:
    """Every section of both trees by its path; those that several places share have one name."""
    found: dict[str, type[BaseModel]] = {
        "run": RunConfig,
        **{f"rewards.{kind}": spec for kind, spec in REWARD_KINDS.items()},
        "preference": PreferenceConfig,
        **{f"preference.{name}": spec for name, spec in ALGORITHMS.items()},
    }
    waiting: list[tuple[str, type[BaseModel]]] = [
        ("", RunConfig),
        ("preference.", PreferenceConfig),
    ]
    while waiting:
        prefix, model = waiting.pop(0)
        for name, field in model.model_fields.items():
            for choice, spec in _choices(field).items():
                if spec.model_fields.keys() - {"name"}:
                    found[f"{name}.{choice}"] = spec
            section = None if _choices(field) else _section(field.annotation)
            if section is None or name in ("algorithm", "rewards"):
                continue
            path = SHARED.get(section, f"{prefix}{name}")
            if path not in found:
                found[path] = section
                waiting.append((f"{path}.", section))
    return found


@cache
def tables() -> dict[str, str]:
    """Every table by the name that its marker gives it."""
    made = {path: section_table(path, model) for path, model in sections().items()}
    return {
        **made,
        "algorithms": algorithm_table(),
        **{f"algorithms.{name}": options_table(registry.get(name)) for name in OURS},
        "defaults": defaults_table(),
        "auto": auto_table(),
        "rewards": rewards_table(),
    }


def section_table(path: str, model: type[BaseModel]) -> str:
    """Key, type, default and description of every value of a section."""
    prefix = "" if path == "run" else f"{path}."
    rows = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if typing.get_args(field.annotation) == (field.default,):
            continue  # the one value it can have is the name of the section
        if choices := _choices(field):
            kind = ", ".join(f"`{choice}`" for choice in choices)
            default, text = field.default.name, field.description or ""
        elif name in ("algorithm", "rewards"):
            kind, default, text = "section", "", f"see {name}"
        elif section is not None:
            kind, default = "section", _default(field)
            text = f"see {SHARED.get(section, f'{prefix}{name}')}"
        else:
            kind = _type(field.annotation, field.metadata)
            default = "auto" if is_auto(field) else _default(field)
            text = field.description or ""
        rows.append((f"`{name}`", kind, default, text))
    return _markdown(("key", "type", "default", "what it is"), rows)


def _choices(field: FieldInfo) -> Mapping[str, type[BaseModel]]:
    """The settings that a field is one of, by name."""
    marks = (mark.table for mark in field.metadata if isinstance(mark, OneOf))
    return next(marks, {})


def algorithm_table() -> str:
    """Every option of our algorithms, and what it is in each unless it is set."""
    classes = {name: registry.get(name) for name in OURS}
    fields: dict[str, FieldInfo] = {}
    for algorithm in classes.values():
        for name, field in algorithm.model_fields.items():
            fields.setdefault(name, field)
    rows = [
        (
            f"`{name}`",
            _type(field.annotation, field.metadata),
            *(
                _default(of.model_fields[name]) if name in of.model_fields else ""
                for of in classes.values()
            ),
            _first_description(name, Algorithm, *classes.values()),
        )
        for name, field in fields.items()
    ]
    return _markdown(("option", "type", *classes, "what it is"), rows)


def options_table(algorithm: type[Algorithm]) -> str:
    """Every option of one algorithm, its own before those that all have."""
    fields = algorithm.model_fields
    own = [name for name in fields if name not in Algorithm.model_fields]
    rows = [
        (
            f"`{name}`",
            _type(fields[name].annotation, fields[name].metadata),
            _default(fields[name]),
            _first_description(name, Algorithm, algorithm),
        )
        for name in [*own, *(name for name in fields if name not in own)]
    ]
    return _markdown(("option", "type", "default", "what it is"), rows)


def _first_description(option: str, *classes: type[Algorithm]) -> str:
    """What the classes say an option is; a subclass that sets another default may be silent."""
    found = (c.model_fields[option].description for c in classes if option in c.model_fields)
    return next((text for text in found if text), "")


def defaults_table() -> str:
    """What the config falls back to where it is silent, by algorithm."""
    rows = []
    for name in OURS:
        d = registry.get(name).defaults
        rows.append(
            (
                f"`{name}`",
                f"{d.learning_rate:g}",
                str(d.completions_per_group),
                str(d.epochs),
                str(d.minibatches),
                f"{d.adam_betas[0]:g}, {d.adam_betas[1]:g}",
                f"{d.critic_learning_rate:g}" if d.critic_learning_rate else "",
            )
        )
    head = (
        "algorithm",
        "`policy.learning_rate`",
        "`train.completions_per_group`",
        "`train.epochs_per_batch`",
        "mini-batches per step",
        "`policy.adam_betas`",
        "critic's learning rate",
    )
    return _markdown(head, rows)


def auto_table() -> str:
    """What is decided for models and clusters of several sizes, by the function that decides it."""
    rows = []
    for model in AUTO_MODELS:
        config = load_config(
            {
                "algorithm": {"name": "grpo", "beta": 0},
                "model": {"name": model},
                "data": {"path": "data"},
                "rewards": ["math"],
                "rollout": {"max_prompt_length": 512, "max_completion_length": 1024},
                "output_dir": "run",
            }
        )
        assert isinstance(config, RunConfig)
        rows.append((model, *(_decided(config, *cluster) for cluster in AUTO_CLUSTERS)))
    heads = (f"{nodes} x {gpus} {gpu}" for nodes, gpus, gpu in AUTO_CLUSTERS)
    return _markdown(("model", *heads), rows)


def _decided(config: RunConfig, nodes: int, gpus: int, gpu: str) -> str:
    """One cell: who is where, how the model is held, and the step by the plan."""
    cluster = described(nodes, gpus, gpu)
    there = Machines(cluster, 16, here=False)
    try:
        now, _ = settle_resources(config, there=there, shape_of=known_shape)
    except UserError as error:
        short = re.search(r"needs ([\d.]+ GiB) and has ([\d.]+ GiB)", str(error))
        return f"refused: a GPU needs {short[1]}" if short else f"refused: {error}"
    plan = make_plan(work_of(now), cluster)
    options = now.policy.strategy.model_dump()
    held = options.pop("name")
    if held == "deepspeed":
        held = f"ZeRO-{options['stage']}{', offloaded' if options['offload'] else ''}"
    assert isinstance(now.rollout.engine, VLLMSpec)
    shared = any("rollout" in group for group in now.cluster.colocate)
    parts = [
        f"policy {now.policy.ranks} ({held})",
        f"rollouts {now.rollout.replicas} x {now.rollout.engine.shards} on "
        f"{'the same' if shared else 'GPUs of their own'}, "
        f"{now.rollout.engine.gpu_memory_utilization:.0%} of each",
        f"micro-batches of {now.policy.tokens_per_microbatch} tokens",
        *(["checkpointing"] if now.model.gradient_checkpointing else []),
        f"{plan.times.step(0):.3g} s a step",
    ]
    return "; ".join(parts)


def rendered(text: str) -> str:
    """A document with its tables as they are now. KeyError for a marker that names none."""
    made = tables()
    return TABLE.sub(lambda m: f"{m[1]}{made[m['name']]}{m[3]}", text)


def _markdown(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section(part) for part in typing.get_args(annotation))
    return next((section for section in inner if section is not None), None)


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = "".join(
        f" {sign} {getattr(mark, name):g}"
        for mark in _marks(metadata)
        for name, sign in BOUNDS
        if getattr(mark, name, None) is not None
    )
    if origin is Annotated:
        return _type(parts[0], parts[1:])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        kept = [part for part in parts if part is not type(None)]
        if len(kept) == 2 and typing.get_args(kept[1]) == (kept[0],):
            return f"{_type(kept[0], metadata)}; or a list of them"
        return " or ".join(_type(part, metadata) for part in kept)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} x {_type(parts[0])}"
    if origin is dict:
        return "mapping"
    name = {str: "text", bool: "true, false", int: "integer", float: "number"}.get(annotation)
    return (name or str(annotation)) + bounds


def _marks(metadata: Iterable[Any]) -> Iterable[Any]:
    for mark in metadata:
        yield from mark.metadata if isinstance(mark, FieldInfo) else (mark,)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in changed.items())
    return _shown(value)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | dict):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def main() -> None:
    """Write every document anew whose tables have changed."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        now = rendered(text)
        if now != text:
            path.write_text(now, encoding="utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
