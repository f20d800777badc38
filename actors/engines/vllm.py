"""The vLLM rollout engine: AsyncLLM, many groups in flight.

Each token's version label is that of the weights that produced it. An update freezes the requests
in flight between two steps (`pause_generation(mode="keep")`), drops every cached key and value,
theirs too, loads the weights, names the version, and lets go: what follows is computed from the new
weights alone, and vLLM itself records per request at which token the version changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from actors.engines.base import (
    EngineDead,
    Turn,
    WeightMismatch,
    Work,
    completion,
    stop_token_ids,
)
from actors.engines.lifeline import work_of
from actors.engines.specs import COMPILING, VLLMSpec
from actors.engines.vllm_adapter import AdapterFolder, lora_options
from actors.engines.vllm_cause import UNKNOWN, Output
from actors.engines.vllm_options import batch_limits, check_engine_options
from actors.engines.vllm_steps import stat_logger
from actors.messages import Completion, FinishReason, Sampling, VersionSpan
from actors.specs import ModelSpec, RolloutSpec
from actors.transfer.base import Arrival
from actors.transfer.bundle import WeightBundle
from actors.transfer.memory_file import MemoryFile

log = logging.getLogger(__name__)

_CPU_KV_CACHE_GIB = 1.0
_LOOK_S = 1.0  # between two looks at the work of an engine that does not answer
_DEATH_S = 5.0  # for a death to be known after it has failed a call
_AGAIN_S = 0.1  # between two looks for it


class VLLMEngine:
    """A `RolloutEngine` over vLLM 0.32, on GPUs or on CPU."""

    def __init__(
        self,
        model: ModelSpec,
        spec: RolloutSpec,
        version: int,
        sequences: int,
        seed: int,
    ) -> None:
        """Nothing is started yet; `version` is the policy version of the weights in `model.name`.

        `spec.engine.options` are fields of vLLM's AsyncEngineArgs. `sequences` completions are in
        flight at a time. `seed` is the engine's, not a request's: a generator of its own takes a
        request out of vLLM's fast samplers, and on CPU it ends the engine where a prefill is cut.
        """
        self._model = model
        self._spec = spec
        self._vllm = VLLMSpec.model_validate(spec.engine)
        self._sequences = sequences
        self._seed = seed
        self.max_concurrent_groups = spec.max_concurrent_groups  # they are batched together
        self._version = version
        self._work = Work()
        self._updating = asyncio.Lock()
        self._weights = MemoryFile()
        self._broken: str | None = None
        self._stops: tuple[int, ...] = ()
        self._adapter: AdapterFolder | None = None
        self._llm: Any = None
        self._processes: list[int] = []
        self._loading = False  # its processes answer nothing then
        self._on_cpu = False

    @property
    def version(self) -> int:
        """The policy version of the loaded weights."""
        return self._version

    async def start(self) -> None:
        """Start the engine's processes; the event loop stays free meanwhile.

        Raises:
            ValueError: `options` has a name that vLLM does not know, or one that is ours.
            RuntimeError: its processes could not start; the message has what they said.
        """
        output = Output()
        try:
            self._llm = await asyncio.to_thread(self._start)
        except RuntimeError as error:
            if UNKNOWN not in str(error) or (cause := output.cause()) is None:
                raise
            raise RuntimeError(f"vLLM's engine did not start: {cause}") from error
        # vLLM reads its environment as it is imported: never before `_start` has set it.
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest())
        cores = self._llm.engine_core.resources.engine_manager.processes
        workers = await self._llm.collective_rpc("process_id")
        self._processes = sorted({*(core.pid for core in cores), *workers})
        if self._on_cpu and self._llm.vllm_config.model_config.enforce_eager:
            await self._llm.collective_rpc("compile_nothing")
        if self._adapter is not None:
            await self._llm.add_lora(self._adapter.request(load=True))
        await self._llm.update_weight_version(str(self._version))

    @property
    def work(self) -> Work:
        """What it has done since its start."""
        return self._work

    async def sample(
        self, token_ids: np.ndarray, sampling: Sampling, n: int, key: str
    ) -> list[Completion]:
        """`n` completions of `token_ids`, batched with whatever else is in flight.

        What they are depends on that too: no `key` makes vLLM draw the same tokens again.
        """
        return await self._answers(
            [Turn(token_ids, sampling, f"{key}/{index}") for index in range(n)]
        )

    async def sample_turns(self, turns: Sequence[Turn]) -> list[Completion]:
        """A completion of each of `turns`, batched with whatever else is in flight."""
        return await self._answers(turns)

    async def _answers(self, turns: Sequence[Turn]) -> list[Completion]:
        """What all of them give; where one gives nothing, none goes on."""
        await self.check()
        requests = [
            asyncio.ensure_future(self._request(t.token_ids.tolist(), t.sampling, t.key))
            for t in turns
        ]
        try:
            with _deaths_translated():
                return await asyncio.gather(*requests)
        finally:
            for request in requests:
                request.cancel()

    async def load_weights(self, bundle: WeightBundle | Arrival) -> float:
        """Replace the weights under the requests in flight; seconds in which they stand still.

        An update that fails or is cancelled leaves a model in pieces: generation stays frozen, and
        the next `check` or `sample` raises EngineDead.

        Raises:
            WeightMismatch: vLLM could not load the bundle, or what was sent did not arrive.
        """
        async with self._updating:
            await self.check()
            try:
                with _deaths_translated():
                    load = await asyncio.to_thread(self._laid_out, bundle)
                    began, self._loading = time.monotonic(), True
                    await self._llm.pause_generation(mode="keep", clear_cache=True)
                    await load()
                    await self._llm.update_weight_version(str(bundle.version))
                    self._version = bundle.version
                    await self._llm.resume_generation()
                    return time.monotonic() - began
            except BaseException as error:
                reason = str(error) or type(error).__name__
                self._broken = f"weights of version {bundle.version} did not load: {reason}"
                if not isinstance(error, Exception) or isinstance(error, EngineDead):
                    raise
                if not isinstance(error, WeightMismatch):
                    await self._outlives()
                raise WeightMismatch(self._broken) from error
            finally:
                self._loading = False

    async def _outlives(self) -> None:
        """Raise EngineDead where vLLM knows within `_DEATH_S` that it is dead: a worker that dies
        fails the call that waits for it as any error does, and vLLM finds the death after that."""
        with _deaths_translated(), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEATH_S):
                while True:
                    await self._llm.check_health()
                    await asyncio.sleep(_AGAIN_S)

    def _laid_out(self, bundle: WeightBundle | Arrival) -> Callable[[], Awaitable[None]]:
        """Put weights where vLLM's processes read them, unless they come there by themselves; what
        has them do so."""
        if (adapter := self._adapter) is not None:
            assert isinstance(bundle, WeightBundle), "adapters come in bundles"
            adapter.write(bundle)

            async def load_adapter() -> None:
                if not await self._llm.add_lora(adapter.request(load=True)):
                    raise WeightMismatch("vLLM did not take the adapter")

            return load_adapter
        from vllm.distributed.weight_transfer.base import (
            WeightTransferInitRequest,
            WeightTransferUpdateRequest,
        )

        if isinstance(bundle, Arrival):
            self._weights.close()  # a version that was read from the store, by one that came late
            meeting, update = bundle.meeting, bundle.update
        else:
            meeting, update = {}, bundle.where or self._weights.write(bundle)

        async def load_all() -> None:
            if meeting:
                await self._llm.init_weight_transfer_engine(
                    WeightTransferInitRequest(dict(meeting))
                )
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(dict(update)))
            await self._llm.finish_weight_update()

        return load_all

    async def check(self) -> None:
        """Raise EngineDead where the engine's processes are gone or its weights are in pieces."""
        if self._broken is not None:
            raise EngineDead(self._broken)
        with _deaths_translated():
            await self._llm.check_health()

    async def answers(self) -> None:
        """Have the engine's process answer, between two of its steps. One that loads weights, or
        is on CPU, has answered too once its processes have worked: a step may take minutes there,
        and one that hangs does not work. On a GPU one that waits for the GPU does.
        """
        worked = work_of(self._processes)
        asked = asyncio.ensure_future(self._llm.is_sleeping())
        try:
            with _deaths_translated():
                while not (await asyncio.wait((asked,), timeout=_LOOK_S))[0]:
                    if (self._loading or self._on_cpu) and worked():
                        return
                asked.result()
        finally:
            asked.cancel()

    async def close(self) -> None:
        """End the engine's processes."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None
        self._weights.close()
        if self._adapter is not None:
            self._adapter.close()

    def _start(self) -> Any:
        """Set up and import vLLM, then build the engine (tens of seconds)."""
        on_cpu = self._on_cpu = not torch.accelerator.is_available()
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if on_cpu:
            # vLLM would pin its threads to the first cores, the same ones for every replica.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            if self._vllm.tensor_parallel_size == 1:
                # On CPU this only says that the worker may live in the engine's process: one less
                # that imports vLLM.
                os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options = dict(self._vllm.options)
        compiler = os.environ.get("CXX") or "g++"
        if on_cpu and shutil.which(compiler) is None:
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            if self._vllm.compiles or options.get("enforce_eager") is False:
                log.warning("no %s on PATH: vLLM compiles nothing; install g++", compiler)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.engines.vllm_transfer import OWNER_ENV
        from actors.models.configuration import local

        # Where vLLM was imported before this, it has read another level.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
        os.environ[OWNER_ENV] = str(os.getpid())
        check_engine_options(options, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
        if self._vllm.kv_cache_gib is not None or on_cpu:
            gib = self._vllm.kv_cache_gib or _CPU_KV_CACHE_GIB
            options.setdefault("kv_cache_memory_bytes", int(gib * 2**30))
        options.setdefault("enable_prefix_caching", True)
        most = AsyncEngineArgs.get_batch_defaults(self._vllm.tensor_parallel_size)
        most_tokens, most_sequences = (limits[UsageContext.LLM_CLASS] for limits in most)
        options = batch_limits(self._spec, self._sequences, most_sequences, most_tokens, options)
        if on_cpu and not self._vllm.compiles and options.keys().isdisjoint(COMPILING):
            options["enforce_eager"] = True
        if self._vllm.tensor_parallel_size > 1:
            # All shards live beside the actor, on the devices that Ray gave it.
            options.setdefault("distributed_executor_backend", "mp")
        if self._spec.weight_sync.name == "adapter" and self._model.lora is not None:
            options |= lora_options(self._model.lora)
            self._adapter = AdapterFolder(self._model)
        self._stops = stop_token_ids(self._model)
        model, workers = local(self._model), self._spec.weight_sync.vllm_workers
        arguments = AsyncEngineArgs(
            model=model.name,
            revision=model.revision,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            max_model_len=self._spec.max_length,
            tensor_parallel_size=self._vllm.tensor_parallel_size,
            gpu_memory_utilization=self._vllm.gpu_memory_utilization,
            seed=self._seed,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # sampling is ours, not the model folder's
            skip_tokenizer_init=True,
            disable_log_stats=True,  # but for the logger below
            weight_transfer_config={"backend": importlib.import_module(workers).BACKEND},
            worker_extension_cls=f"{workers}.WorkerExtension",
            **options,
        )
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[stat_logger(self._observe)])

    async def _request(self, prompt: list[int], sampling: Sampling, name: str) -> Completion:
        """One completion."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,  # one list of numbers, not a dict for each token
            stop_token_ids=list(self._stops),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # A call that is made again must not meet the requests of its first try.
        stream = self._llm.generate(
            {"prompt_token_ids": prompt},
            params,
            request_id=f"{name}-{uuid.uuid4().hex}",
            lora_request=None if self._adapter is None else self._adapter.request(),
        )
        async for result in stream:
            if result.finished:
                return _completion(name, result.outputs[0])
        raise EngineDead(f"completion {name}: vLLM ended a request without a result")

    def _observe(self, scheduler: Any, iteration: Any) -> None:
        """Count one step of vLLM's; see `stat_logger`."""
        if scheduler is not None:
            self._work = self._work.after(
                0 if iteration is None else iteration.num_generation_tokens,
                scheduler.num_running_reqs,
                scheduler.num_waiting_reqs,
                scheduler.kv_cache_usage,
            )


def _completion(name: str, output: Any) -> Completion:
    reasons = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
    if output.finish_reason not in reasons:
        raise RuntimeError(
            f"completion {name}: vLLM ended it as {output.finish_reason!r} instead of generating it"
        )
    return completion(
        output.token_ids,
        output.logprobs.logprobs,
        reasons[output.finish_reason],
        tuple(
            VersionSpan(int(span.version), span.end - span.start) for span in output.weight_versions
        ),
    )


@contextlib.contextmanager
def _deaths_translated() -> Iterator[None]:
    """vLLM's EngineDeadError as ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDead(f"vLLM's engine process died: {error}") from error
