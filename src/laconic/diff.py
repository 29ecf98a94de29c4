"""What differs between two programs, by what they hold and compute and not by the lines of their text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from laconic.align import Alignment, align
from laconic.ir.metrics.differences import bit_equal, max_abs
from laconic.ir.program import Entry, Program, Role
from laconic.ir.text import alias_text, print_node, reference, tree_text, value, weight_text
from laconic.ir.types import name_text, value_text

#: Weights are compared this many elements at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Change:
    """A line of the one program, a line of the other: gone without `after`, new without `before`. `note` says what the
    lines do not."""

    before: str | None
    after: str | None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The changes of one part: "facts", "sizes", "weights", "entry forward"."""

    name: str
    changes: list[Change]


@dataclass(frozen=True)
class Diff:
    """All sections in which something differs, and (nodes, weight bytes) of both programs."""

    before: tuple[int, int]
    after: tuple[int, int]
    sections: list[Section] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.sections

    def to_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "before": {"nodes": self.before[0], "weight_bytes": self.before[1]},
            "after": {"nodes": self.after[0], "weight_bytes": self.after[1]},
            "sections": [
                {
                    "name": section.name,
                    "changes": [{"before": c.before, "after": c.after, "note": c.note} for c in section.changes],
                }
                for section in self.sections
            ],
        }


def diff_programs(before: Program, after: Program) -> Diff:
    """Compare two programs: facts, dynamic sizes, weights (with their bytes), and every entry."""
    sections = [
        Section("facts", _lines(_facts(before), _facts(after))),
        Section("sizes", _lines(_sizes(before), _sizes(after))),
        Section("weights", _weights(before, after)),
    ]
    for name in dict.fromkeys([*before.entries, *after.entries]):
        sections.append(Section(f"entry {name_text(name)}", _entry(before, after, name)))
    summaries = [(program.node_count(), program.weight_bytes()) for program in (before, after)]
    return Diff(summaries[0], summaries[1], [section for section in sections if section.changes])


