"""What a failure says to a person: its last line that matters. The rest goes to a log of the run.

Errors come from other processes wrapped in whole tracebacks, sometimes as text alone: Ray puts one
into the message where the error itself cannot be pickled.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from aligntune.runs.rundir import RunDir

MOST = 400  # characters of a reason

# `package.module.SomeError: text` at the beginning of a line, as tracebacks end.
HEAD = re.compile(
    r"^\s*(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Exit|Interrupt))(?:: (.*)|:?)$"
)
BEGIN = "Traceback (most recent call last)"
ENDS = ("The above exception", "During handling", BEGIN, 'File "')
WRAPPERS = re.compile(r"Ray\w*Error|UserExceptionWithTraceback")

CURES = {
    r"running low on memory|memory pressure|killed.*\bOOM\b": "end what else takes memory there, "
    "or use fewer replicas, a smaller model, or a machine with more memory",
    r"CUDA out of memory|OutOfMemoryError": "set policy.tokens_per_microbatch lower, "
    "model.gradient_checkpointing=true, or rollout.engine.gpu_memory_utilization lower, or "
    "rollout.engine.kv_cache_gib where it is set",
    r"No CUDA GPUs are available": "give the role that said so a GPU, as a reward by "
    "reward.resources.gpus=1",
    r"max_model_len|max_position_embeddings": "set rollout.max_prompt_length and "
    "rollout.max_completion_length so that both together fit the model",
    r"No available memory for the cache|KV cache": "set rollout.engine.gpu_memory_utilization or "
    "rollout.engine.kv_cache_gib higher, or the two lengths of rollout lower",
    r"No space left on device": "make room, or name another output_dir",
}
"""A pattern of what failed, and what helps."""


def reason(error: BaseException) -> str:
    """One line for a person: the kind of the innermost error, what it says, and what may help."""
    said = _short(_last(error))
    cure = next((cure for pattern, cure in CURES.items() if re.search(pattern, said)), None)
    return f"{said}; {cure}" if cure else said


def _last(error: BaseException) -> str:
    kind, text = type(error).__name__, str(error).strip()
    if BEGIN not in text and not WRAPPERS.search(kind):
        return f"{kind}: {' '.join(text.split())}" if text else kind
    lines = [line for line in text.splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        head = HEAD.match(lines[index])
        if head and not WRAPPERS.fullmatch(head[1]):
            said = " ".join([head[2] or "", *_following(lines[index + 1 :])]).strip()
            return f"{head[1]}: {said}" if said else head[1]
    return f"{kind}: {lines[-1].strip()}" if lines else kind


def _following(lines: list[str]) -> list[str]:
    """What an error says below its first line, up to the next traceback."""
    found = []
    for line in lines:
        if line.strip().startswith(ENDS):
            break
        found.append(line.strip())
    return found


def _short(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


def write_log(rundir: RunDir, error: BaseException) -> Path:
    """Write the whole traceback to a log of the run; returns the file where it is.

    That is events.jsonl, which has it too, where the disk does not take another file.
    """
    path = rundir.file("logs") / "failure.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return rundir.file("events.jsonl")
    return path
