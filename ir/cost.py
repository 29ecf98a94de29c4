"""What an entry costs to compute: FLOPs as an expression of the dynamic sizes, and as a number at given ones.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention, as in
`torch.utils.flop_counter`; additions of a bias are not. Elements written by pointwise ops are counted apart. A grouped
product counts the rows that are routed, an attention all pairs of queries and keys, masked or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx
from torch.utils.flop_counter import flop_registry

from laconic.ir.inputs import check_sizes
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
    """What a size of this program is at these sizes. Raises UsageError for the name of no dynamic size, and for a size
    that is out of its range."""
    check_sizes(program, sizes or {})
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
        if _is_uncounted(op_name(node.target)):
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


def einsum_subscripts(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The subscripts of each operand and of the result, written out: a character for each axis, those that an ellipsis
    stands for included (their own, aligned on the right), and the result's where the equation leaves it out."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    letters = "".join(subscripts).replace("...", "")
    counts = [rank - len(s) + 3 if "..." in s else 0 for s, rank in zip(subscripts, ranks, strict=True)]
    dots = "".join(chr(ord("\u0100") + k) for k in range(max(counts)))  # no letter that an equation can have
    if not arrow:
        result = "..." + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    written = [s.replace("...", dots[len(dots) - n :]) for s, n in zip(subscripts, counts, strict=True)]
    return written, result.replace("...", dots)


def _inner(node: fx.Node, shape: Callable[[Any], Shape]) -> Any:
    """Sums over the last axes of both; a number among the operands only scales."""
    left, right = shape(node.args[0]), shape(node.args[1])
    return 2 * _product(shape(node)) * left[-1] if left and right else 0


def _einsum(node: fx.Node, shape: Callable[[Any], Shape]) -> Any:
    """Operands are multiplied left to right; an axis is summed as soon as nothing to come needs it. An outer product
    without a sum has no additions and counts as pointwise."""
    operands: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    subscripts, result = einsum_subscripts(str(node.args[0]), [len(shape(operand)) for operand in operands])
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
    **dict.fromkeys(("aten.linalg_matmul", "aten.vdot"), _matrix_product(0)),
    "aten.inner": _inner,
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
#: Ops, without their overloads, that multiply matrices inside.
_HOLDS_PRODUCTS = {
    *map(str, flop_registry),
    *_RULES,
    *(f"aten.{cell}{part}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for part in ("", "_cell")),
    *(
        f"aten.{name}"
        for name in (
            *("addbmm", "addr", "sspaddmm", "chain_matmul", "matrix_power", "matrix_exp", "tensordot", "kron"),
            *("bilinear", "_trilinear", "cdist", "_cdist_forward", "_euclidean_dist", "pdist", "_pdist_forward"),
            *("cov", "corrcoef", "cholesky", "cholesky_solve", "cholesky_inverse", "inverse", "pinverse", "det"),
            *("logdet", "slogdet", "lu_solve", "triangular_solve", "qr", "svd", "geqrf", "ormqr", "orgqr", "lstsq"),
            *("_int_mm", "_addmm_activation", "_scaled_grouped_mm", "_weight_int8pack_mm", "_weight_int4pack_mm"),
            *("_convolution_mode", "conv_tbc", "mkldnn_rnn_layer", "_native_multi_head_attention"),
        )
    ),
}
_NO_PRODUCTS = {f"aten.linalg_{name}" for name in ("vector_norm", "norm", "cross", "diagonal", "vander", "_powsum")}


def _is_uncounted(name: str) -> bool:
    """Whether an op multiplies matrices inside, as all of linear algebra but norms does, and no formula covers it."""
    base = ".".join(name.split(".")[:2])
    algebra = base.startswith(("aten.linalg_", "aten._linalg_")) and base not in _NO_PRODUCTS
    return name not in _RULES and (algebra or base in _HOLDS_PRODUCTS)
