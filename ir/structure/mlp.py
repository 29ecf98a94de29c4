"""MLP sites: a product that reads an activation of one product, or an activation times another, of the same value."""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from laconic.ir.structure.activation import Blocked, Leaf, Region, activates, name_activation, region_before
from laconic.ir.structure.reading import Linear, Reading, arranged
from laconic.ir.structure.records import Mlp, NearMiss, Projection


def find_mlps(reading: Reading, barred: Container[fx.Node], near: list[NearMiss]) -> list[Mlp]:
    """The MLPs of an entry, in order of their last product. What is `barred` (norms, the residual stream) does not
    stand between the products of one."""
    found = (_mlp(reading, linear, barred, near) for linear in reading.linears.values())
    return [mlp for mlp in found if mlp is not None]


def project(linear: Linear, columns: tuple[int, int] | None = None) -> Projection:
    return Projection(linear.node, linear.x, linear.weight, linear.bias, linear.inputs, linear.outputs, columns)


def _mlp(reading: Reading, down: Linear, barred: Container[fx.Node], near: list[NearMiss]) -> Mlp | None:
    def miss(reason: str) -> None:
        near.append(NearMiss("mlp", down.node, reason, str(reading.program.site(down.node) or "")))

    region = region_before(reading, down.x, reading.linears, barred)
    if isinstance(region, Blocked):
        if region.activated:
            miss(region.reason)
        return None
    if not activates(region):
        return None
    if len(region.leaves) > 2:
        miss(f"{len(region.leaves)} products are read where an MLP has one or two")
        return None
    linears = [reading.linears[leaf.product] for leaf in region.leaves]
    if len({arranged(linear.x) for linear in linears}) != 1:
        miss("gate and up read different values")
        return None
    activation, gate = name_activation(reading, region)
    return _record(reading, down, region, linears, activation, gate)


def _record(reading: Reading, down: Linear, region: Region, linears: list[Linear], activation: str, gate: Leaf) -> Mlp:
    gated = len(region.leaves) == 2
    packed = gated and linears[0].node is linears[1].node
    other = next((leaf for leaf in region.leaves if leaf is not gate), gate)
    inside = set(region.nodes) | {linear.node for linear in linears} | {down.node}
    for linear, leaf in zip(linears, region.leaves, strict=True):
        inside |= reading.from_to(linear.node, leaf.node) or set()
    inside |= reading.from_to(region.end, down.node) or set()
    columns = [_columns(leaf, down.inputs) if packed else None for leaf in (gate, other)]
    up, first = reading.linears[other.product], reading.linears[gate.product]
    return Mlp(
        site=down.node.meta.get("site", -1),
        node=down.node,
        x=arranged(linears[0].x),
        width=down.inputs,
        hidden=linears[0].inputs,
        activation=activation,
        gated=gated,
        packed=packed,
        up=project(up, columns[1]),
        gate=project(first, columns[0]) if gated else None,
        down=project(down),
        nodes=tuple(sorted(inside, key=reading.position.__getitem__)),
    )


def _columns(leaf: Leaf, width: int) -> tuple[int, int] | None:
    """The columns of a packed product that a leaf is, if they lie side by side."""
    if leaf.part is None or leaf.step != 1:
        return None
    return leaf.part * width, (leaf.part + 1) * width
