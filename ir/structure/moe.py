"""MoE sites: experts, the router that chooses among them, and how the two are joined.

The anchor is a product with a constant of three axes (experts, .., ..): grouped (rows sorted by expert), batched (a
matrix gathered for each row) or dense (all experts on all tokens); or several MLPs of one value that are weighted by
columns of one product of the same value (loop). A down product and the up product before it are paired by the
activation between; from the routing operand the matcher walks back to the top-k, and from there to the router, a
product with as many outputs as there are experts.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import fx

from laconic.ir.cost import is_product
from laconic.ir.structure.activation import Blocked, Leaf, Region, activates, name_activation, region_before
from laconic.ir.structure.mlp import project
from laconic.ir.structure.reading import Linear, Reading, arranged, rearranges, shape_of
from laconic.ir.structure.records import Mlp, Moe, NearMiss
from laconic.ir.traits import op_name

aten = torch.ops.aten

_GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_GATHERS = (aten.index.Tensor, aten.gather.default, aten.index_select.default, aten.repeat_interleave.self_int)
_SUMS = (aten.sum.dim_IntList, aten.sum.default)
_DIVIDES = (aten.div.Tensor,)


@dataclass(frozen=True)
class Expert:
    """A product with one matrix for each expert. `x` are its rows, `route` what says which expert a row belongs to."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    matrix: fx.Node
    experts: int
    inputs: int
    outputs: int
    transposed: bool
    impl: str
    route: fx.Node | None


@dataclass(frozen=True)
class Routing:
    """A top-k choice among a router's outputs. `ways` are the calls from the scores to where rows are weighted."""

    router: Linear
    top_k: int
    score: str
    renormalised: bool


def find_moes(reading: Reading, mlps: list[Mlp], near: list[NearMiss]) -> list[Moe]:
    """The MoE layers of an entry, in order. `mlps` are all MLPs found: shared experts, and experts of a loop."""
    experts = {e.node: e for node in reading.entry.calls() if (e := _expert(reading, node)) is not None}
    found = [_paired(reading, down, experts, mlps, near) for down in experts.values()]
    return [moe for moe in (*found, *_loops(reading, mlps)) if moe is not None]


def _expert(reading: Reading, node: fx.Node) -> Expert | None:
    name = op_name(node.target)
    args: Any = node.args
    if name in _GROUPED:
        return _make(reading, node, args[0], args[1], "grouped", args[2])
    if not is_product(node) or name == "aten.linear" or len(reading.reads(node)) != 2:
        return None
    for x, matrix in permutations(reading.reads(node)):
        gathered = arranged(matrix)
        if gathered.target is aten.index.Tensor and reading.constant(gathered.args[0]):  # type: ignore[arg-type]
            indices: Any = gathered.args[1]
            if len(shape_of(gathered.args[0])) == 3 and len(indices) == 1:  # type: ignore[arg-type]
                return _make(reading, node, x, matrix, "batched", indices[0])
        stacked = reading.constant(matrix) and not reading.constant(x) and len(shape_of(arranged(matrix))) == 3
        if stacked and shape_of(matrix)[0] != 1 and shape_of(node)[0] == shape_of(matrix)[0]:
            return _make(reading, node, x, matrix, "dense", None)
    return None


def _make(reading: Reading, node: fx.Node, x: fx.Node, matrix: fx.Node, impl: str, route: Any) -> Expert | None:
    stored: Any = arranged(matrix)
    if impl == "batched":
        stored = stored.args[0]
    row = reading.weight(stored)
    shape = shape_of(row if row is not None else stored)
    inputs = shape_of(x)[-2] if _columns_last(node, x) else shape_of(x)[-1]
    if len(shape) != 3 or not all(isinstance(n, int) for n in (*shape, inputs)) or inputs not in shape[1:]:
        return None
    shown = shape_of(matrix)[-2:]
    direct = node.args[1] is matrix  # x @ matrix: its inputs are the axis before the last
    axis = -2 if direct else -1
    outputs = shown[-1] if direct else shown[-2]
    if shown[axis] != inputs or not isinstance(outputs, int):
        return None
    transposed = shape[1] == inputs if inputs != outputs else _lies_as_shown(matrix, stored) == direct
    return Expert(node, x, row, stored, shape[0], inputs, outputs, transposed, impl, route)


