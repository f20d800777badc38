"""What vLLM's workers import in place of `actors.engines.vllm_nccl`, on a CPU."""

from __future__ import annotations

from tests.actors.transfer.without_gpu import stand_in

stand_in(setattr)

from actors.engines.vllm_nccl import BACKEND as BACKEND  # noqa: E402
from actors.engines.vllm_nccl import WorkerExtension as WorkerExtension  # noqa: E402
