"""The one line that a failure of another process becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from aligntune.runs.failure import MOST, reason, write_log
from aligntune.runs.rundir import RunDir


class RayTaskError(Exception):
    """Named as Ray's."""


class RayError(Exception):
    """Named as Ray's."""


NOT_PICKLED = """Exception pydantic_core._pydantic_core.ValidationError isn't serializable: cannot \
pickle 'pydantic_core._pydantic_core.ArgsKwargs' object. Original exception details:
Traceback (most recent call last):
  File "python/ray/_raylet.pyx", line 2205, in ray._raylet.execute_task
  File "/x/actors/rollout.py", line 90, in start
    engine = AsyncLLM.from_engine_args(arguments)
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (520) is greater than the derived max_model_len \
(max_position_embeddings=64.0 or model_max_length=None).
"""

CHAINED = """\x1b[36mray::PolicyActor.start()\x1b[39m (pid=1, ip=10.0.0.1)
Traceback (most recent call last):
  File "a.py", line 1, in load
    raise ValueError("no such file")
ValueError: no such file

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in start
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
"""


def test_of_a_remote_traceback_the_last_error_is_told_with_the_keys_that_help() -> None:
    said = reason(RayError(NOT_PICKLED))
    assert said.startswith(
        "ValidationError: 1 validation error for ModelConfig Value error, User-specified"
    )
    assert "rollout.max_prompt_length" in said
    assert "Traceback" not in said
    assert "\n" not in said
    said = reason(RayTaskError(CHAINED))
    assert said.startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.; set")
    assert "policy.tokens_per_microbatch" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("an\nodd one"), r"KeyError: 'an\nodd one'"),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines"),
        (RuntimeError(), "RuntimeError"),
        (RayTaskError("ray::f()\nsomething odd"), "RayTaskError: something odd"),
        (RayTaskError(), "RayTaskError"),
        (
            RayTaskError("Traceback (most recent call last):\nKeyboardInterrupt"),
            "KeyboardInterrupt",
        ),
        (
            OSError(28, "No space left on device"),
            "OSError: [Errno 28] No space left on device; make",
        ),
    ],
)
def test_other_errors_are_their_kind_and_what_they_say(error: Exception, said: str) -> None:
    assert reason(error).startswith(said)
    assert "\n" not in reason(error)


def test_an_error_of_several_lines_here_is_one_line() -> None:
    class Some(BaseModel):
        number: int

    with pytest.raises(ValidationError) as error:
        Some(number="x")  # type: ignore[arg-type]
    assert reason(error.value).startswith("ValidationError: 1 validation error for Some number")


def test_a_long_reason_is_cut() -> None:
    assert len(reason(RuntimeError("x" * 10_000))) == MOST


def test_the_whole_traceback_is_in_a_log_of_the_run(tmp_path: Path) -> None:
    try:
        raise RayError(NOT_PICKLED)
    except RayError as error:
        path = write_log(RunDir(tmp_path), error)
    assert path == tmp_path / "logs" / "failure.log"
    assert NOT_PICKLED in path.read_text()
    (tmp_path / "other").write_text("a file where the folder should be")
    assert write_log(RunDir(tmp_path / "other"), RuntimeError()).name == "events.jsonl"