def _columns_last(node: fx.Node, x: fx.Node) -> bool:
    """Whether rows are columns: matrix @ x."""
    return len(node.args) > 1 and node.args[1] is x


def _lies_as_shown(matrix: fx.Node, stored: fx.Node) -> bool:
    """Whether a matrix is read with the axes that it is stored with."""
    turns = 0
    while matrix is not stored and rearranges(matrix):
        turns += matrix.target in (aten.transpose.int, aten.permute.default)
        matrix = matrix.args[0]  # type: ignore[assignment]
    return turns % 2 == 0


def _paired(
    reading: Reading, down: Expert, experts: dict[fx.Node, Expert], mlps: list[Mlp], near: list[NearMiss]
) -> Moe | None:
    """The MoE whose second product is `down`; None for a first product, which some other one reads."""

    def miss(reason: str) -> None:
        near.append(NearMiss("moe", down.node, reason, str(reading.program.site(down.node) or "")))

    region = region_before(reading, down.x, experts)
    if isinstance(region, Blocked):
        if region.activated:
            miss(f"the second product of experts {region.reason}")
        return None
    if not activates(region):
        return None
    ups = [experts[leaf.product] for leaf in region.leaves]
    if len(ups) > 2 or any((up.experts, up.impl) != (down.experts, down.impl) for up in ups):
        miss("the products before and behind the activation are not of the same experts")
        return None
    routing = _routing(reading, down)
    if isinstance(routing, str):
        miss(routing)
        return None
    x = _before_gather(ups[0].x)
    if not reading.constant(x) and arranged(routing.router.x) is not x:
        miss("the router and the experts read different values")
        return None
    activation, gate = name_activation(reading, region)
    return _record(reading, down, ups, region, gate, activation, routing, x, mlps)


def _record(
    reading: Reading,
    down: Expert,
    ups: list[Expert],
    region: Region,
    gate: Leaf,
    activation: str,
    routing: Routing,
    x: fx.Node,
    mlps: Iterable[Mlp],
) -> Moe:
    gated = len(region.leaves) == 2
    return Moe(
        site=down.node.meta.get("site", -1),
        node=down.node,
        x=x,
        experts=down.experts,
        top_k=routing.top_k,
        width=down.inputs,
        hidden=down.outputs,
        activation=activation,
        gated=gated,
        score=routing.score,
        renormalised=routing.renormalised,
        shared=tuple(mlp.site for mlp in mlps if mlp.x is x),
        impl=down.impl,
        layout=_layout(ups, region) if gated else "none",
        transposed=down.transposed,
        router=project(routing.router),
        up=ups[0].weight,
        down=down.weight,
        nodes=tuple(sorted(_inside(reading, routing.router.node, down.node), key=reading.position.__getitem__)),
    )


def _layout(ups: list[Expert], region: Region) -> str:
    if ups[0].node is not ups[1].node:
        return "apart"
    return "interleaved" if region.leaves[0].step == 2 else "concatenated"


def _inside(reading: Reading, router: fx.Node, down: fx.Node) -> set[fx.Node]:
    return {router, down} | (reading.from_to(router, down) or set())


def _before_gather(node: fx.Node) -> fx.Node:
    """The tokens that rows were gathered from."""
    node = arranged(node)
    while node.target in _GATHERS:
        node = arranged(node.args[0])  # type: ignore[arg-type]
    return node


# Routing


def _routing(reading: Reading, down: Expert) -> Routing | str:
    """Where rows are sent and how they are weighted; or why that is not known."""
    weights = _weights(reading, down.node)
    start = down.route if down.route is not None else weights
    if start is None:
        return "the results of the experts are not weighted"
    chosen, _ = reading.back(start, lambda n: n.target is aten.topk.default)
    if not chosen:
        return "rows are not routed by a top-k"
    topk = chosen[0]
    routers, scored = reading.back(topk.args[0], lambda n: n in reading.linears)  # type: ignore[arg-type]
    router = next((reading.linears[n] for n in routers if reading.linears[n].outputs == down.experts), None)
    if router is None:
        return f"no product with {down.experts} outputs scores the experts"
    weighted = reading.back(weights, lambda n: n is router.node)[1] if weights is not None else []
    k = topk.args[1]
    if not isinstance(k, int):
        return "the number of chosen experts is not fixed"
    after = [n for n in weighted if n not in scored and n is not topk]
    score = next((s for n in scored if (s := _score(n)) is not None), None)
    late = next((s for n in after if (s := _score(n)) is not None), None)
    renormalised = any(n.target in _DIVIDES for n in after) and any(n.target in _SUMS for n in after)
    if score is None and late == "softmax":
        return Routing(router, k, "softmax after top-k", True)
    return Routing(router, k, score or late or "none", renormalised)


