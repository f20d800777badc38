"""What may be on a disk after a crash, given the operations before it.

A file's content is safe once the file is forced to disk, a name once its folder is; what is not may
be there, be missing, or be there by half. After the kill of a process all is there but the end of
the operation that ran.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.torn.tape import Op

Tree = dict[str, bytes | None]
"""Path: content of a file, or None for a folder."""


@dataclass
class _Node:
    """A file, or a folder with `names`."""

    folder: bool
    content: bytearray = field(default_factory=bytearray)
    safe: bytes = b""  # its content as it was last forced to disk
    names: dict[str, _Node] = field(default_factory=dict)
    safe_names: dict[str, _Node] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """Names of one folder that change together; None takes one away."""

    folder: _Node
    names: tuple[tuple[str, _Node | None], ...]


class Disk:
    """A disk that does the operations it is given."""

    def __init__(self) -> None:
        self._root = _Node(folder=True)
        self._pending: list[_Change] = []  # that no folder was forced to disk since
        self._open: dict[int, _Node] = {}

    def _at(self, path: str) -> tuple[_Node, str]:
        *above, name = path.split("/")
        node = self._root
        for part in above:
            node = node.names[part]
        return node, name

    def _change(self, folder: _Node, *names: tuple[str, _Node | None]) -> None:
        for name, node in names:
            if node is None:
                del folder.names[name]
            else:
                folder.names[name] = node
        self._pending.append(_Change(folder, names))

    def do(self, op: Op) -> None:
        """One operation more."""
        if op.kind == "write":
            content = self._open[op.handle].content
            content.extend(b"\0" * (op.at - len(content)))
            content[op.at : op.at + len(op.data)] = op.data
            return
        if op.kind == "truncate":
            del self._open[op.handle].content[op.at :]
            return
        if op.path == ".":
            self._sync(self._root) if op.kind == "fsync" else None
            return
        folder, name = self._at(op.path)
        if op.kind == "open":
            if name not in folder.names:
                self._change(folder, (name, _Node(folder=False)))
            node = self._open[op.handle] = folder.names[name]
            if op.empties:
                node.content.clear()
        elif op.kind == "fsync":
            self._sync(folder.names[name])
        elif op.kind == "mkdir":
            self._change(folder, (name, _Node(folder=True)))
        elif op.kind in ("unlink", "rmdir"):
            self._change(folder, (name, None))
        elif op.kind == "rename":
            target, new = self._at(op.to)
            node = folder.names[name]
            if target is folder:
                self._change(folder, (name, None), (new, node))
            else:
                self._change(target, (new, node))
                self._change(folder, (name, None))
        else:
            raise AssertionError(op.kind)

    def _sync(self, node: _Node) -> None:
        if not node.folder:
            node.safe = bytes(node.content)
            return
        for change in self._pending:
            if change.folder is node:
                _apply(node.safe_names, change)
        self._pending = [change for change in self._pending if change.folder is not node]

    def after_a_kill(self) -> Tree:
        """What is there where only the process has died."""
        return dict(_walk(self._root, {}, lambda node: bytes(node.content)))

    def after_a_crash(self, dice: random.Random, many: int) -> Iterator[Tree]:
        """Up to `many` of the trees that may be there where the machine has died."""
        pending, folders = self._pending, []
        for change in pending:
            if change.folder not in folders:
                folders.append(change.folder)
        kept: list[Sequence[_Change]] = [pending, ()]
        kept += [pending[:size] for size in range(1, len(pending))]
        kept += [[c for c in pending if c.folder is not folder] for folder in folders]
        kept += [[c for c in pending if dice.random() < 0.5] for _ in range(2)]
        ways = [(names, way) for names in kept for way in WAYS]
        for names, way in dice.sample(ways, min(many, len(ways))):
            yield self._as(names, way, dice)

    def _as(self, changes: Sequence[_Change], way: str, dice: random.Random) -> Tree:
        names: dict[int, dict[str, _Node]] = {}
        for change in changes:
            own = names.setdefault(id(change.folder), dict(change.folder.safe_names))
            _apply(own, change)
        return dict(_walk(self._root, names, lambda node: _content(node, way, dice), safe=True))


WAYS = ("there", "lost", "empty", "zeros", "half", "end lost", "beginning lost", "each its own")
"""What may have become of content that was not forced to disk."""


def _content(node: _Node, way: str, dice: random.Random) -> bytes:
    content, safe = bytes(node.content), node.safe
    if content == safe:
        return content
    if way == "each its own":
        way = dice.choice(WAYS[:-1])
    if way == "there":
        return content
    if way == "lost":
        return safe
    same = 0
    while same < min(len(content), len(safe)) and content[same] == safe[same]:
        same += 1
    new = len(content) - same
    if way == "empty":
        return content[:same]
    if way == "zeros":
        return content[:same] + b"\0" * new
    middle = same + new // 2
    if way == "half":
        return content[:middle]
    if way == "end lost":
        return content[:middle] + b"\0" * (len(content) - middle)
    return content[:same] + b"\0" * (middle - same) + content[middle:]


def _apply(names: dict[str, _Node], change: _Change) -> None:
    for name, node in change.names:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _walk(
    folder: _Node,
    names: dict[int, dict[str, _Node]],
    content: object,
    prefix: str = "",
    safe: bool = False,
) -> Iterator[tuple[str, bytes | None]]:
    own = names.get(id(folder), folder.safe_names) if safe else folder.names
    for name, node in sorted(own.items(), key=lambda item: item[0]):
        path = f"{prefix}{name}"
        if node.folder:
            yield path, None
            yield from _walk(node, names, content, f"{path}/", safe)
        else:
            yield path, content(node)  # type: ignore[operator]
