"""One real rank or replica in this process: how far its memory grows, as JSON on the last line.

    python -m tests.bench.measure_memory make FOLDER
    python -m tests.bench.measure_memory policy FOLDER STRATEGY STAGE RANKS RANK PORT CHECKPOINTING
    python -m tests.bench.measure_memory rollout FOLDER
    python -m tests.bench.measure_memory vllm FOLDER

Growth is from after the imports, before the model is loaded, to the peak. The kernel keeps the peak
(VmHWM) and takes it back to the present when 5 is written to clear_refs. Of vLLM, whose engine is
a process of its own that is there as a whole or not at all, it is all that both processes hold.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path

import numpy as np

PROMPT, COMPLETION, GROUP, GROUPS, CHUNK, ROWS = 64, 64, 4, 2, 128, 4
VOCABULARY = 16384


def main(what: str, folder: str, *arguments: str) -> None:
    """Run `what` and print the bytes."""
    if what == "make":
        make(folder)
        return
    if what == "policy":
        grown = policy(folder, *arguments)
    else:
        grown = asyncio.run(vllm(folder) if what == "vllm" else rollout(folder))
    print(json.dumps({"bytes": grown}))


def make(folder: str) -> None:
    """A Qwen2 of 116 million parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from aligntune.quickstart.task import make_tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def memory(key: str, process: str = "self") -> int:
    """VmRSS or VmHWM in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def mark() -> int:
    """Resident memory now; the peak starts again from here."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def policy(
    folder: str, strategy: str, stage: str, ranks: str, rank: str, port: str, checkpointing: str
) -> int:
    """A rank from before its model is loaded to the second update and an export, beside which the
    copy of a checkpoint lies."""
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from actors.policy import PolicyActor
    from actors.specs import ModelSpec
    from tests.actors.policy_cases import make_group, make_jobs, policy_spec, simple_loss

    if strategy == "deepspeed":
        import deepspeed  # noqa: F401
    options = {"stage": int(stage)} if strategy == "deepspeed" else {}
    torch.set_num_threads(1)
    before = mark()
    actor = PolicyActor(
        ModelSpec(name=folder, gradient_checkpointing=checkpointing == "yes"),
        policy_spec(
            strategy={"name": strategy, **options},
            ranks=int(ranks),
            tokens_per_microbatch=ROWS * (PROMPT + COMPLETION),
            tokens_per_chunk=CHUNK,
            learning_rate=1e-6,
        ),
        int(rank),
        int(ranks),
        total_steps=10,
        seed=0,
    )
    actor.start("127.0.0.1", int(port))
    groups = [make_group(index, PROMPT, [COMPLETION] * GROUP) for index in range(GROUPS)]
    for step in (1, 2):
        actor.update(make_jobs(groups, simple_loss, int(ranks), step=step)[int(rank)])
        size, bundle = actor.export_weights(step)
        assert (size > 0) == (int(rank) == 0)
        del bundle
        if step == 1:
            print(json.dumps({"checkpoint": actor.snapshot()}), flush=True)
    return memory("VmHWM") - before


async def rollout(folder: str) -> int:
    """A transformers replica from before its model is loaded to a group under new weights."""
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from actors.engines.transformers import TransformersEngine
    from actors.messages import Sampling
    from actors.specs import ModelSpec, RolloutSpec
    from actors.transfer.bundle import WeightBundle

    before = mark()
    engine = TransformersEngine(ModelSpec(name=folder), RolloutSpec(), 0)
    await engine.start()
    prompt, sampling = np.arange(3, 3 + PROMPT, dtype=np.int32), Sampling(COMPLETION, 1.0)
    for version in (1, 2):
        await engine.sample(prompt, sampling, GROUP, f"0/{version}")
        weights = WeightBundle.pack(version, engine._model.named_parameters())
        await engine.load_weights(weights)
        del weights
    grown = memory("VmHWM") - before
    await engine.close()
    return grown


async def vllm(folder: str) -> int:
    """A vLLM replica to a group under new weights, which here, unlike in a run, lie beside it."""
    import psutil
    from transformers import AutoModelForCausalLM

    from actors.engines.specs import VLLMSpec
    from actors.engines.vllm import VLLMEngine
    from actors.messages import Sampling
    from actors.specs import ModelSpec, RolloutSpec
    from actors.transfer.bundle import WeightBundle

    spec = RolloutSpec(
        engine=VLLMSpec(kv_cache_gib=1),
        max_prompt_length=PROMPT,
        max_completion_length=COMPLETION,
    )
    engine = VLLMEngine(ModelSpec(name=folder), spec, 0, GROUP, 0)
    await engine.start()
    prompt, sampling = np.arange(3, 3 + PROMPT, dtype=np.int32), Sampling(COMPLETION, 1.0)
    await engine.sample(prompt, sampling, GROUP, "0/1")
    own = memory("VmHWM")
    model = AutoModelForCausalLM.from_pretrained(folder)
    await engine.load_weights(WeightBundle.pack(1, model.named_parameters()))
    await engine.sample(prompt, sampling, GROUP, "0/2")
    children = psutil.Process().children(recursive=True)
    total = own + sum(memory("VmHWM", str(child.pid)) for child in children)
    await engine.close()
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
