"""Why an engine of vLLM's did not start: its processes say that to their output alone."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence

OUTPUT = (2, 1)  # what a process raises is in its standard error, what it logs in the other one
MOST_BYTES = 2**20  # of what was written since, from its end
UNKNOWN = "Engine core initialization failed"  # what vLLM says to whoever starts it
_OF_OTHERS = (UNKNOWN, "WorkerProc initialization failed")
_ERROR = re.compile(r"(?:^|\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .*\S)")


class Output:
    """What this process and those that it starts write to its output from now on, where that is
    files, as of a worker of Ray's."""

    def __init__(self, files: Sequence[int] = OUTPUT) -> None:
        """`files` are descriptors of output, the first to be looked at first."""
        self._began = {file: size for file in files if (size := _size(file)) is not None}

    def cause(self) -> str | None:
        """The last error that was written, as `SomeError: text`, but for those that say only that
        another process has failed. None where there is none."""
        for file, began in self._began.items():
            with open(f"/proc/self/fd/{file}", "rb") as written:
                written.seek(max(began, (_size(file) or 0) - MOST_BYTES))
                lines = written.read().decode(errors="replace").splitlines()
            for line in reversed(lines):
                found = _ERROR.search(line)
                if found and not any(text in line for text in _OF_OTHERS):
                    return found[1]
        return None


def _size(file: int) -> int | None:
    """Bytes of a regular file that can be read again by its descriptor; else None."""
    about = os.fstat(file)
    readable = stat.S_ISREG(about.st_mode) and os.path.exists(f"/proc/self/fd/{file}")
    return about.st_size if readable else None
