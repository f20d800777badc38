"""Copies of logs on a storage that cannot append: only what is new is written, and all is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.storage import Store
from aligntune.runs.disk import Appended
from aligntune.runs.segments import LogCopy, fetch_log

NAME = "metrics.jsonl"


class Flaky(Store):
    """A storage that counts the bytes it is given, and sometimes takes none."""

    takes: int | None = None  # writes that it takes before it breaks
    written = 0
    largest = 0

    def write(self, name: str, content: bytes) -> None:
        if self.takes == 0:
            raise OSError("no connection")
        if self.takes is not None:
            self.takes -= 1
        self.largest = max(self.largest, len(content))
        self.written += len(content)
        super().write(name, content)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.just("tear"), st.just(0)),
        st.tuples(st.just("forget"), st.integers(0, 10)),
        st.tuples(st.just("shorten"), st.integers(0, 10)),
        st.tuples(st.just("push"), st.just(0)),
        st.tuples(st.just("break"), st.integers(0, 3)),
        st.tuples(st.just("restart"), st.just(0)),
    ),
    max_size=30,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(ACTIONS, st.sampled_from([7, 40, 2**26]))
@example([("append", 1), ("push", 0), ("forget", 0), ("forget", 0), ("append", 1), ("push", 0)], 7)
@example([("append", 1), ("push", 0), ("shorten", 0), ("append", 2), ("push", 0)], 7)
def test_whatever_happens_to_a_log_its_copy_is_what_was_pushed_last(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]], piece: int
) -> None:
    with (
        mock.patch("aligntune.runs.segments.PIECE", piece),
        mock.patch("aligntune.runs.jsonl.LOOK", (min(piece, 20), piece)),
    ):
        store = played(tmp_path_factory.mktemp("run"), actions)
    assert store.largest <= piece


def played(folder: Path, actions: list[tuple[str, int]]) -> Flaky:
    """Does the actions; after each the copy is that of the last push that went well."""
    log, store = folder / NAME, Flaky(str(folder / "bucket"))
    log.write_bytes(b"")
    copy, pushed, line = LogCopy(store, log), None, 0
    for action, number in actions:
        if action == "append":
            complete = log.read_bytes()[: log.read_bytes().rfind(b"\n") + 1]
            log_lines = [f'{{"line": {line + i}}}\n'.encode() for i in range(number)]
            line += number
            with log.open("r+b") as file:
                file.truncate(len(complete))
                file.seek(len(complete))
                file.writelines(log_lines)
        elif action == "tear":
            with log.open("ab") as file:
                file.write(b'{"li')
        elif action == "forget":
            kept = b"".join(log.read_bytes().splitlines(keepends=True)[:number])
            staging = log.with_suffix(".partial")
            staging.write_bytes(kept)
            staging.rename(log)
        elif action == "shorten":
            kept = b"".join(log.read_bytes().splitlines(keepends=True)[:number])
            file = Appended(log)
            file.shorten(len(kept))
            file.close()
        elif action == "restart":
            copy = LogCopy(store, log)
        else:
            store.takes = number if action == "break" else None
            try:
                copy.push(copy.size())
                content = log.read_bytes()
                pushed = content[: content.rfind(b"\n") + 1]
            except OSError:
                pass
            store.takes = None
        assert fetched(store, folder) == pushed
    return store


def fetched(store: Store, folder: Path) -> bytes | None:
    """The log as it is there."""
    target = folder / "fetched"
    return target.read_bytes() if fetch_log(store, NAME, target) else None


def test_a_log_is_not_copied_anew_each_time(tmp_path: Path) -> None:
    log, store = tmp_path / NAME, Flaky(str(tmp_path / "bucket"))
    copy = LogCopy(store, log)
    for _ in range(50):
        with log.open("a") as file:
            file.write("x" * 999 + "\n")
        copy.push(copy.size())
    assert store.written == log.stat().st_size == 50_000
    assert fetched(store, tmp_path) == log.read_bytes()


def test_a_log_that_is_shortened_while_it_is_copied_is_copied_by_the_next_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligntune.runs.segments.PIECE", 8)
    log, store = tmp_path / NAME, Flaky(str(tmp_path / "bucket"))
    log.write_text("old 1\nold 2\nold 3\n")
    copy, file = LogCopy(store, log), Appended(log)
    write = store.write

    def shortens(name: str, content: bytes) -> None:
        file.shorten(6)
        file.append(b"new 2\n")
        monkeypatch.setattr(store, "write", write)
        write(name, content)

    monkeypatch.setattr(store, "write", shortens)
    with pytest.raises(OSError, match=r"metrics\.jsonl was shortened while it was copied"):
        copy.push(copy.size())
    assert fetched(store, tmp_path) is None
    file.append(b"new 3\nnew 4\n")
    copy.push(copy.size())
    assert fetched(store, tmp_path) == b"old 1\nnew 2\nnew 3\nnew 4\n"
    file.close()


def test_a_log_that_is_not_there_is_none(tmp_path: Path) -> None:
    store: Any = Store(str(tmp_path / "bucket"))
    copy = LogCopy(store, tmp_path / NAME)
    copy.push(copy.size())
    assert fetched(store, tmp_path) is None
    assert not (tmp_path / "fetched").exists()
