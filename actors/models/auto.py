"""transformers and its Auto classes, without what their import need not cost.

`transformers.models.auto` imports it for one function, which completes model classes that come with
a model as code of their own. The import costs more than all the rest, so it waits for that call.
So does the table of all that is installed, which `transformers` makes as it is imported. And what
its 2,000 files of models export, which it finds by reading them all, is found once, not twice.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FACTORY = "transformers.models.auto.auto_factory"


class _Later:
    """Stands for GenerationMixin while the Auto classes are imported."""

    def __init_subclass__(cls) -> None:
        raise ImportError(
            "GenerationMixin was read amid the import of the Auto classes; read again"
        )


class _Distributions(dict[str, list[str]]):
    """Stands for the table of distributions by module.

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


def import_transformers() -> None:
    """Import `transformers` itself: whoever may be the first to do so, calls this. Does nothing
    where it is there already."""
    if "transformers" in sys.modules:
        return
    read_all = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = _Distributions
    try:
        importlib.import_module("transformers")
    finally:
        importlib.metadata.packages_distributions = read_all


@contextmanager
def _models_read_before() -> Iterator[None]:
    """Let `transformers.models` have what `transformers` has found out of its files.

    It asks for the folder by another name, and of the single folders 128 are remembered, of more
    than 400: it would read them all again, half a second of CPU time.
    """
    from transformers.utils import import_utils

    utils: Any = import_utils
    read = utils.create_import_structure_from_path
    models = Path(utils.__file__).parents[1] / "models"
    asked = str(models / "__init__.py")
    utils.create_import_structure_from_path = lambda path: read(models if path == asked else path)
    try:
        yield
    finally:
        utils.create_import_structure_from_path = read


def import_light() -> None:
    """Import the Auto classes. Does nothing where they are there already."""
    if FACTORY in sys.modules:
        return
    import_transformers()
    from transformers import generation

    with _models_read_before():
        importlib.import_module("transformers.models")
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
