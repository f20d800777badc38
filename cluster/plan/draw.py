"""A plan as text for people: tables with colour in a terminal, plain ones elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.plan.fit import Use, gib
from cluster.plan.memory import GIB, KINDS
from cluster.plan.plan import Plan

PLAIN_WIDTH = 120
ALIKE = 0.02  # machines of one kind report memory that differs by less than this share


def draw(plan: Plan, console: Console | None = None) -> None:
    """Print the plan."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, no_color=True, highlight=False)
    style = box.SIMPLE_HEAD if console.is_terminal else box.ASCII
    console.print(plan.cluster.describe())
    if plan.decided:
        console.print("decided where the config leaves it open:")
    for line in plan.decided:
        console.print(f"  {line}", soft_wrap=True, markup=False)
    for table in (_places(plan), _memory(plan), _seconds(plan)):
        table.box = style
        console.print(table)
    console.print(f"bound by: {plan.times.bound}", soft_wrap=True)
    if plan.changes:
        now = plan.times.step(plan.work.step.max_staleness)
        console.print(f"would change (step {now:.3g} s as it is):", soft_wrap=True)
        for change in plan.changes:
            line = f"  {change.settings}: step {change.step_seconds:.3g} s"
            console.print(line, soft_wrap=True)
    console.print("assumed:")
    for line in plan.assumptions:
        console.print(f"  {line}", soft_wrap=True)


def _table(title: str, words: int, *columns: str) -> Table:
    """A table whose first `words` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", overflow="fold")
    return table


def _places(plan: Plan) -> Table:
    """Who is where; runs of equal nodes are one row a device."""
    table = _table("where each rank goes", 3, "node", "device", "roles", "needs", "has")
    for nodes, rows in _alike(plan):
        first = plan.cluster.nodes[nodes[0]].name
        last = plan.cluster.nodes[nodes[-1]].name
        name = first if len(nodes) == 1 else f"{first} .. {last} ({len(nodes)} nodes)"
        for index, use in enumerate(rows):
            device = "host" if use.device is None else f"GPU {use.device}"
            alike = [u for u in plan.uses if _same(u, use, nodes)]
            cells = (device, _roles(use, alike), gib(use.bytes), _has(alike))
            table.add_row(name if index == 0 else "", *cells)
    return table


def _has(alike: list[Use]) -> str:
    """The least and the most that one of these devices or hosts has."""
    known = [use.capacity for use in alike if use.capacity is not None]
    shown = dict.fromkeys(gib(amount) for amount in (min(known), max(known))) if known else "?"
    return " .. ".join(shown)


def _same(other: Use, use: Use, nodes: list[int]) -> bool:
    return other.device == use.device and nodes[0] <= other.node <= nodes[-1]


def _roles(use: Use, alike: list[Use]) -> str:
    """As in: policy 3, rollout 0; over several nodes the first and the last number."""
    parts = []
    for role, group in groupby(use.occupants, key=lambda occupant: occupant[0]):
        count = len(list(group))
        numbers = [index for other in alike for name, index in other.occupants if name == role]
        low, high = min(numbers), max(numbers)
        shown = f"{role} {low}" if low == high else f"{role} {low} .. {high}"
        parts.append(shown if len(numbers) == high - low + 1 else f"{shown} ({count} a node)")
    return ", ".join(parts) or "weights in the object store"


def _alike(plan: Plan) -> Iterator[tuple[list[int], list[Use]]]:
    """Neighbouring nodes whose devices have the same roles on them: (nodes, uses of the first)."""
    nodes: list[int] = []
    first: list[Use] = []
    for node, group in groupby(_by_node(plan), key=lambda use: use.node):
        uses = list(group)
        if nodes and not _look_alike(first, uses):
            yield nodes, first
            nodes = []
        if not nodes:
            first = uses
        nodes.append(node)
    if nodes:
        yield nodes, first


def _look_alike(first: list[Use], second: list[Use]) -> bool:
    """Whether two nodes would be drawn alike, but for a little of what their memory has."""
    return list(map(_picture, first)) == list(map(_picture, second)) and all(
        one.capacity == other.capacity
        if one.capacity is None or other.capacity is None
        else abs(one.capacity - other.capacity) <= ALIKE * one.capacity
        for one, other in zip(first, second, strict=True)
    )


def _picture(use: Use) -> tuple[object, ...]:
    return use.device, tuple(role for role, _ in use.occupants), gib(use.bytes)


def _by_node(plan: Plan) -> list[Use]:
    return sorted(plan.uses, key=lambda use: (use.node, use.device is None, use.device or 0))


def _memory(plan: Plan) -> Table:
    """Bytes of one device of each role by kind, at the peak."""
    kinds = [k for k in KINDS if any(m.device.get(k) for m in plan.memory.values())]
    table = _table("GiB of one rank or replica", 2, "role", "on", *kinds, "peak")
    for role, memory in plan.memory.items():
        on_gpu = bool(plan.placement.slots[role][0].devices)
        cells = [_cell(memory.device.get(kind, 0)) for kind in kinds]
        table.add_row(role, "GPU" if on_gpu else "host", *cells, _cell(memory.peak))
        if memory.host:
            cells = [_cell(memory.host.get(kind, 0)) for kind in kinds]
            table.add_row("", "host", *cells, _cell(memory.host_bytes))
    return table


def _seconds(plan: Plan) -> Table:
    """Parts of a step, and the step at staleness 0 and above."""
    table = _table(
        "predicted seconds of a step", 2, "what", "", "seconds", "rollouts idle", "policy idle"
    )
    for name, seconds in plan.times.parts.items():
        table.add_row(name, "", f"{seconds:.3g}", "", "")
    for bound, label in ((0, "step, max_staleness 0"), (1, "step, max_staleness 1 or more")):
        rollout, policy = plan.times.idle(bound)
        mark = "as configured" if (plan.work.step.max_staleness > 0) == (bound > 0) else ""
        step = f"{plan.times.step(bound):.3g}"
        table.add_row(label, mark, step, f"{rollout:.0%}", f"{policy:.0%}")
    return table


def _cell(amount: int) -> str:
    if not amount:
        return ""
    return f"{amount / GIB:.3g}" if amount >= GIB / 100 else "< 0.01"
