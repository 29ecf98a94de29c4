"""Products with a weight: y = x M + b, where M is a row of the weight table. What folding and transposing need of them.

Seen as [groups, rows, columns, *kernel], a weight's rows or its columns run over the output channels:

    linear(x, W, b), conv(x, W, b)                          rows are outputs
    matmul(x, W), mm(x, W), addmm(b, x, W), conv_transpose  columns are outputs

and a transpose between the row and the call turns that about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from laconic.ir.program import Entry, Kind, Program
from laconic.ir.rewrite import insert_call, set_argument
from laconic.ir.torch_private import storage_key
from laconic.ir.traits import argument
from laconic.ir.types import TensorType, type_of

aten = torch.ops.aten


@dataclass(frozen=True)
class _Form:
    """Which arguments of an op are x, W and b; whether the rows of W are outputs; how many kernel axes W has."""

    data: str
    weight: str
    bias: str | None
    outputs_first: bool
    kernel: int = 0


def _convolutions() -> dict[Any, _Form]:
    forms = {}
    for k, plain in enumerate((aten.conv1d, aten.conv2d, aten.conv3d), 1):
        for op in (plain.default, plain.padding):
            forms[op] = _Form("input", "weight", "bias", True, k)
    transposed = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
    for k, op in enumerate(transposed, 1):
        forms[op] = _Form("input", "weight", "bias", False, k)
    return forms


_MATRIX = {
    aten.linear.default: _Form("input", "weight", "bias", True),
    aten.matmul.default: _Form("self", "other", None, False),
    aten.mm.default: _Form("self", "mat2", None, False),
    aten.addmm.default: _Form("mat1", "mat2", "self", False),
}
_FORMS: Mapping[Any, _Form] = {**_MATRIX, **_convolutions()}


@dataclass(frozen=True)
class Product:
    """A call that multiplies `data` by the row whose placeholder is `weight`, through transposes (`views`), and adds
    `bias`. `axis` is where the channels stand in data and result, counted from behind."""

    entry: Entry = field(compare=False)
    node: fx.Node
    data: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    views: tuple[fx.Node, ...]
    outputs_first: bool
    groups: int
    axis: int

    @property
    def row(self) -> str:
        return str(self.weight.meta["name"])

    @property
    def matrix(self) -> bool:
        return self.axis == -1

    def sizes(self) -> tuple[int, int]:
        """How many input and output channels there are."""
        rows, columns = (int(n) for n in self.weight.meta["val"].shape[:2])
        inputs, outputs = (columns, rows) if self.outputs_first else (rows, columns)
        return (inputs * self.groups, outputs) if self.outputs_first else (inputs, outputs * self.groups)


def product(entry: Entry, node: fx.Node) -> Product | None:
    """The product that a call is, if its weight is a row of the weight table as it is or transposed."""
    form = _FORMS.get(node.target) if node.op == "call_function" else None
    if form is None or not (form.bias is None or _plain_sum(node)):
        return None
    data, operand = argument(node, form.data), argument(node, form.weight)
    bias = argument(node, form.bias) if form.bias else None
    views: list[fx.Node] = []
    while isinstance(operand, fx.Node) and is_transpose(operand):
        views.append(operand)
        operand = operand.args[0]
    if not isinstance(data, fx.Node) or not isinstance(operand, fx.Node) or not _is_row(operand):
        return None
    if operand.meta["val"].dim() != 2 + form.kernel or not operand.meta["val"].numel() or (views and form.kernel):
        return None
    if not {data, bias}.isdisjoint((operand, *views)):
        return None
    if form.kernel and data.meta["val"].dim() != 2 + form.kernel:
        return None  # a sample without a batch axis
    groups = int(argument(node, "groups")) if form.kernel else 1
    first = form.outputs_first == (len(views) % 2 == 0)
    found = Product(entry, node, data, operand, bias, tuple(views), first, groups, -1 - form.kernel)
    return found if bias is None or tuple(bias.meta["val"].shape) == (found.sizes()[1],) else None


def _plain_sum(node: fx.Node) -> bool:
    return node.target is not aten.addmm.default or (argument(node, "beta") == 1 and argument(node, "alpha") == 1)


def _is_row(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["kind"] not in (Kind.INPUT, Kind.STATE)


def is_transpose(node: fx.Node) -> bool:
    """Whether a call is the transpose of a matrix."""
    if node.op != "call_function" or node.target not in (aten.t.default, aten.permute.default, aten.transpose.int):
        return False
    kind = type_of(node.meta["val"])
    if not isinstance(kind, TensorType) or len(kind.shape) != 2:
        return False
    if node.target is aten.permute.default:
        return [a % 2 for a in argument(node, "dims")] == [1, 0]
    return node.target is aten.t.default or argument(node, "dim0") % 2 != argument(node, "dim1") % 2


def products_of(program: Program, row: str) -> tuple[list[Product], bool]:
    """The products that multiply by a row, in all entries, and whether that is all that the row is used for."""
    found: list[Product] = []
    alone = True
    for entry in program.entries.values():
        waiting = [entry.weight_nodes()[row]] if row in entry.weight_nodes() else []
        while waiting:
            source = waiting.pop()
            for user in source.users:
                as_product = product(entry, user)
                if as_product is not None and source in (as_product.weight, *as_product.views):
                    found.append(as_product)
                elif is_transpose(user):
                    waiting.append(user)
                else:
                    alone = False
    return found, alone


def shares_memory(program: Program, row: str) -> bool:
    """Whether another row lies in the same storage, so that this one's bytes are not freed with it."""
    storage = storage_key(program.weights[row].value)
    return sum(storage_key(w.value) == storage for w in program.weights.values()) > 1


def rewrite_product(
    program: Program, old: Product, weight: fx.Node, bias: fx.Node | None, *, first: bool, by: str
) -> None:
    """Let a product multiply by another row, which `first` says has the outputs as its rows, and add another bias.

    A matrix product becomes the plainest op that says it (`plainest`). Transposes that only it read are removed.
    """
    node, graph = old.node, old.entry.graph
    if old.matrix:
        data = argument(node, _FORMS[node.target].data)  # may have been rewritten since `old` was read
        target = plainest(old, bias is not None, first)
        if target is None:
            weight = insert_call(program, old.entry, node, aten.permute.default, (weight, [1, 0]), by=by, like=node)
            target = aten.linear.default
        args: tuple[Any, ...] = (data, weight) if bias is None else (data, weight, bias)
        args = (bias, data, weight) if target is aten.addmm.default else args
        if target is node.target and (args, {}) == (node.args, node.kwargs):
            return
        if target is node.target:
            node.args, node.kwargs = args, {}
            node.meta["by"] = by
        else:
            node.replace_all_uses_with(insert_call(program, old.entry, node, target, args, by=by, like=node))
            graph.erase_node(node)
    else:
        set_argument(node, "weight", weight, by=by)
        set_argument(node, "bias", bias, by=by)
    for view in old.views:
        if not view.users:
            graph.erase_node(view)


def plainest(product: Product, biased: bool, first: bool) -> Any:
    """The op that says a matrix product without a transpose: `linear` for a row with the outputs as its rows (`first`),
    else `matmul`, or `addmm` with a bias and data of two axes; None if there is no such op."""
    if first:
        return aten.linear.default
    if not biased:
        return aten.mm.default if product.node.target is aten.mm.default else aten.matmul.default
    return aten.addmm.default if product.data.meta["val"].dim() == 2 else None
