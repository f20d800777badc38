"""How the workers of a job over a table meet: over the interface that joins their nodes."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch.config import TorchConfig, _TorchBackend

from actors.strategies.process_group import bind_to_route


class RoutedBackend(_TorchBackend):
    """Ray Train's own leaves it to gloo and NCCL, which guess the interface by the host's name."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Bind every worker to the interface that reaches rank 0, then let them meet."""
        address = worker_group.execute_single(0, ray.util.get_node_ip_address)
        worker_group.execute(bind_to_route, address)
        super().on_start(worker_group, backend_config)


class RoutedTorchConfig(TorchConfig):
    """What a TorchTrainer takes to have that backend."""

    @property
    def backend_cls(self) -> type[RoutedBackend]:
        """The class of the backend."""
        return RoutedBackend