def _score(node: fx.Node) -> str | None:
    return "softmax" if node.target in _SOFTMAX else "sigmoid" if node.target is aten.sigmoid.default else None


def _weights(reading: Reading, node: fx.Node) -> fx.Node | None:
    """What a result is multiplied with, past views and a bias."""
    for user in node.users:
        others = [n for n in user.all_input_nodes if n is not node]
        if user.target is aten.mul.Tensor and len(others) == 1:
            return others[0]
        biased = user.target is aten.add.Tensor and len(others) == 1 and reading.is_bias(others[0])
        if rearranges(user) or biased or user.target is operator.getitem:
            found = _weights(reading, user)
            if found is not None:
                return found
    return None


# A loop over experts


def _loops(reading: Reading, mlps: list[Mlp]) -> list[Moe]:
    """MLPs of one value, each weighted by a column of one router's output."""
    groups: dict[tuple[fx.Node, int, str], list[Mlp]] = {}
    for mlp in mlps:
        groups.setdefault((mlp.x, mlp.width, mlp.activation), []).append(mlp)
    found = []
    for (x, _, _), group in groups.items():
        routers = [_weighted_by(reading, mlp, x) for mlp in group]
        for router in {r.node: r for r in routers if r is not None}.values():
            experts = [m for m, r in zip(group, routers, strict=True) if r is not None and r.node is router.node]
            if len(experts) == router.outputs > 1:
                others = [m for m in mlps if m.x is x and m not in experts]
                found.append(_loop(reading, x, router, experts, others))
    return found


def _weighted_by(reading: Reading, mlp: Mlp, x: fx.Node) -> Linear | None:
    """The router, a product of the same value, that an MLP's result is weighted by."""
    weights = _weights(reading, mlp.node)
    if weights is None or reading.constant(weights):
        return None
    routers, _ = reading.back(weights, lambda n: n in reading.linears)
    return next((reading.linears[n] for n in routers if arranged(reading.linears[n].x) is x), None)


def _loop(reading: Reading, x: fx.Node, router: Linear, experts: list[Mlp], others: list[Mlp]) -> Moe:
    first = experts[0]
    weights = _weights(reading, first.node)
    assert weights is not None
    passed = reading.back(weights, lambda n: n is router.node)[1]
    topk = next((n for n in passed if n.target is aten.topk.default), None)
    k = topk.args[1] if topk is not None else router.outputs
    late = [n for n in passed if topk is not None and n in (reading.from_to(topk, weights) or ())]
    score = next((s for n in passed if (s := _score(n)) is not None), "none")
    soft_after = any(_score(n) == "softmax" for n in late)
    divided = any(n.target in _DIVIDES for n in late) and any(n.target in _SUMS for n in late)
    inside = {n for mlp in experts for n in mlp.nodes} | {router.node, *passed}
    return Moe(
        site=experts[-1].site,
        node=experts[-1].node,
        x=x,
        experts=len(experts),
        top_k=k if isinstance(k, int) else router.outputs,
        width=first.width,
        hidden=first.down.outputs,
        activation=first.activation,
        gated=first.gated,
        score="softmax after top-k" if soft_after else score,
        renormalised=soft_after or divided,
        shared=tuple(mlp.site for mlp in others),
        impl="loop",
        layout="concatenated" if first.packed else "apart" if first.gated else "none",
        transposed=False,
        router=project(router),
        up=first.up.weight,
        down=first.down.weight,
        nodes=tuple(sorted(inside, key=reading.position.__getitem__)),
    )
