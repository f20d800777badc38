"""The floor: bare vLLM (a request of n completions a prompt), then a bare torch update, in turn.

One process, all cores for each half, no Ray, no reward actor, no new weights for vLLM. The update
is transformers' forward pass over rows cut where padding is least, log-probs of whole logits, the
clipped loss and AdamW: nothing that a run needs beyond its arithmetic.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.bare_vllm import ALONE
from tests.bench.end_to_end import work as works
from tests.bench.end_to_end.seen import Group, Step, cpu_seconds
from tests.bench.end_to_end.work import Work

BUDGET = 16_384  # tokens of a micro-batch
EPSILON = 1e-8  # beside the standard deviation of a group


def run(work: Work, steps: int) -> Sequence[Step]:
    """One step to warm up, and then `steps`."""
    os.environ |= ALONE | {"OMP_NUM_THREADS": str(work.threads)}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    from tests.e2e.rewards import digits

    with tempfile.TemporaryDirectory(prefix="bench-floor-") as name:
        path, _ = works.write(work, Path(name))
        tokenizer = AutoTokenizer.from_pretrained(path)
        llm = LLM(
            str(path),
            dtype="float32",
            max_model_len=work.longest,
            seed=work.seed,
            max_num_seqs=work.samples,
            max_num_batched_tokens=max(2048, work.prompts * work.completions * work.longest // 8),
            kv_cache_memory_bytes=2**30,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=work.learning_rate,
            betas=work.adam_betas,
            weight_decay=work.weight_decay,
        )
        sampling = SamplingParams(
            n=work.completions,
            max_tokens=work.new_tokens,
            temperature=work.temperature,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        texts = works.prompts_of(work)
        prompts = [tokenizer(text)["input_ids"] for text in texts]
        seen: list[Step] = []
        for _ in range(1 + steps):
            began, cpu = time.perf_counter(), cpu_seconds()
            answers = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False
            )
            rolled = time.perf_counter()
            rows: list[tuple[list[int], list[int], float]] = []
            groups: list[Group] = []
            for text, ids, answer in zip(texts, prompts, answers, strict=True):
                done = [list(one.token_ids) for one in answer.outputs]
                said = tokenizer.batch_decode(done, skip_special_tokens=True)
                scores = torch.tensor(digits(said), dtype=torch.float64)
                advantages = (scores - scores.mean()) / (scores.std() + EPSILON)
                rows += [(ids, own, float(a)) for own, a in zip(done, advantages, strict=True)]
                groups.append(
                    Group(
                        prompt=text,
                        texts=tuple(said),
                        tokens=tuple(map(len, done)),
                        rewards=tuple(scores.tolist()),
                    )
                )
            loss = update(model, optimizer, rows, work)
            seen.append(
                Step(
                    wall_s=time.perf_counter() - began,
                    cpu_s=cpu_seconds() - cpu,
                    loss=loss,
                    groups=tuple(groups),
                    parts={"rollout": rolled - began, "update": time.perf_counter() - rolled},
                )
            )
    return seen[1:]


def update(
    model: Any, optimizer: Any, rows: Sequence[tuple[list[int], list[int], float]], work: Work
) -> float:
    """One optimiser step on (prompt, completion, advantage) rows; returns its loss."""
    import torch

    from actors.messages import Row
    from actors.packing import microbatches

    sized = [Row(0, index, len(ids) + len(own)) for index, (ids, own, _) in enumerate(rows)]
    tokens = sum(len(own) for _, own, _ in rows)
    total = 0.0
    for batch in microbatches(sized, BUDGET, packed=False):
        width = max(row.tokens for row in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        attended = torch.zeros((len(batch), width), dtype=torch.long)
        trained = torch.zeros((len(batch), width - 1))
        advantages = torch.zeros((len(batch), 1))
        for place, row in enumerate(batch):
            prompt, own, advantage = rows[row.completion]
            ids[place, : row.tokens] = torch.tensor(prompt + own)
            attended[place, : row.tokens] = 1
            trained[place, len(prompt) - 1 : row.tokens - 1] = 1
            advantages[place] = advantage
        logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
        scaled = logits / work.temperature
        logp = scaled.gather(2, ids[:, 1:, None])[..., 0] - scaled.logsumexp(2)
        ratio = (logp - logp.detach()).exp()
        clipped = ratio.clamp(1 - work.clip, 1 + work.clip)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        loss = -(gain * trained).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total
