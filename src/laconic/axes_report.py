"""The axes of a program as plain data and in words: `laconic audit --axes`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from laconic.ir.axes import Axes, analyse
from laconic.ir.axes.classes import AxisClass, Coverage, classes, coverage
from laconic.ir.axes.dead import dead_positions
from laconic.ir.program import Program
from laconic.ir.traits import op_name
from laconic.ir.types import size_text


@dataclass(frozen=True)
class AxesAudit:
    """The classes of a program's axes, how much of it is understood, and how many positions of each class are dead."""

    axes: Axes
    classes: tuple[AxisClass, ...]
    coverage: Coverage
    dead: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data: the part `axes` of `laconic audit --json`."""
        program, covered = self.axes.program, self.coverage
        return {
            "calls": covered.calls,
            "known_calls": covered.known,
            "unknown": [
                {
                    "node": node.name,
                    "op": op_name(node.target),
                    "reason": reason,
                    "where": str(program.site(node) or ""),
                }
                for node, reason in self.axes.unknown.items()
            ],
            "misaligned_calls": covered.misfits,
            "weight_axes": covered.axes,
            "free_weight_axes": covered.free,
            "weight_elements": covered.elements,
            "elements_with_a_free_axis": covered.movable,
            "classes": [_class_json(program, *pair) for pair in zip(self.classes, self.dead, strict=True)],
        }


def audit_axes(program: Program) -> AxesAudit:
    """The axes of a program in which functions are inlined."""
    axes = analyse(program)
    found, dead = tuple(classes(axes)), dead_positions(axes).kept
    gone = tuple(int(own.size) - len(dead[own.factor]) if own.factor in dead else 0 for own in found)
    return AxesAudit(axes, found, coverage(axes), gone)


def _class_json(program: Program, own: AxisClass, dead: int) -> dict[str, Any]:
    return {
        "what": own.what,
        "size": own.size if isinstance(own.size, int) else size_text(own.size, program.names),
        "permutable": own.permutable,
        "shrinkable": own.shrinkable,
        "dead": dead,
        "weights": list(own.weights),
        "states": list(own.states),
        "literals": own.literals,
        "pins": [
            {
                "kind": str(kind),
                "reason": why.reason,
                "node": why.node.name if why.node is not None else None,
                "where": str((program.site(why.node) if why.node is not None else None) or ""),
            }
            for kind, why in own.pins
        ],
        "where": str((program.site(own.first) if own.first is not None else None) or ""),
    }


def told(data: dict[str, Any]) -> Iterator[str]:
    """The part `axes` of an audit, in lines. Classes that are alike are told once, with the first place."""
    share = data["elements_with_a_free_axis"] / max(data["weight_elements"], 1)
    yield ""
    yield (
        f"axes: {data['known_calls']:,} of {data['calls']:,} calls have a rule; {data['free_weight_axes']:,} of "
        f"{data['weight_axes']:,} axes of weights are free; {share:.0%} of weight elements have a free axis"
    )
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for own in data["classes"]:
        pins = tuple((pin["kind"], pin["reason"]) for pin in own["pins"])
        key = (own["what"], own["size"], own["permutable"], own["shrinkable"], len(own["weights"]), pins)
        alike.setdefault(key, []).append(own)
    yield f"  {'what it counts':30} {'size':>8} {'classes':>7} {'weights':>7}  what may be done"
    for (what, size, permutable, shrinkable, weights, pins), group in alike.items():
        may = "permute, leave out" if shrinkable else "permute" if permutable else "nothing"
        dead = sum(own["dead"] for own in group)
        held = "; ".join(f"{kind}: {reason}" for kind, reason in pins)
        notes = [f"{dead} dead"] if dead else []
        notes += [f"({held})"] if held else [group[0]["where"]] if group[0]["where"] else []
        yield f"  {what:30} {size:>8} {len(group):>7} {weights:>7}  {may:18} {' '.join(notes)}".rstrip()
    for unknown in data["unknown"][:_SHOWN]:
        yield f"  no rule: %{unknown['node']} {unknown['op']}: {unknown['reason']} {unknown['where']}".rstrip()
    if len(data["unknown"]) > _SHOWN:
        yield f"  and {len(data['unknown']) - _SHOWN} more (--json)"


_SHOWN = 8
