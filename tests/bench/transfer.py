"""What a version of the weights costs on its way from the policy to the replicas.

bytes     of a whole version, of changes of 1 and 99 %, and of an adapter: counted
copies    hand-overs that do not share memory, with each engine: counted
cpu       processor milliseconds of rank 0, and of each replica before its engine pauses and while
          it loads: 1 to 500 MB in bfloat16 and 1 to 4 replicas; median of 7 rounds, ways by turns
parts     what changes of 1 % cost both sides, apart, and the least that finding them can: a pass
          that compares both versions and keeps nothing; 100 and 500 MB, as above
pause     how long vLLM stands still under requests in flight, over its load alone: median of 5

Rank 0's work is the policy's own (`WeightBundle.lend`, `Exports`), a replica's the rollout actor's
(`Held`, `MemoryFile`, an adapter's file) and a copy into parameters of its own, which stands for an
engine's load. In place of Ray's store stands memory that is kept, into which buffers are copied out
of a pickle as Ray does.

    python -m tests.bench transfer          also as: make bench NAME=transfer
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from actors.transfer.bundle import WeightBundle, as_array, as_tensor
from actors.transfer.delta import Change, Exports, WeightDelta, of_changes, put, words
from actors.transfer.delta import update as become
from actors.transfer.digest import of_all, of_part
from actors.transfer.held import Held
from actors.transfer.memory_file import MemoryFile
from tests.bench.report import Measured, Target

MB = 10**6
CASES = ((1, 1), (24, 1), (100, 1), (100, 2), (100, 4), (500, 1))  # megabytes, replicas
ROUNDS = 7
COMPARED = 1 << 15  # words of 8 bytes at a time, so that their flags stay in a core's cache
PIECE = 4 * MB  # elements of a parameter
ADAPTER = 0.036  # bytes over the model's: rank 16 on all linear layers of Qwen2.5-0.5B, in float32

Tensors = dict[str, torch.Tensor]


def weights(megabytes: float, seed: int = 0) -> Tensors:
    """Parameters in bfloat16, of so many bytes together."""
    draw = torch.Generator().manual_seed(seed)
    left, made = int(megabytes * MB / 2), {}
    while left:
        size = min(left, PIECE)
        numbers = torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
        made[f"model.layers.{len(made)}.weight"] = numbers
        left -= size
    return made


def update(tensors: Tensors, fraction: float, seed: int) -> None:
    """Set about this fraction of elements to another number, in place."""
    draw = np.random.default_rng(seed)
    for tensor in tensors.values():
        raw = tensor.view(-1).view(torch.uint16).numpy()
        raw[draw.random(raw.size, dtype=np.float32) < fraction] ^= 1


def adapter(megabytes: float) -> Tensors:
    """An adapter of a model of so many bytes."""
    size = max(int(megabytes * MB * ADAPTER / 4), 1)
    return {"model.layers.0.lora_A.default.weight": torch.randn(size)}


def sizes(megabytes: float) -> dict[str, float]:
    """Bytes of what is sent over those of the weights."""
    tensors = weights(megabytes)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    exports, found, version = Exports(), {}, 1
    exports.take(version, tensors.items(), None)
    for percent in (1, 99):
        update(tensors, percent / 100, percent)
        sent = exports.take(version + 1, tensors.items(), version)
        found[f"bytes/delta_{percent}"] = len(pickle.dumps(sent, protocol=5)) / whole
        version += 1
    full = pickle.dumps(WeightBundle.lend(1, tensors.items()), protocol=5)
    found["bytes/full"] = len(full) / whole
    lora = pickle.dumps(WeightBundle.lend(1, adapter(megabytes).items()), protocol=5)
    found["bytes/adapter"] = len(lora) / whole
    return found


def copies(megabytes: float = 1) -> dict[str, float]:
    """Hand-overs of a whole version that share no memory with the one before."""
    tensors = weights(megabytes)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(
        WeightBundle.lend(1, tensors.items()), protocol=5, buffer_callback=buffers.append
    )
    stored = [bytes(each) for each in buffers]  # as Ray does
    arrived = pickle.loads(data, buffers=stored)
    file = MemoryFile()
    views = file.views(file.write(arrived), arrived)
    name = next(iter(tensors))
    places = {
        "parameter": tensors[name].view(torch.uint16).numpy(),
        "pickled": np.frombuffer(buffers[0], np.uint16),
        "store": np.frombuffer(stored[0], np.uint16),
        "arrived": arrived.arrays[name],
        "file": views[name],
    }
    read = next(iter(dict(arrived.items()).values())).view(torch.uint16).numpy()  # by an engine

    def moved(path: list[np.ndarray]) -> int:
        return sum(not np.shares_memory(*pair) for pair in itertools.pairwise(path))

    to_store = moved([places[each] for each in ("parameter", "pickled", "store", "arrived")])
    mapped = moved([places["arrived"], read])
    found = {
        "copies/transformers": to_store + mapped + 1.0,  # and into its parameters
        "copies/vllm": to_store + moved([places["arrived"], places["file"]]) + 1.0,
    }
    del views, places
    file.close()
    return found


@contextmanager
def measured(into: dict[str, float], name: str) -> Iterator[None]:
    """Processor and wall milliseconds of this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    into[f"{name}/cpu_ms"] = (time.process_time() - cpu) * 1e3
    into[f"{name}/wall_ms"] = (time.perf_counter() - wall) * 1e3


