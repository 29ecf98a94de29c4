"""What an entry costs to compute: FLOPs as an expression of the dynamic sizes, and as a number at given ones.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention, as in
`torch.utils.flop_counter`; additions of a bias are not. Elements written by pointwise ops are counted apart. A grouped
product counts the rows that are routed, an attention all pairs of queries and keys, masked or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.outline import inline
from laconic.ir.program import Entry, Program
from laconic.ir.traits import op_name, traits
from laconic.ir.types import Size, TensorType, ValueType, type_of

#: A size as it is counted: itself, or its number at given sizes.
Measure = Callable[[Size], Any]
Shape = tuple[Any, ...]
_Rule = Callable[[fx.Node, Callable[[Any], Shape]], Any]


@dataclass(frozen=True)
class NodeCost:
    """One call: its FLOPs, and the elements it writes if it is pointwise."""

    node: fx.Node
    flops: Any
    pointwise: Any


@dataclass(frozen=True)
class Cost:
    """An entry's costs: totals, and the calls that have some, in order. `uncounted` names ops that multiply matrices
    inside and that no formula here covers, so that the total is known to lack them."""

    flops: Any
    pointwise: Any
    nodes: tuple[NodeCost, ...] = field(repr=False)
    uncounted: tuple[str, ...] = ()


def symbolic_cost(entry: Entry) -> Cost:
    """Costs as ints or sympy expressions of the dynamic sizes."""
    return _cost(entry, lambda size: size)


def cost_at(program: Program, entry: Entry, sizes: Mapping[str, int] | None = None) -> Cost:
    """Costs as ints at these sizes (by display name; the example's where not given)."""
    return _cost(entry, measure_at(program, sizes))


def flops_at(program: Program, sizes: Mapping[str, int] | None = None) -> int:
    """FLOPs of one call of every entry, at these sizes (by display name; the example's where not given)."""
    program, measure = inline(program), measure_at(program, sizes)
    return sum(int(flops_of(node, measure)) for entry in program.entries.values() for node in entry.calls())


def measure_at(program: Program, sizes: Mapping[str, int] | None = None) -> Measure:
    """What a size of this program is at these sizes. Raises UsageError for the name of no dynamic size."""
    names = {symbol.name for symbol in program.symbols.values()}
    for name in sizes or {}:
        if name not in names:
            raise UsageError(f"the model has no dynamic size {name!r}", hint=did_you_mean(name, names))
    values = {key: (sizes or {}).get(symbol.name, symbol.hint) for key, symbol in program.symbols.items()}
    known: dict[Any, int] = {}

    def measure(size: Size) -> int:
        if isinstance(size, int):
            return size
        if size not in known:
            known[size] = int(size.xreplace({s: sympy.Integer(values[s.name]) for s in size.free_symbols}))
        return known[size]

    return measure


def is_product(node: fx.Node) -> bool:
    """Whether a call multiplies matrices or convolves (attention apart)."""
    return node.op == "call_function" and op_name(node.target) in _PRODUCTS


def is_attention(node: fx.Node) -> bool:
    """Whether a call is a whole attention: softmax(q k^T) v."""
    return node.op == "call_function" and op_name(node.target) in _ATTENTION


def flops_of(node: fx.Node, measure: Measure = lambda size: size) -> Any:
    """The FLOPs of one call; 0 for what is no matrix product, convolution or attention."""
    rule = _RULES.get(op_name(node.target))
    return rule(node, lambda operand: _shape(operand, measure)) if rule else 0


def pointwise_of(node: fx.Node, measure: Measure = lambda size: size) -> Any:
    """The elements that a pointwise call writes; 0 for any other."""
    kind = type_of(node.meta["val"])
    if not traits(node).pointwise or not isinstance(kind, TensorType):
        return 0
    return _product(measure(size) for size in kind.shape)


def result_bytes(kind: ValueType | None, measure: Measure = lambda size: size) -> Any:
    """The bytes of a tensor's elements; 0 for what is no tensor."""
    return kind.dtype.itemsize * _product(map(measure, kind.shape)) if isinstance(kind, TensorType) else 0


def _cost(entry: Entry, measure: Measure) -> Cost:
    nodes, uncounted = [], set()
    for node in entry.calls():
        found = NodeCost(node, flops_of(node, measure), pointwise_of(node, measure))
        if found.flops != 0 or found.pointwise != 0:
            nodes.append(found)
        if op_name(node.target) in _UNCOUNTED:
            uncounted.add(op_name(node.target))
    return Cost(_sum(n.flops for n in nodes), _sum(n.pointwise for n in nodes), tuple(nodes), tuple(sorted(uncounted)))


def _sum(terms: Iterable[Any]) -> Any:
    terms = list(terms)
    return sum(terms) if all(isinstance(t, int) for t in terms) else sympy.expand(sympy.Add(*terms))


def _product(sizes: Iterable[Any]) -> Any:
    return math.prod(sizes, start=1)


def _shape(operand: Any, measure: Measure) -> Shape:
    kind = type_of(operand.meta["val"])
    assert isinstance(kind, TensorType)
    return tuple(measure(size) for size in kind.shape)


# Formulas: each takes the call and a way to ask for a tensor operand's sizes.


def _matrix_product(left: int) -> _Rule:
    """2 x elements of the result x length of the sums, which is the last axis of the operand at `left`."""
    return lambda node, shape: 2 * _product(shape(node)) * shape(node.args[left])[-1]


def _grouped(node: fx.Node, shape: Callable[[Any], Shape]) -> Any:
    rows, weights = shape(node.args[0]), shape(node.args[1])
    if len(rows) == len(weights) == 2:  # the summed axis is cut into groups
        return 2 * rows[0] * weights[1] * rows[1]
    return 2 * _product(shape(node)) * rows[-1]


def _convolution(node: fx.Node, shape: Callable[[Any], Shape]) -> Any:
    """The sums are over a kernel and the input channels of one group, which are a weight's axes but the first."""
    return 2 * _product(shape(node)) * _product(shape(node.args[1])[1:])


def _transposed(node: fx.Node, shape: Callable[[Any], Shape]) -> Any:
    return 2 * _product(shape(node.args[0])) * _product(shape(node.args[1])[1:])


def _attention(node: fx.Node, shape: Callable[[Any], Shape]) -> Any:
    query, key, value = (shape(operand) for operand in node.args[:3])
    return 2 * _product(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node, shape: Callable[[Any], Shape]) -> Any:
    """Operands are multiplied left to right; an axis is summed as soon as nothing to come needs it. An outer product
    without a sum has no additions and counts as pointwise."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    inputs, _, result = equation.partition("->")
    subscripts = inputs.split(",")
    if "." in equation or len(subscripts) < 2:
        return 0
    if "->" not in equation:
        result = "".join(c for c in sorted(set(inputs) - {","}) if inputs.count(c) == 1)
    sizes: dict[str, Any] = {}
    for letters, operand in zip(subscripts, operands, strict=True):
        for letter, size in zip(letters, shape(operand), strict=True):
            sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    total, held = 0, set(subscripts[0])
    for k, letters in enumerate(subscripts[1:], 1):
        joint = held | set(letters)
        kept = joint & (set(result) | set("".join(subscripts[k + 1 :])))
        if kept != joint:
            total = total + 2 * _product(sizes[letter] for letter in sorted(joint))
        held = kept
    return total


_PRODUCTS: dict[str, _Rule] = {
    **dict.fromkeys(("aten.linear", "aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot"), _matrix_product(0)),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmv"), _matrix_product(1)),
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d"), _convolution),
    **dict.fromkeys(("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding"), _convolution),
    **dict.fromkeys(
        ("aten.conv_transpose1d", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"), _transposed
    ),
    "aten.convolution": lambda node, shape: (_transposed if node.args[6] else _convolution)(node, shape),
    "aten.einsum": _einsum,
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
}
_ATTENTION = (
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
)
_RULES: dict[str, _Rule] = {**_PRODUCTS, **dict.fromkeys(_ATTENTION, _attention)}
_UNCOUNTED = {
    *(f"aten.{cell}.{form}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("input", "data")),
    *(f"aten.{cell}" for cell in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")),
    *(
        f"aten.{name}"
        for name in ("bilinear", "addbmm", "chain_matmul", "linalg_multi_dot", "tensordot", "_cdist_forward")
    ),
}
