"""What passes along axes share: a class of axes as plain data, and one way to apply what a plan says of it.

An action names a class by one of its members: factor `factor` of axis `axis` of the row `weight`. `positions` are the
old positions that it holds afterwards, in their order; `folds` are the calls into whose bias goes what the positions
that are left out add, which the plan's tensors hold by the name of the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from laconic.ir.axes import Axes, Factor, analyse, factors, rewrite
from laconic.ir.axes.labels import Gather
from laconic.ir.axes.positions import old_positions, row_moves
from laconic.ir.errors import UsageError
from laconic.ir.moves import Moves
from laconic.ir.program import Program
from laconic.ir.rewrite import add_constant, drop_unused, find, folded_name, set_argument, used_rows, weight_node
from laconic.ir.traits import argument
from laconic.passes.base import Contract, Pass, Plan


def class_action(axes: Axes, factor: Factor, positions: Sequence[int], rule: str, node: fx.Node) -> dict[str, Any]:
    """A class and the positions that it keeps; `node` is a call that says where it belongs."""
    weight, axis, k = _member(axes, factor)
    return {
        "rule": rule,
        "entry": axes.program.entry_of(node).name,
        "node": node.name,
        "site": node.meta.get("site"),
        "weight": weight,
        "axis": axis,
        "factor": k,
        "size": factor.size,
        "positions": list(positions),
        "folds": [],
    }


def _member(axes: Axes, factor: Factor) -> tuple[str, int, int]:
    """The first row with this factor: its name, the axis, and which of the axis's factors it is."""
    for name, label in axes.rows.items():
        for axis, dim in enumerate(label):
            own = list(dict.fromkeys(factors(dim)))
            if factor in own:
                return name, axis, own.index(factor)
    raise KeyError("the factor stands in no row")


def named(axes: Axes, action: Mapping[str, Any]) -> Factor:
    """The class that an action names. Raises UsageError if there is none like it."""
    label, axis, k = axes.rows.get(action["weight"], ()), action["axis"], action["factor"]
    for factor in list(dict.fromkeys(factors(label[axis] if axis < len(label) else ())))[k : k + 1]:
        if factor.size == action["size"]:
            return factor
    raise UsageError(
        f"axis {action['axis']} of {action['weight']!r} has no part of {action['size']} positions",
        why="the plan was made for another program",
    )


class AxesPass(Pass):
    """A pass of which the plan says what classes of axes keep; it looks at weights, and sums round otherwise."""

    contract: ClassVar[Contract] = Contract.TOLERANCE

    @property
    def reads_values(self) -> bool:
        return True

    def rewrite(self, program: Program, plan: Plan) -> Moves:
        axes, used = analyse(program.clone()), used_rows(program)  # labels are those of what was there before
        kept = {named(axes, action): action["positions"] for action in plan.actions}
        rewrite(axes, kept, by=self.name, soft=True, into=program)
        for entry, name in dict.fromkeys((f["entry"], f["node"]) for action in plan.actions for f in action["folds"]):
            gather = next(
                g for g in axes.gathers if g.node.name == name and axes.program.entry_of(g.node).name == entry
            )
            _fold(axes, kept, gather, plan.tensors[f"{entry}.{name}"], program, by=self.name)
        drop_unused(program, used)
        return row_moves(axes, kept)


def _fold(
    axes: Axes, kept: Mapping[Factor, Sequence[int]], gather: Gather, constants: torch.Tensor, made: Program, *, by: str
) -> None:
    """Add to the bias of a call, in `made`, what its operand's constants add at positions that are left out."""
    assert gather.bias is not None
    entry = made.entries[axes.program.entry_of(gather.node).name]
    matrix, axis = gather.operands[1]
    weight = axes.program.weights[matrix.meta["name"]]
    staying = torch.zeros(len(constants), dtype=torch.bool)
    staying[old_positions(axes.rows[weight.name][axis], kept)] = True
    columns = weight.value.detach().double().movedim(axis, 0)[~staying]
    if columns.dim() > 2:  # a kernel, which a constant meets whole
        columns = columns.flatten(2).sum(2)
    added = constants[~staying].double() @ columns
    bias = argument(gather.node, gather.bias)
    name = f"{weight.name}_bias" if bias is None else bias.meta["name"]
    if bias is not None:
        added = added + axes.program.weights[name].value.detach().double()
    outputs = old_positions(axes.rows[weight.name][1 - axis], kept)
    row = add_constant(made, folded_name(name), added[outputs].to(weight.value.dtype))
    set_argument(find(entry, gather.node.name), gather.bias, weight_node(made, entry, row), by=by)
