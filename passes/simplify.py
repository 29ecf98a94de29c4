"""simplify: remove calls that change nothing, and compute constants once and for all.

    %a: f32[2, 3] = aten.reshape(%x, [2, 3])
    %b: f32[2, 3] = aten.mul.Tensor(%a, 1)           ->      %c: f32[2, 3] = aten.exp(%x)
    %c: f32[2, 3] = aten.exp(%b)

Rules. *No-op view*: a chain of views that ends at the same bytes of the same storage, sizes and strides. *Copy*: a
clone or cast to the type it has. *Identity*: x * 1, x / 1, x - 0, x ** 1; x + 0 for integers only (-0.0 + 0 is 0.0);
x & True and x | False. *Constant*: a call whose operands are all constants becomes a row of the weight table, if it is
small; parameters are never folded, since that would freeze what is trained. *Number*: a call on sizes with a known
result.

Safe because types, strides and alignment included, are the same before and after (kernels choose by them, and another
kernel rounds differently: before a matrix product a copy of a user's input stays, as that may start anywhere), and
because nothing that a caller receives as a tensor of its own becomes a view of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from laconic.ir.alias import Aliasing, alias_operand, root
from laconic.ir.calibration import Calibration
from laconic.ir.memory import ALIGNMENT, misalignment
from laconic.ir.program import Entry, Kind, Program
from laconic.ir.rewrite import add_constant, by_name, inline_literal, substitute, weight_node
from laconic.ir.torch_private import is_symbolic, storage_key
from laconic.ir.traits import reads_requires_grad, traits
from laconic.ir.types import NumberType, TensorType, same_size, type_of
from laconic.passes.base import Contract, Pass, Plan
from laconic.passes.constants import Constants

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default)

#: op -> the number that, as its second operand, leaves the first as it is, bit for bit.
_NEUTRAL = {
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.sub.Tensor: 0,
    aten.sub.Scalar: 0,
    aten.pow.Tensor_Scalar: 1,
}
_NEUTRAL_INTEGER = {**_NEUTRAL, aten.add.Tensor: 0, aten.add.Scalar: 0}
_LOGIC = {
    aten.__and__.Tensor: True,
    aten.bitwise_and.Tensor: True,
    aten.logical_and.default: True,
    aten.__or__.Tensor: False,
    aten.bitwise_or.Tensor: False,
    aten.logical_or.default: False,
}


@dataclass(frozen=True)
class Simplify(Pass):
    """`max_bytes`: constants larger than this are left to be computed. `values`: fold what is computed from buffers
    and lifted constants too, not from literals alone."""

    max_bytes: int = 65536
    values: bool = True

    name: ClassVar[str] = "simplify"
    summary: ClassVar[str] = "fold constants, remove identities, no-op casts and views"
    contract: ClassVar[Contract] = Contract.EXACT

    @property
    def reads_values(self) -> bool:
        return self.values

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        actions: list[dict[str, Any]] = []
        tensors: dict[str, torch.Tensor] = {}
        near: list[str] = []
        for entry in program.entries.values():
            constants = Constants(program, entry, read_weights=self.values)
            folded = constants.frontier(self.max_bytes, Aliasing(entry))
            actions += _identities(program, entry, constants, folded, near)
            for node, value in folded.items():
                name = f"folded_{entry.name}_{node.name}"  # no dot: a part might be a method of a module
                tensors[name] = value
                actions.append(_action("constant", entry, node, constant=name))
        reason = "no call is an identity or a constant"
        if near:
            reason = "what a copy or identity is made of may start elsewhere in memory, and kernels round by that: "
            reason += ", ".join(f"%{name}" for name in near[:4])
        return Plan(self.spec, tuple(actions), tensors, reason)

    def rewrite(self, program: Program, plan: Plan) -> None:
        for entry in program.entries.values():
            mine = [a for a in plan.actions if a["entry"] == entry.name]
            substitute(entry, {a["node"]: a["with"] for a in mine if "with" in a})
            nodes, rows = by_name(entry), entry.weight_nodes()
            for action in mine:
                if "constant" in action:
                    row = add_constant(program, action["constant"], plan.tensors[action["constant"]])
                    old, new = nodes[action["node"]], weight_node(program, entry, row, rows)
                    old.replace_all_uses_with(new)
                    entry.graph.erase_node(old)
                elif "number" in action:
                    inline_literal(entry, nodes[action["node"]], action["number"])


def _action(rule: str, entry: Entry, node: fx.Node, **what: Any) -> dict[str, Any]:
    return {"rule": rule, "entry": entry.name, "node": node.name, "site": node.meta.get("site"), **what}


def _identities(
    program: Program, entry: Entry, constants: Constants, folded: Mapping[fx.Node, Any], near: list[str]
) -> Iterator[dict[str, Any]]:
    """Actions for calls, but `folded` ones, that equal a value that stands before them, or a number. The names of those
    that do, but for whose users a kernel might be another, go to `near`."""
    aliasing = Aliasing(entry)
    returned = {v for v in entry.output_values if isinstance(v, fx.Node)}
    for node in entry.calls():
        if node in folded or not traits(node).pure:
            continue
        value = node.meta["val"]
        if isinstance(value, (bool, int, float)) and not is_symbolic(value):
            if node not in returned:
                yield _action("number", entry, node, number=value)
            continue
        for rule, same in _equals(node, constants):
            if aliasing.escapes(node) and not folded.keys().isdisjoint(aliasing.chain(same)):
                continue  # callers would receive the row that the constant becomes
            if not aliasing.may_replace(node, same):
                continue
            if not _same_kernels(program, node, aliasing.now(same), fresh=rule != "no-op view"):
                near.append(node.name)
            else:
                aliasing.replaced(node, same)
                yield _action(rule, entry, node, **{"with": same.name})
                break


def _same_kernels(program: Program, node: fx.Node, same: fx.Node, *, fresh: bool) -> bool:
    """Whether users of `node` choose the same kernels for `same`, given that `node` is memory of its own if `fresh`."""
    if same.meta.get("kind") == Kind.PARAMETER and any(reads_requires_grad(user) for user in node.users):
        return False
    return not fresh or _starts_aligned(program, same) or not _alignment_matters(node)


def _alignment_matters(node: fx.Node) -> bool:
    """Whether a user of `node`, or of a view of it, may choose a kernel by where it starts: all but pointwise ops."""
    for user in node.users:
        if alias_operand(user) is node:
            if _alignment_matters(user):
                return True
        elif not (user.op == "call_function" and (traits(user).pointwise or user.target in _COPIES)):
            return True
    return False


def _equals(node: fx.Node, constants: Constants) -> Iterator[tuple[str, fx.Node]]:
    """Earlier values that `node` equals bit for bit, with the rule that says so, best first."""
    source = _same_view(node)
    if source is not None:
        yield "no-op view", source
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return
    if node.target in _COPIES and _identical(node, first):
        yield "copy", first
    if _is_neutral(node) and _identical(node, first):
        yield "identity", first
    if node.target in _LOGIC and len(node.args) == 2:
        second = node.args[1]
        for kept, other in ((first, second), (second, first)):
            if not isinstance(kept, fx.Node) or not _identical(node, kept) or kept.meta["val"].dtype != torch.bool:
                continue  # True is 1 to a whole number
            if _all_are(constants, other, _LOGIC[node.target]):
                yield "identity", kept


def _starts_aligned(program: Program, node: fx.Node) -> bool:
    """Whether a value surely starts on the boundary that a fresh copy of it would start on.

    A user's input may start anywhere, and so may a view of some rows.
    """
    value, source = node.meta["val"], root(node)
    offset = type_of(value.storage_offset())
    if not isinstance(offset, NumberType) or not isinstance(offset.value, int):
        return False
    start = offset.value * value.element_size()
    if source.op == "placeholder":
        if source.meta["kind"] == Kind.INPUT:
            return False
        start += misalignment(program.weights[source.meta["name"]].value)
    return bool(start % ALIGNMENT == 0)


def _same_view(node: fx.Node) -> fx.Node | None:
    """The earliest value that `node`, through views alone, shows unchanged."""
    found, step = None, alias_operand(node)
    while step is not None:
        if _identical(node, step) and _same_bytes(node.meta["val"], step.meta["val"]):
            found = step
        step = alias_operand(step)
    return found


def _same_bytes(a: Any, b: Any) -> bool:
    return (
        storage_key(a) == storage_key(b)
        and same_size(type_of(a.storage_offset()).value, type_of(b.storage_offset()).value)  # type: ignore[union-attr]
        and a.is_conj() == b.is_conj()
        and a.is_neg() == b.is_neg()
    )


def _identical(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have one type, strides of all axes included."""
    x, y = type_of(a.meta["val"]), type_of(b.meta["val"])
    return (
        isinstance(x, TensorType)
        and isinstance(y, TensorType)
        and (x.dtype, x.device, len(x.shape)) == (y.dtype, y.device, len(y.shape))
        and all(same_size(p, q) for p, q in zip(x.shape + x.stride, y.shape + y.stride, strict=True))
    )


def _is_neutral(node: fx.Node) -> bool:
    first: Any = node.args[0]
    value = first.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool:
        return False
    integer = not (value.dtype.is_floating_point or value.dtype.is_complex)
    table = _NEUTRAL_INTEGER if integer else _NEUTRAL
    if node.target not in table or len(node.args) != 2 or value.dtype.is_complex:
        return False
    if "rounding_mode" in node.kwargs or node.kwargs.get("alpha", 1) != 1:
        return False
    number = node.args[1]
    if not isinstance(number, (int, float)) or number != table[node.target]:
        return False
    return number != 0 or math.copysign(1, number) > 0  # x - (-0.0) makes 0.0 of -0.0


def _all_are(constants: Constants, operand: Any, wanted: bool) -> bool:
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], torch.Tensor):
        return False
    if operand.meta["val"].dtype != torch.bool or not constants.known(operand):
        return False
    return bool((constants.value(operand) == wanted).all())
