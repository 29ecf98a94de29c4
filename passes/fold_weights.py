"""fold-weights: let a weight say what the graph does to it, or to what it multiplies.

    %y = aten.addmm(@b, %x, @w)                       %y = aten.linear(%x, @w_transposed, @b)
    %y = aten.matmul(%x, aten.t(@w))           ->     %y = aten.linear(%x, @w)
    %c = aten.conv2d(%x, @w)
    %n = aten.batch_norm(%c, ...)              ->     %c = aten.conv2d(%x, @folded_w, @folded_w_bias)
    %h = aten.layer_norm(%x, [8], @g, @s)             %h = aten.layer_norm(%x, [8])
    %y = aten.linear(%h, @w, @b)               ->     %y = aten.linear(%h, @folded_w, @folded_b)

*Transposes*: a matrix that products alone read, all of them with the outputs as its columns, is stored transposed; a
transpose of a weight in the graph becomes the other op. *Scales*: constants that multiply, divide, shift or normalise
(in inference) the channels of a product's result, or of what only products read, go into weight and bias.

Nothing is stored twice: a weight that anything else reads, as a tied embedding does, stays, and so does a scale whose
folding would need more bytes for a bias than it saves. Refused with the reason: constants that depend on inputs or are
0, infinite or NaN; other dtypes; another axis than the channels; a weight that would over- or underflow.

Sums are rounded in another order: the contract is `tolerance`. New weights are computed in float64 and rounded once;
the plan holds the scales. A transposed weight keeps its kind, and its old name says where it went. A folded one becomes
a constant under a new name; the old name leads nowhere, since its values stand nowhere any more, and the plan says what
it became. Who goes on training says `fold-weights{trainable=no}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from laconic.ir.calibration import Calibration
from laconic.ir.program import Alias, Entry, Program
from laconic.ir.rewrite import (
    add_constant,
    dead_nodes,
    drop_unused,
    drop_weight,
    find,
    folded_name,
    set_argument,
    used_rows,
    weight_node,
)
from laconic.passes.base import Contract, Pass, Plan
from laconic.passes.fold_scales import Fold, Scaling, find_folds, new_bias, scaled
from laconic.passes.products import Product, plainest, products_of, rewrite_product, shares_memory

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldWeights(Pass):
    """`transposes`: fold transposes. `scales`: fold scales and shifts. `trainable`: fold scales into trained weights,
    and trained scales."""

    transposes: bool = True
    scales: bool = True
    trainable: bool = True

    name: ClassVar[str] = "fold-weights"
    summary: ClassVar[str] = "fold transposes, scales, shifts and norms' weights into the weights of products"
    contract: ClassVar[Contract] = Contract.TOLERANCE

    @property
    def reads_values(self) -> bool:
        return True

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        near: list[str] = []
        tensors: dict[str, torch.Tensor] = {}
        actions: list[dict[str, Any]] = []
        if self.scales:
            actions += [_scale(fold, tensors) for fold in find_folds(program, trainable=self.trainable, near=near)]
        if self.transposes:
            actions += _transposes(program, near)
        reason = "no product with a weight has a transpose, scale or shift beside it"
        if near:
            reason = "what is beside a product cannot be folded: " + ", ".join(list(dict.fromkeys(near))[:4])
        return Plan(self.spec, tuple(actions), tensors, reason)

    def rewrite(self, program: Program, plan: Plan) -> None:
        used = used_rows(program)
        dead = {entry.name: set(map(str, dead_nodes(entry))) for entry in program.entries.values()}
        scalings: dict[str, Scaling] = {}
        turned: dict[str, bool] = {}
        for action in sorted(plan.actions, key=lambda a: a.get("side") == _BEHIND):
            if action["rule"] == _TRANSPOSE:
                turned[action["weight"]] = action["stored"]
                continue
            _route_around(program.entries[action["entry"]], action)
            for into in action["products"]:
                old = scalings.get(into["weight"], Scaling())
                scalings[into["weight"]] = _scaling(old, action, into["node"], plan.tensors)
        for row in dict.fromkeys([*scalings, *turned]):
            _change(program, row, scalings.get(row), turned.get(row, False))
        for entry in program.entries.values():
            for node in dead_nodes(entry):
                if node.name not in dead[entry.name]:
                    entry.graph.erase_node(node)
        drop_unused(program, used)


_TRANSPOSE = "transpose"
_BEFORE, _BEHIND = "before", "behind"


def _scale(fold: Fold, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A fold as plain data; its vectors go to `tensors` under the names of the nodes."""
    what, entry = fold.what, fold.products[0].entry.name
    tensors[f"{entry}.{what.result.name}.scale"] = what.scale.clone()
    tensors[f"{entry}.{what.result.name}.shift"] = what.shift.clone()
    products = []
    for into, offset in zip(fold.products, fold.offsets, strict=True):
        products.append({"node": into.node.name, "weight": into.row, "becomes": folded_name(into.row)})
        if not fold.behind:
            tensors[f"{entry}.{into.node.name}.offset"] = offset.clone()
    return {
        "rule": what.rule,
        "entry": entry,
        "node": what.result.name,
        "site": what.result.meta.get("site"),
        "side": _BEHIND if fold.behind else _BEFORE,
        "source": what.source.name,
        "norm": what.norm.name if what.norm else None,
        "products": products,
    }


