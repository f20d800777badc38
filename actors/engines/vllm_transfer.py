"""Weights into vLLM through its weight-transfer interface: what runs inside its worker processes.

vLLM 0.32 imports this module in every worker (it is named as the worker extension), which registers
the `object_store` transfer engine there and ties the worker's life to the actor's.

The rollout actor maps a bundle from Ray's object store without a copy. vLLM's workers are other
processes, so the actor lays the same bytes once into a memory file (`MemoryFile`), which all
workers of the node map. A worker on another node than the actor cannot open it, and the update
fails saying so.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.engines.lifeline import end_with
from actors.transfer.bundle import as_tensor

BACKEND = "object_store"
# Where a worker finds the process id of the rollout actor that it serves.
OWNER_ENV = "ALIGNTUNE_ROLLOUT_PID"


class WorkerExtension:
    """What vLLM's worker gets beside its own; naming it makes vLLM import this module in each."""

    def process_id(self) -> int:
        """Of the process that it works in."""
        return os.getpid()

    def compile_nothing(self) -> None:
        """From now on call what vLLM marks for torch.compile as it is written: an engine that does
        not compile its model still compiles a comparison of log-probs, for seconds."""
        torch.compiler.set_stance("force_eager")


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on before the first update."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights of one version lie: a file, and what is at which of its bytes."""

    path: str
    names: list[str]
    dtypes: list[str]  # torch names
    shapes: list[list[int]]
    offsets: list[int]


class ObjectStoreWeightTransferEngine(
    WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]
):
    """Loads one version's weights, in checkpoint format, into one worker's shard of the model.

    The layer-wise reload repeats what loading from a checkpoint does (fusing, sharding, prepacking
    on CPU) and writes into the storage that captured graphs refer to.
    """

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Open the model for reloading."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._expected = {name for name, _ in self.model.named_parameters()}
        self._memory: np.ndarray | None = None
        _pack_experts_again(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which would synchronise an accelerator that may not be there."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Map the file and load it.

        Raises:
            ValueError: the weights do not cover the model.
        """
        # Layers may hold on to what they were given until the update is finished.
        self._memory = np.memmap(update_info.path, dtype=np.uint8, mode="r")
        self._check_covered(self.model.load_weights(_views(self._memory, update_info)))

    def _check_covered(self, loaded: set[str] | None) -> None:
        """Raise ValueError unless `loaded` are all parameters; None: the model does not say."""
        missing = self._expected - loaded if loaded is not None else set()
        if missing:
            raise ValueError(
                f"the weights do not hold {min(missing)!r} ({len(missing)} such parameters of "
                "vLLM's model); policy and rollout must load the same model"
            )

    def _receive_by(self, engine: Any, update_info: Any) -> None:
        """Have one of vLLM's own engines load a version. Raises ValueError as `receive_weights`."""
        engine.model = loader = _Loader(self.model)
        engine.receive_weights(update_info)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._check_covered(loader.loaded)

    def finish_weight_update(self) -> None:
        """Process what waits for the whole model, and let go of the file."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._memory = None
        _process_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class _Loader:
    """A model to vLLM's own engines, which drop what it says of the weights that they give it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.loaded: set[str] | None = set()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load some, and keep their names; None once the model does not say."""
        said = self._model.load_weights(weights)
        self.loaded = None if said is None or self.loaded is None else self.loaded | said


def _pack_experts_again(model: torch.nn.Module) -> None:
    """Let a mixture's experts on CPU be packed as they are loaded.

    vLLM packs what their kernel has once, as it makes the kernel, and puts plain weights in that
    place at each reload: of another shape, or of another meaning.
    """
    if torch.accelerator.is_available():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None and isinstance(kernel.fused_experts, CPUUnquantizedExperts):
            method.moe_kernel = None  # it makes another one


def _process_tied_head(model: torch.nn.Module) -> None:
    """Let a head that is tied to the embedding see its new weights.

    Nothing is loaded under the head's own name, so the layer-wise reload leaves it alone. Its
    weight is the embedding's storage and already new; but on CPU it computes with a packed copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    embeddings = {
        layer.weight.data_ptr()
        for layer in model.modules()
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    }
    for layer in model.modules():
        if (
            isinstance(layer, ParallelLMHead)
            and isinstance(layer.quant_method, UnquantizedEmbeddingMethod)
            and layer.weight.data_ptr() in embeddings
        ):
            layer.quant_method.process_weights_after_loading(layer)


def _views(memory: np.ndarray, info: ObjectStoreUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) over the mapped file, without a copy."""
    for name, dtype, shape, offset in zip(
        info.names, info.dtypes, info.shapes, info.offsets, strict=True
    ):
        itemsize = getattr(torch, dtype).itemsize
        size = itemsize * int(np.prod(shape, dtype=np.int64))
        yield name, as_tensor(memory[offset : offset + size], dtype).view(shape)


# It warns at every update of each layer that has nothing to load (rotary embeddings, tied heads);
# `receive_weights` raises where something really is missing.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreWeightTransferEngine)
# Its own lock is shared by processes: one that is killed leaves it in the machine's shared memory.
tqdm.set_lock(threading.RLock())
if OWNER_ENV in os.environ and os.environ[OWNER_ENV] != str(os.getpid()):
    end_with(int(os.environ[OWNER_ENV]))
