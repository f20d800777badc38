"""JSON, JSON Lines and CSV files as rows with random access; what a cell holds is never changed.

A scan checks every row once and remembers where it lies, so that memory holds sixteen bytes a row
(a JSON array is held whole; what gzip packed lies unpacked in the folder for temporary files). JSON
values keep their types even where a
column mixes them; CSV cells are the strings that stand in the file. Nothing is guessed, so nothing
is coerced.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import IO, Any, BinaryIO

from aligntune.data.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK = 2**20  # bytes read at once where a file is only passed through
LONGEST_CELL = 2**31 - 1  # characters; the csv module refuses cells over 131,072 by default


class TextFile:
    """One file: rows by index, and for messages the line on which a row begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: dict[str, None] = {}  # an ordered set, in order of first appearance
        self._starts = array("q")  # byte offsets
        self._ends = array("q")
        self._unpacked = unpacked(path)  # a file that goes with this object
        self._held: _Held | None = None
        try:
            with self._open() as stream:
                if stream.read(3) != BYTE_ORDER_MARK:
                    stream.seek(0)
                self._scan(stream)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises: DataError where the file has changed since the scan."""
        try:
            return self._parse(self._bytes(index))
        except (ValueError, OSError, csv.Error) as error:
            raise DataError(
                f"{self.path}: changed or went away while it was in use; start again with a file "
                "that stays as it is"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": None, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unpacked = unpacked(self.path)  # the other process has a file of its own

    def line(self, index: int) -> int:
        """The line, counted from 1, on which row `index` begins."""
        left, lines = self._starts[index], 1
        with self._open() as stream:
            while left and (read := stream.read(min(left, CHUNK))):
                lines += read.count(b"\n")
                left -= len(read)
        return lines

    @property
    def _place(self) -> str | Path:
        return self.path if self._unpacked is None else self._unpacked.name

    def _open(self) -> BinaryIO:
        return open(self._place, "rb")

    def let_go(self) -> None:
        """Keep the file open no longer than until the next row is read."""
        self._held = None

    def _scan(self, stream: BinaryIO) -> None:
        raise NotImplementedError

    def _parse(self, raw: bytes) -> dict[str, Any]:
        raise NotImplementedError

    def _bytes(self, index: int) -> bytes:
        held = self._held
        if held is None:
            held = self._held = _Held(self._place)
        start = self._starts[index]
        return os.pread(held.descriptor, self._ends[index] - start, start)

    def _add(self, start: int, end: int, row: dict[str, Any]) -> None:
        self._starts.append(start)
        self._ends.append(end)
        if not row.keys() <= self.columns.keys():
            self.columns.update(dict.fromkeys(row))

    def _text(self, raw: bytes, line: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line += raw.count(b"\n", 0, error.start)
            raise DataError(
                f"{self.path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); "
                "save the file as UTF-8"
            ) from error


class _Held:
    """A file that is open for as long as somebody has this: to open it for each row takes longer
    than to read one, and on a network's file system a way there and back."""

    descriptor = -1

    def __init__(self, path: str | Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class JsonLinesFile(TextFile):
    """One JSON object a line; blank lines are skipped."""

    def _scan(self, stream: BinaryIO) -> None:
        start = stream.tell()
        for line, raw in enumerate(stream, 1):
            if not raw.isspace():
                self._add(start, start + len(raw), self._checked(raw, line))
            start += len(raw)

    def _checked(self, raw: bytes, line: int) -> dict[str, Any]:
        text = self._text(raw, line)
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            goes_on = error.pos >= len(text.rstrip()) and text.lstrip().startswith(("{", "["))
            cure = " and this one goes on; write each on one line, as jq -c does" if goes_on else ""
            raise DataError(
                f"{self.path}, line {line}: broken JSON ({error.msg}, column {error.colno}); "
                f"each line must be one object{cure}"
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{self.path}, line {line}: {_beyond(error)}") from error
        return _object(row, f"{self.path}, line {line}")

    def _parse(self, raw: bytes) -> dict[str, Any]:
        row: dict[str, Any] = json.loads(raw)
        return row


def _beyond(error: Exception) -> str:
    """What JSON has that Python cannot read."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply to read"
    return "a number in the JSON has too many digits to read; write it as text"


class JsonArrayFile(TextFile):
    """One JSON array of objects, held in memory."""

    def _scan(self, stream: BinaryIO) -> None:
        self._rows: list[dict[str, Any]] = []
        raw = stream.read()
        text = self._text(raw, 1)
        try:
            for start, end, row in _elements(text):
                line = text.count("\n", 0, start) + 1 if not isinstance(row, dict) else 0
                self._add(start, end, _object(row, f"{self.path}, line {line}"))
                self._rows.append(row)
        except DataError:
            raise
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.path}, line {error.lineno}: broken JSON ({error.msg}, "
                f"column {error.colno}); a .json file is an array of objects, or one object a line"
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{self.path}: {_beyond(error)}") from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index])

    def line(self, index: int) -> int:
        """The line, counted from 1, on which row `index` begins."""
        with self._open() as stream:
            text = stream.read().decode("utf-8-sig")
        return text.count("\n", 0, self._starts[index]) + 1


class CsvFile(TextFile):
    """Comma-separated values with a header, quoted as RFC 4180 has it; every cell is a string."""

    def _scan(self, stream: BinaryIO) -> None:
        self._header: list[str] = []
        lines = _CountedLines(self, stream)
        csv.field_size_limit(LONGEST_CELL)
        reader = csv.reader(lines, strict=True)
        while True:
            start, line = lines.offset, lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise DataError(
                    f"{self.path}, line {line}: broken CSV ({error}); check the quotes"
                ) from error
            if not cells:
                continue
            if not self._header:
                self._header = self._checked_header(cells, line)
            elif len(cells) != len(self._header):
                raise DataError(
                    f"{self.path}, line {line}: {len(cells)} cells where the header has "
                    f"{len(self._header)}; quote cells that hold commas or line ends"
                )
            else:
                self._add(start, lines.offset, dict(zip(self._header, cells, strict=True)))

    def _checked_header(self, cells: list[str], line: int) -> list[str]:
        for cell in cells:
            if not cell.strip() or cells.count(cell) > 1:
                what = f"column {cell!r} twice" if cell.strip() else "a column without a name"
                raise DataError(f"{self.path}, line {line}: the header has {what}; name each once")
        return cells

    def _parse(self, raw: bytes) -> dict[str, Any]:
        text = io.StringIO(raw.decode("utf-8"), newline="")
        return dict(zip(self._header, next(csv.reader(text, strict=True)), strict=True))


class _CountedLines:
    """Decoded lines for the csv reader, with the offset and number of what it has taken so far."""

    def __init__(self, file: CsvFile, stream: BinaryIO) -> None:
        self._file = file
        self._stream = stream
        self.offset = stream.tell()  # bytes
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline()
        if not raw:
            raise StopIteration
        self.offset += len(raw)
        self.number += 1
        return self._file._text(raw, self.number)


def open_json(path: Path) -> TextFile:
    """A .json file: an array of objects, or one object a line, told apart by the first character.

    Raises: DataError.
    """
    try:
        with unpacked(path) or path.open("rb") as stream:
            head = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
            first, more, _ = head.partition(b"\n")
            if head.startswith(b"{") and more and not _is_json(first):
                stream.seek(0)
                _refuse_one_object(path, stream.read())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return JsonArrayFile(path) if head.startswith(b"[") else JsonLinesFile(path)


def unpacked(path: Path) -> IO[bytes] | None:
    """What a .gz file holds, as a file that is gone once it is closed; None where `path` is
    another. Raises: DataError."""
    if path.suffix != ".gz":
        return None
    held = NamedTemporaryFile(prefix="aligntune-unpacked-")  # noqa: SIM115  # its user closes it
    try:
        with gzip.open(path) as stream:
            shutil.copyfileobj(stream, held, CHUNK)
        held.flush()
        held.seek(0)
        return held
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip ({error}); pack it again") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = f"; {gettempdir()}, where it is unpacked, is full: set TMPDIR" if full else ""
        raise DataError(f"{path}: cannot be read ({error.strerror}){cure}") from error


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_one_object(path: Path, raw: bytes) -> None:
    """Raise DataError where `raw` is one object over many lines: which of its parts are the rows,
    the file does not say."""
    try:
        whole = json.loads(raw.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError):
        return  # told with its line
    raise DataError(
        f"{path}: is one JSON object over many lines (keys {', '.join(map(repr, whole)) or 'none'})"
        "; rows are an array of objects, or one object a line: write them so, as jq -c does"
    )


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = {list: "array", str: "string", type(None): "null"}.get(type(row), "number or bool")
        raise DataError(
            f"{where}: a JSON {kind} where an object is needed, as in {{'prompt': ...}}"
        )
    return row


def _elements(text: str) -> Iterator[tuple[int, int, Any]]:
    """Start, end (characters) and value of each element of the JSON array in `text`."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    if text.startswith("]", position):
        position += 1
    else:
        while True:
            value, end = decoder.raw_decode(text, position)
            yield position, end, value
            position = _skip_space(text, end)
            if text.startswith("]", position):
                position += 1
                break
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = _skip_space(text, position + 1)
    position = _skip_space(text, position)
    if position != len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
