"""What an update keeps in memory beside weights and activations, at a large vocabulary.

One row of 2,048 tokens, vocabulary 152,064, a Qwen2 of 4 layers and hidden size 512 in float32, one
torch rank, two updates each in a process of its own. Growth is that of the resident memory, from
after the imports, before the model is loaded, to the peak.

ours      a policy rank with the default settings
without   the same rank, whose head reads the sampled tokens' weights alone: no logits are made
plain     Hugging Face's forward, a loss of whole logits, backward, AdamW

    python -m tests.bench memory            also as: make bench NAME=memory
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.bench.measure_memory import mark, memory
from tests.bench.report import REPOSITORY, Measured, Target

VOCABULARY, HIDDEN, LAYERS = 152_064, 512, 4
PROMPT, COMPLETION = 64, 1984
WAYS = ("ours", "without", "plain")


def make(folder: str) -> None:
    """Write the model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from aligntune.quickstart.task import make_tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def a_rank(folder: str, logits: bool) -> tuple[int, float]:
    """Bytes and processor seconds of two updates of a policy rank."""
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from actors.models.logprobs import LogProbModel
    from actors.policy import PolicyActor
    from actors.specs import ModelSpec
    from tests.actors.policy_cases import make_group, make_jobs, policy_spec, simple_loss

    def sampled(
        self: LogProbModel, hidden: Any, targets: Any, temperature: float, entropy: bool
    ) -> tuple[Any, Any]:
        logp = (hidden * self.causal_lm.get_output_embeddings().weight[targets]).sum(-1)
        return logp, torch.zeros_like(logp)

    before = mark()
    spec = policy_spec(
        strategy={"name": "torch"},
        tokens_per_microbatch=PROMPT + COMPLETION,
        tokens_per_chunk=None,
        learning_rate=1e-6,
    )
    actor = PolicyActor(ModelSpec(name=folder), spec, 0, 1, total_steps=10, seed=0)
    actor.start("", 0)
    if not logits:
        LogProbModel._chunk = sampled  # type: ignore[method-assign]
        actor._strategy.model.tokens_per_chunk = PROMPT + COMPLETION
    began = time.process_time()
    for step in (1, 2):
        group = make_group(0, PROMPT, [COMPLETION])
        actor.update(make_jobs([group], simple_loss, step=step)[0])
    return memory("VmHWM") - before, time.process_time() - began


def plain(folder: str) -> tuple[int, float]:
    """Bytes and processor seconds of two updates with whole logits."""
    import torch
    from transformers import Qwen2ForCausalLM

    before = mark()
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tokens = torch.randint(3, 1000, (1, PROMPT + COMPLETION))
    began = time.process_time()
    for _ in (1, 2):
        logits = model(input_ids=tokens, use_cache=False).logits[:, PROMPT - 1 : -1]
        chosen = tokens[:, PROMPT:, None]
        logp = logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1)
        (-(logp - logp.detach()).exp().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory("VmHWM") - before, time.process_time() - began


def main(what: str, folder: str) -> None:
    """Run one way and print what it took."""
    import torch

    torch.set_num_threads(1)
    grown, seconds = plain(folder) if what == "plain" else a_rank(folder, what == "ours")
    print(json.dumps({"bytes": grown, "seconds": seconds}))


def measure() -> Measured:
    """Each way once, one after the other."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        make(folder)
        for way in WAYS:
            command = [sys.executable, "-m", "tests.bench.memory", way, folder]
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=1800
            )
            found = json.loads(done.stdout.splitlines()[-1])
            figures[f"{way}/mib"] = found["bytes"] / 2**20
            figures[f"{way}/cpu_s"] = found["seconds"]
    figures["ours_over_without"] = figures["ours/mib"] / figures["without/mib"]
    figures["ours_over_plain"] = figures["ours/mib"] / figures["plain/mib"]
    figures["ours_over_plain/cpu"] = figures["ours/cpu_s"] / figures["plain/cpu_s"]
    targets = (Target("ours_over_without", 1.15), Target("ours_over_plain", 0.6))
    return Measured(figures, targets, {"logits_mib": VOCABULARY * COMPLETION * 4 / 2**20})


if __name__ == "__main__":
    main(*sys.argv[1:])
