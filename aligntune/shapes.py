"""How large the model of a config is: from its folder, the table, or what a run would load."""

from __future__ import annotations

from pathlib import Path

from actors.specs import LoRASpec, ModelSpec
from aligntune.errors import UserError
from aligntune.paths import located
from cluster.plan.shapes import ModelShape, from_config, from_folder, from_table
from cluster.tables import UnknownName


def known_shape(name: str) -> ModelShape:
    """From the model's folder where there is one, else from the table; nothing is downloaded."""
    folder = Path(located(name))
    if folder.is_dir():
        return from_folder(folder, name)
    if name.startswith(("/", "./", "../", "~")):
        raise UserError(f"model folder {name!r} does not exist")
    return from_table(name)


def adapts_experts(lora: LoRASpec | None) -> bool:
    """Whether experts or routers of a mixture get adapters. PEFT knows them by the names of the
    linear layers that they were."""
    names = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    targets = "all-linear" if lora is None else lora.target_modules
    return targets == "all-linear" or not names.isdisjoint(targets)


def loaded_shape(model: ModelSpec, name: str) -> ModelShape:
    """As `known_shape`, else from the configuration that a run loads; `model` says how.

    Raises UserError where there is none.
    """
    try:
        return known_shape(name)
    except UnknownName:
        from actors.models.configuration import ModelError, configuration

        try:
            found = configuration(model.renamed(name))
        except ModelError as error:
            raise UserError(str(error)) from error
        return from_config(found.to_dict(), name, "from its own configuration")