class Replica:
    """What a rollout actor does with weights, and parameters of its own."""

    def __init__(self, megabytes: float) -> None:
        self._parameters = weights(megabytes)
        self._held, self._file = Held(), MemoryFile()
        self._folder = tempfile.TemporaryDirectory()

    def take(self, *sent: WeightBundle | WeightDelta) -> dict[str, float]:
        """Lay them out and load them; milliseconds of both."""
        found: dict[str, float] = {}
        with measured(found, "before_pause"):
            bundle = self._held.take(sent)
            if bundle.where is None:
                where = self._file.write(bundle)
                arrays = self._file.views(where, bundle)
            else:
                arrays = dict(bundle.arrays)
        with measured(found, "load"):
            for name, array in arrays.items():
                self._parameters[name].copy_(as_tensor(array, "bfloat16"))
        return found

    def take_adapter(self, bundle: WeightBundle) -> dict[str, float]:
        """As vLLM's: a file, which it reads."""
        found: dict[str, float] = {}
        path = Path(self._folder.name) / "adapter_model.safetensors"
        with measured(found, "before_pause"):
            save_file(dict(bundle.items()), path)
        with measured(found, "load"):
            for tensor in load_file(path).values():
                tensor.clone()
        return found


class Store:
    """Memory that is kept, for one object."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def put(self, thing: Any) -> Callable[[], Any]:
        """Copy it in; what reads it there, without a copy."""
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
        parts = [each.raw() for each in buffers]
        size = sum(part.nbytes for part in parts)
        if size > len(self._memory):
            self._memory = bytearray(size)
        views, start, room = [], 0, memoryview(self._memory)
        for part in parts:
            end = start + part.nbytes
            room[start:end] = part
            views.append(room[start:end].toreadonly())
            start = end
        return lambda: pickle.loads(data, buffers=views)


def median(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def compared(old: np.ndarray, new: np.ndarray, flags: np.ndarray) -> None:
    """The least that finding what has changed can cost: read both once, keep nothing."""
    for start in range(0, new.size, COMPARED):
        before, after = old[start : start + COMPARED], new[start : start + COMPARED]
        np.not_equal(before, after, out=flags[: after.size])


def parts(megabytes: int) -> dict[str, float]:
    """Processor milliseconds of what changes of 1 % are made of."""
    new = {name: as_array(tensor) for name, tensor in weights(megabytes).items()}
    dtypes = dict.fromkeys(new, "bfloat16")
    old, held, target = ({name: each.copy() for name, each in new.items()} for _ in range(3))
    flags = np.empty(COMPARED, bool)
    changes: dict[str, Change] = {}

    def found() -> None:
        each = {name: become(words(old[name]), words(new[name])) for name in new}
        changes.update({name: change for name, change in each.items() if change is not None})

    work: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [np.copyto(target[name], new[name]) for name in new],
        "compare": lambda: [
            compared(old[name].view(np.uint64), new[name].view(np.uint64), flags) for name in new
        ],
        "find": found,
        "digest_changes": lambda: of_changes(0, changes),
        "digest_part": lambda: of_part(old, 0),
        "put": lambda: [put(change, held[name]) for name, change in changes.items()],
        "digest_all": lambda: of_all(new, dtypes),
    }
    rounds = []
    for number in range(ROUNDS + 1):
        moved = {name: as_tensor(array.copy(), "bfloat16") for name, array in new.items()}
        update(moved, 0.01, number)
        new = {name: as_array(tensor) for name, tensor in moved.items()}
        taken: dict[str, float] = {}
        for name, run in work.items():
            with measured(taken, name):
                run()
        rounds.append(taken)
    figures = median(rounds[1:])  # the first touches fresh memory
    return {f"{megabytes}_mb/parts/{name}": value for name, value in figures.items()}


def case(megabytes: int, replicas: int) -> dict[str, float]:
    """Milliseconds of a way of sending: rank 0's, and the mean over replicas."""
    handles, store = [Replica(megabytes) for _ in range(replicas)], Store()
    tensors, lora, exports = weights(megabytes), adapter(megabytes), Exports()
    version = 1

    def send(make: Callable[[], Any], method: str = "take") -> dict[str, float]:
        found: dict[str, float] = {}
        with measured(found, "rank_0"):
            read = store.put(make())
        answers = [getattr(each, method)(read()) for each in handles]
        for name in answers[0]:
            found[name] = statistics.fmean(answer[name] for answer in answers)
        return found

    def whole() -> dict[str, float]:
        return send(lambda: WeightBundle.lend(version, tensors.items()))

    def changes(percent: int) -> dict[str, float]:
        nonlocal version
        update(tensors, percent / 100, version)
        version += 1
        return send(lambda: exports.take(version, tensors.items(), version - 1))

    whole()  # the first touches fresh memory everywhere
    send(lambda: exports.take(version, tensors.items(), None))
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "full": whole,
        "delta_1": lambda: changes(1),
        "delta_99": lambda: changes(99),
        "adapter": lambda: send(lambda: WeightBundle.lend(1, lora.items()), "take_adapter"),
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    memcpy = []
    target = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(ROUNDS):  # by turns, so that what else the machine does is shared
        for name, way in ways.items():
            rounds[name].append(way())
        found: dict[str, float] = {}
        with measured(found, "memcpy"):
            for name, tensor in tensors.items():
                target[name].copy_(tensor)
        memcpy.append(found)
    where = f"{megabytes}_mb/{replicas}_replicas"
    figures = {f"{where}/{name}": value for name, value in median(memcpy).items()}
    for name, each in rounds.items():
        figures |= {f"{where}/{name}/{stage}": value for stage, value in median(each).items()}
    for name in ways:
        cpu = sum(figures[f"{where}/{name}/{s}/cpu_ms"] for s in ("rank_0", "before_pause", "load"))
        figures[f"{where}/{name}/over_memcpy"] = cpu / figures[f"{where}/memcpy/cpu_ms"]
    sent = {
        name: figures[f"{where}/{name}/rank_0/cpu_ms"]
        + replicas * figures[f"{where}/{name}/before_pause/cpu_ms"]
        for name in ways
    }
    figures[f"{where}/delta_1_over_full"] = sent["delta_1"] / sent["full"]
    figures[f"{where}/adapter_over_full"] = sent["adapter"] / sent["full"]
    return figures


