"""Bare vLLM in a process of its own: imported, its engine made, and a token sampled.

python -m tests.bench.bare_vllm MODEL TOKENS [eager]    prints one JSON object: time.monotonic() at
each; `eager` compiles nothing, as a run on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import time

ALONE = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""The environment in which vLLM on a CPU is one process whose threads go where there is room."""


def main(model: str, longest: int, eager: bool) -> None:
    """In the quickest way it has: all in one process, with as much memory as a run gives it."""
    os.environ |= ALONE
    from vllm import LLM, SamplingParams

    at = {"imported": time.monotonic()}
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=longest,
        kv_cache_memory_bytes=2**30,
        seed=1,
        enforce_eager=eager,
    )
    at["engine"] = time.monotonic()
    llm.generate(
        [{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=1, logprobs=0), use_tqdm=False
    )
    at["token"] = time.monotonic()
    print(json.dumps(at), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["eager"])
