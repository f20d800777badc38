"""transformers' Auto classes, without its generation code before somebody needs that.

`transformers.models.auto` imports it for one function, which completes model classes that come with
a model as code of their own. The import costs more than all the rest, so it waits for that call.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

FACTORY = "transformers.models.auto.auto_factory"


class _Later:
    """Stands for GenerationMixin while the Auto classes are imported."""

    def __init_subclass__(cls) -> None:
        raise ImportError(
            "GenerationMixin was read amid the import of the Auto classes; read again"
        )


class _Distributions(dict[str, list[str]]):
    """Stands for the table of distributions by module, which transformers makes as it is imported.

    Reading every distribution's files takes 1.4 s of CPU time (the import 7.6 s with it, 6.2 s
    without: medians of nine fresh processes each, on a busy machine), so the table is filled when
    it is asked for a module whose distribution may have another name.
    """

    SAME_NAME = ("torch", "accelerate", "mistral_common")  # transformers tries a module's own name

    def get(self, module: str, default: Any = None) -> Any:
        """The distributions that have `module`, if any."""
        if not self and module not in self.SAME_NAME:
            self.update(importlib.metadata.packages_distributions())
        return super().get(module, default)


def import_light() -> None:
    """Import the Auto classes. Does nothing where they are there already."""
    if FACTORY in sys.modules:
        return
    read_all = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = _Distributions
    try:
        from transformers import generation
    finally:
        importlib.metadata.packages_distributions = read_all

    names = vars(generation)  # of a lazy module, which looks up anew what is not here
    names["GenerationMixin"] = _Later
    try:
        from transformers.models.auto import auto_factory
    finally:
        del names["GenerationMixin"]

    factory: Any = auto_factory
    complete = factory.add_generation_mixin_to_remote_model

    def add_generation_mixin_to_remote_model(model_class: Any) -> Any:
        factory.GenerationMixin = generation.GenerationMixin
        return complete(model_class)

    factory.add_generation_mixin_to_remote_model = add_generation_mixin_to_remote_model