async def paused() -> dict[str, float]:
    """Of a real vLLM with requests in flight: how long it stands still over its load alone."""
    from actors.engines.specs import VLLMSpec
    from actors.engines.vllm import VLLMEngine
    from actors.messages import Sampling
    from actors.specs import ModelSpec, RolloutSpec
    from aligntune.quickstart.task import make_model, make_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(seed=0)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        longest = model.config.max_position_embeddings
        spec = RolloutSpec(
            engine=VLLMSpec(kv_cache_gib=0.25),
            max_prompt_length=16,
            max_completion_length=longest - 16,
        )
        engine = VLLMEngine(ModelSpec(name=folder), spec, 0, 32, 0)
        await engine.start()
        laid_out, loads = engine._laid_out, []

        def timed(bundle: WeightBundle) -> Any:
            load = laid_out(bundle)

            async def run() -> None:
                began = time.monotonic()
                await load()
                loads.append(time.monotonic() - began)

            return run

        engine._laid_out = timed  # type: ignore[method-assign]
        bundle = WeightBundle.pack(1, model.named_parameters())
        pauses = []
        for number in range(5):
            sampling = Sampling(max_tokens=longest - 16, temperature=1.0)
            prompt = np.arange(3, 9, dtype=np.int32)
            flying = asyncio.ensure_future(engine.sample(prompt, sampling, 16, f"{number}"))
            await engine.sample(prompt, Sampling(max_tokens=4, temperature=1.0), 1, f"f{number}")
            pauses.append(await engine.load_weights(bundle))
            await flying
        await engine.close()
    return {
        "vllm/pause_ms": statistics.median(pauses) * 1e3,
        "vllm/load_ms": statistics.median(loads) * 1e3,
        "vllm/pause_over_load": statistics.median(
            pause / load for pause, load in zip(pauses, loads, strict=True)
        ),
    }


def measure() -> Measured:
    """All of them."""
    torch.set_num_threads(1)
    figures = {**sizes(24), **copies()}
    for megabytes, replicas in CASES:
        figures |= case(megabytes, replicas)
    for megabytes in (100, 500):
        figures |= parts(megabytes)
    figures |= asyncio.run(paused())
    figures["delta_1_over_full"] = figures["100_mb/1_replicas/delta_1_over_full"]
    figures["compare_over_full"] = figures["100_mb/parts/compare/cpu_ms"] / (
        2 * figures["100_mb/parts/memcpy/cpu_ms"]
    )
    targets = (
        Target("vllm/pause_over_load", 2.0),
        Target("bytes/delta_1", 0.2),
        Target("delta_1_over_full", 0.2),
        Target("copies/transformers", 2),
        Target("copies/vllm", 3),
    )
    return Measured(figures, targets)