def _lines(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """Named lines that are gone, new, or say something else."""
    names = dict.fromkeys([*before, *after])
    pairs = ((before.get(name), after.get(name)) for name in names)
    return [Change(old, new) for old, new in pairs if old != new]


def _facts(program: Program) -> dict[str, str]:
    return {key: f"fact {name_text(key)} = {json.dumps(fact)}" for key, fact in program.facts.items()}


def _sizes(program: Program) -> dict[str, str]:
    return {
        symbol.name: f"size {name_text(symbol.name)} in [{symbol.low}, {'inf' if symbol.high is None else symbol.high}]"
        for symbol in program.symbols.values()
    }


def _weights(before: Program, after: Program) -> list[Change]:
    changes = []
    old, new = _table(before), _table(after)
    for name in dict.fromkeys([*old, *new]):
        note = _content(before, after, name) if name in old and name in new else ""
        if old.get(name) != new.get(name) or note.startswith("other"):
            changes.append(Change(old.get(name), new.get(name), note))
    return changes


def _table(program: Program) -> dict[str, str]:
    """A line for each row and alias."""
    rows = {name: weight_text(weight, program.names) for name, weight in program.weights.items()}
    aliases = {name: f"alias {reference(name)} = {alias_text(alias)}" for name, alias in program.aliases.items()}
    return rows | aliases


def _content(before: Program, after: Program, name: str) -> str:
    """How the values compare that a name leads to in both; nothing to say where the name leads nowhere."""
    old, new = before.value_of(name), after.value_of(name)
    if old is None or new is None:
        return ""
    if old is new or bit_equal(old, new):
        return "same bytes"
    if old.shape != new.shape or old.dtype != new.dtype or not old.is_floating_point():
        return "other content"
    return f"other content, max-abs {_distance(old, new):.3g}"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    pieces = zip(torch.split(a.detach().flatten(), _CHUNK), torch.split(b.detach().flatten(), _CHUNK), strict=True)
    return max((max_abs(x, y) for x, y in pieces), default=0.0)


def _entry(before: Program, after: Program, name: str) -> list[Change]:
    if name not in before.entries or name not in after.entries:
        here = before.entries.get(name) or after.entries[name]
        line = f"entry {name_text(name)} with {sum(1 for _ in here.calls())} nodes"
        return [Change(line, None) if name in before.entries else Change(None, line)]
    found = align(before, after, name)
    return [
        *_lines(_interface(before, name), _interface(after, name)),
        *_nodes(before, after, name, found),
        *_outputs(before, after, name, found),
    ]


def _interface(program: Program, name: str) -> dict[str, str]:
    """A line for each input, each argument and the tree of results."""
    entry = program.entries[name]
    nodes = entry.input_nodes()
    lines = {}
    for declared, node in zip(entry.inputs, nodes, strict=True):
        line = f"input %{node.name}: {value_text(node.meta['val'], program.names)}"
        lines[f"input {declared.name}"] = f"{line} in [{value(declared.low)}, {value(declared.high)}]"
    for argument, tree in entry.arguments.items():
        lines[f"argument {argument}"] = f"argument {name_text(argument)} = {tree_text(tree, nodes)}"
    results = [f"result {number}" for number, o in enumerate(entry.outputs) if o.role is Role.RESULT]
    lines["return"] = f"return {tree_text(entry.results, results)}"
    return lines


def _nodes(before: Program, after: Program, name: str, found: Alignment) -> list[Change]:
    """Calls that are gone, new or changed, in the order of the first graph with new ones where they come to stand."""
    old, new = before.entries[name], after.entries[name]
    present = set(found.partner.values())
    changed = dict(found.changed)
    for gone, other in found.stands_in.items():  # one call in the place of another
        if gone.op == "call_function" and gone not in found.partner and other not in present:
            changed[gone] = other
    shown_as_change = set(changed.values())
    changes: list[tuple[tuple[int, int], Change]] = []
    place = {node: k for k, node in enumerate(old.graph.nodes)}
    for node in old.calls():
        if node in changed:
            lines = print_node(node, before.names), print_node(changed[node], after.names)
            changes.append(((place[node], 0), Change(*lines)))
        elif node not in found.partner:
            instead = found.stands_in.get(node)
            note = f"{value(instead)} is read in its place" if instead is not None else ""
            changes.append(((place[node], 0), Change(print_node(node, before.names), None, note)))
    origin = {b: a for a, b in found.partner.items()}
    read_for = {b: a for a, b in found.stands_in.items()}
    last = -1
    for number, node in enumerate(new.graph.nodes):
        if node in origin:
            last = place[origin[node]]
        elif node.op == "call_function" and node not in shown_as_change:
            note = f"read in the place of {value(found.partner[read_for[node]])}" if node in read_for else ""
            changes.append(((last, 1 + number), Change(None, print_node(node, after.names), note)))
    return [change for _, change in sorted(changes, key=lambda item: item[0])]


def _outputs(before: Program, after: Program, name: str, found: Alignment) -> list[Change]:
    """Results and updates that are other values now, by their names."""
    old, new = _values(before.entries[name]), _values(after.entries[name])
    changes = []
    for key in dict.fromkeys([*old, *new]):
        ours, theirs = old.get(key), new.get(key)
        if ours is not None and theirs is not None:
            (a, seen), (b, now_seen) = ours, theirs
            expected = found.now(a) if isinstance(a, fx.Node) else a
            same = expected is b if isinstance(b, fx.Node) else (type(expected), repr(expected)) == (type(b), repr(b))
            if same and seen == now_seen:
                continue
        changes.append(Change(_output_line(key, ours), _output_line(key, theirs)))
    return changes


def _values(entry: Entry) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """What each output is, and the results that show it."""
    return {str(o): (v, o.seen) for o, v in zip(entry.outputs, entry.output_values, strict=True)}


def _output_line(key: str, found: tuple[Any, tuple[str, ...]] | None) -> str | None:
    if found is None:
        return None
    seen = f" seen {', '.join(found[1])}" if found[1] else ""
    return f"{key} = {value(found[0])}{seen}"
