"""What a real step puts into the object store and through the driver: counted, not timed.

A run on Ray with the quickstart's model: transformers engine, a reference model, 8 groups of 8
completions of up to 200 tokens, 2 steps. Objects are weighed as Ray serialises them, their payload
is the bytes of their arrays and texts. What crosses the driver is weighed as it is pickled, a
reference as 120 bytes.

    python -m tests.bench store             also as: make bench NAME=store
"""

from __future__ import annotations

import io
import json
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray import cloudpickle

from actors import timeline
from actors.supervise import Lent
from actors.timeline import Span, Timeline
from aligntune.online.ranks import Ranks
from tests.bench.report import Measured, Target

GROUPS, COMPLETIONS, TOKENS, STEPS = 8, 8, 200, 2
REFERENCE = bytes(120)  # stands for one of Ray's


class Weigher(cloudpickle.CloudPickler):  # type: ignore[misc,name-defined]
    """Pickles as Ray does, references as blobs."""

    def persistent_id(self, thing: Any) -> Any:
        """A blob in place of a reference."""
        return REFERENCE if isinstance(thing, ray.ObjectRef) else None


def pickled(thing: Any) -> int:
    """Its bytes."""
    buffer = io.BytesIO()
    Weigher(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return buffer.getbuffer().nbytes


def stored(thing: Any) -> int:
    """Its bytes in the object store."""
    context = ray._private.worker.global_worker.get_serialization_context()
    return int(context.serialize(thing).total_bytes)


def payload(thing: Any) -> int:
    """The bytes of its arrays and texts."""
    if hasattr(thing, "nbytes"):
        return int(thing.nbytes)
    if isinstance(thing, tuple):
        return sum(len(text.encode()) for text in thing)
    arrays = (thing.prompt_ids, thing.token_ids, thing.logprobs, thing.mask)
    return sum(array.nbytes for array in arrays)


class Scales:
    """What a run put where."""

    def __init__(self) -> None:
        self.objects: list[tuple[str, Any]] = []  # (method that made it, reference)
        self.sent: dict[str, int] = defaultdict(int)  # by what the call was for
        self.answered: dict[str, int] = defaultdict(int)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Weigh every call of a run."""
        lent, begin, ranks_call, heard = Lent.call, Ranks.begin, Ranks._call, Timeline.heard
        scales = self

        async def call(self: Lent, method: str, *args: Any, **options: Any) -> tuple[Any, ...]:
            scales.sent[timeline.about.get()] += pickled(args)
            first, *rest = await lent(self, method, *args, **options)
            scales.objects += [(method, ref) for ref in rest]
            return first, *rest

        def began(self: Ranks, method: str, *args: Any) -> Any:
            answers, refs = begin(self, method, *args)
            scales.objects += [(method, ref) for own in refs for ref in own]
            return answers, refs

        def called(self: Ranks, method: str, args: Any, *more: Any) -> Any:
            scales.sent[timeline.about.get()] += sum(pickled(own) for own in args)
            return ranks_call(self, method, args, *more)

        def answer(self: Timeline, span: Span, answer: Any) -> None:
            scales.answered[span.about] += pickled(answer)
            heard(self, span, answer)

        with ExitStack() as stack:
            for where, name, what in (
                (Lent, "call", call),
                (Ranks, "begin", began),
                (Ranks, "_call", called),
                (Timeline, "heard", answer),
            ):
                stack.enter_context(mock.patch.object(where, name, what))
            yield

    def figures(self) -> dict[str, float]:
        """Store over payload, by what it is, and the driver's bytes a group."""
        names = {
            "generate": "arrays",
            "logprobs": "reference",
            "score": "texts",
            "export_weights": "weights",
        }
        weighed: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for method, ref in self.objects:
            thing = ray.get(ref)
            size, real = weighed[names[method]]
            weighed[names[method]] = (size + stored(thing), real + payload(thing))
        found: dict[str, float] = {}
        for name, (size, real) in weighed.items():
            found[f"store/{name}/bytes"] = size
            found[f"store/{name}/over_payload"] = size / real
        sizes = [sum(each) for each in zip(*weighed.values(), strict=True)]
        found["store/over_payload"] = sizes[0] / sizes[1]
        found["store/over_payload_without_weights"] = (sizes[0] - weighed["weights"][0]) / (
            sizes[1] - weighed["weights"][1]
        )
        count = GROUPS * STEPS
        for way, each in (("sent", self.sent), ("answered", self.answered)):
            groups = sum(size for about, size in each.items() if about.startswith("group "))
            steps = sum(size for about, size in each.items() if about.startswith("step "))
            found[f"driver/before_the_update/{way}"] = groups / count
            found[f"driver/update/{way}"] = steps / count
        found["driver/bytes_a_group"] = sum(
            value for name, value in found.items() if name.startswith("driver/")
        )
        return found


def configured(folder: Path) -> dict[str, Any]:
    """The run's config, with its model and data written to `folder`."""
    from aligntune.quickstart.task import make_model, make_tokenizer

    model = folder / "model"
    make_model(seed=0).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    settings = json.loads((model / "config.json").read_text())
    settings["max_position_embeddings"] = 512  # they have no weights
    (model / "config.json").write_text(json.dumps(settings))
    rows = [{"prompt": f"{10 + i}+{i % 10}", "answer": str(10 + i + i % 10)} for i in range(40)]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "algorithm": {"name": "grpo", "beta": 0.04},
        "model": {"name": str(model)},
        "data": {"path": str(data)},
        "rewards": [{"function": "tests.e2e.rewards:digits", "name": "digits"}],
        "output_dir": str(folder / "run"),
        "train": {
            "steps": STEPS,
            "groups_per_step": GROUPS,
            "completions_per_group": COMPLETIONS,
            "seed": 1,
        },
        "rollout": {
            "engine": "transformers",
            "max_completion_length": TOKENS,
            "max_prompt_length": 16,
        },
        "checkpoint": {"every_steps": STEPS, "at_end": False},
        "tracking": {"trackers": [], "samples_per_step": 0},
        "cluster": {"object_store_gib": 0.25},
    }


def measure() -> Measured:
    """One run."""
    from aligntune.trainers import create_rl_trainer

    scales = Scales()
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-store-") as folder, scales.watching():
            create_rl_trainer(config=configured(Path(folder))).train()
            figures = scales.figures()
    finally:
        ray.shutdown()
    targets = (Target("store/over_payload", 1.1), Target("driver/bytes_a_group", 2048))
    return Measured(figures, targets)