def _scaling(old: Scaling, action: Mapping[str, Any], node: str, tensors: Mapping[str, torch.Tensor]) -> Scaling:
    """What an action adds to what becomes of a product."""
    entry, result = action["entry"], action["node"]
    scale, shift = tensors[f"{entry}.{result}.scale"], tensors[f"{entry}.{result}.shift"]
    if action["side"] == _BEHIND:
        return replace(old, outer=scale, shift=shift)
    return replace(old, inner=scale, offset=tensors[f"{entry}.{node}.offset"])


def _route_around(entry: Entry, action: Mapping[str, Any]) -> None:
    """Let what is folded stand for nothing any more: its users read what it was made of; a norm loses its weights."""
    if action["norm"]:
        norm = find(entry, action["norm"])
        for name in ("weight", "bias") if norm.target is aten.layer_norm.default else ("weight",):
            set_argument(norm, name, None, by=FoldWeights.name)
    if action["node"] != action["source"]:
        find(entry, action["node"]).replace_all_uses_with(find(entry, action["source"]))


def _transposes(program: Program, near: list[str]) -> Iterator[dict[str, Any]]:
    """For each matrix: whether to store it transposed, and which products are then written otherwise."""
    for row, weight in program.weights.items():
        if weight.value.dim() != 2 or not weight.value.is_floating_point():
            continue
        uses, alone = products_of(program, row)
        turnable = alone and not shares_memory(program, row)
        stored = bool(uses) and turnable and not any(use.outputs_first for use in uses)
        changed = [use for use in uses if stored or not _plain(use)]
        if changed:
            first = changed[0]
            yield {
                "rule": _TRANSPOSE,
                "entry": first.entry.name,
                "weight": row,
                "site": first.node.meta.get("site"),
                "stored": stored,
                "nodes": [use.node.name for use in changed],
            }
        elif any(not use.outputs_first for use in uses):
            near.append(f"{row} ({'its products read it both ways' if turnable else 'not only products read it'})")


def _plain(use: Product) -> bool:
    """Whether a product with a matrix is said by the op that says it best, the matrix staying as it is stored."""
    target = plainest(use, use.bias is not None, use.outputs_first)
    return use.node.target is target and not use.views if target else len(use.views) == 1


def _change(program: Program, row: str, scaling: Scaling | None, turned: bool) -> None:
    """Give the products that read a weight what it becomes, and a bias if they need another one."""
    uses, _ = products_of(program, row)
    old = program.weights[row]
    biases = {use.node: use.bias for use in uses}
    value, name = old.value, row
    if scaling is not None:
        (into,) = uses
        value, biases[into.node] = scaled(program, into, scaling), _bias(program, into, scaling)
    if value is not old.value:
        name = add_constant(program, folded_name(row), value.t().contiguous() if turned else value)
    elif turned:
        name = _unique(program, f"{row}_transposed")
        program.weights[name] = replace(old, name=name, value=value.t().contiguous())
    for use in uses:
        weight, first = weight_node(program, use.entry, name), use.outputs_first != turned
        rewrite_product(program, use, weight, biases[use.node], first=first, by=FoldWeights.name)
    if name != row:
        drop_weight(program, row, Alias(None) if value is not old.value else Alias(name, transposed=True))


def _bias(program: Program, into: Product, scaling: Scaling) -> fx.Node | None:
    """The placeholder of the bias that a product needs: the one it has if no bit changes."""
    value, name = new_bias(program, into, scaling), f"{into.row}_bias"
    if into.bias is not None:
        name = str(into.bias.meta["name"])
        if value is program.weights[name].value:
            return into.bias
    return None if value is None else weight_node(program, into.entry, add_constant(program, folded_name(name), value))


def _unique(program: Program, name: str) -> str:
    while name in program.weights or name in program.aliases:
        name += "_"
    return name
