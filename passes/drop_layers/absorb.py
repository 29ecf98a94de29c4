"""Into which rows a factor on what a branch adds can be folded: those of its last product, if it alone reads them."""

from __future__ import annotations

from torch import fx

from laconic.ir.depth import Depth
from laconic.ir.structure.reading import rearranges
from laconic.passes.drop_layers.task import Layer
from laconic.passes.products import product


def output_rows(depth: Depth, layer: Layer) -> list[str]:
    """The rows of the matrix, and of the bias, that what a branch adds comes out of; none where it is a sum, or comes
    out of a norm, or where other branches read these rows too."""
    (unit,) = layer.units
    found: set[tuple[str, ...]] = set()
    for name, branch in depth.branches(unit.stream, unit.place).items():
        added = [node for node in branch.add.all_input_nodes if node is not branch.v]
        use = product(depth.program.entries[name], _made(added[0])) if len(added) == 1 else None
        if use is None or use.node not in branch.nodes:
            return []
        bias = [] if use.bias is None else [str(use.bias.meta.get("name", ""))]
        found.add((use.row, *bias))
    rows = found.pop()
    return list(rows) if not found and unit.rows.issuperset(rows) else []


def _made(node: fx.Node) -> fx.Node:
    """The call that computes a value, behind what only lays it out otherwise."""
    while node.op == "call_function" and rearranges(node) and len(node.users) == 1:
        node = node.all_input_nodes[0]
    return node
