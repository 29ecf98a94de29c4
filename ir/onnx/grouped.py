"""A product of groups of rows, as exporters unroll it for experts: found in the graph and made one node again.

    part_0, .., part_e, rest = Split(rows, counts)          counts are computed, so the parts have no known sizes
    Pad(Concat(MatMul(part_0, w_0), .., MatMul(part_e, w_e)), [0, 0, Shape(rest), 0])

becomes `GroupedMatMul(rows, counts, w_0, .., w_e)`, whose sizes do not depend on values. `rest`, the rows that no
expert has, may be missing, and the padding with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir
import torch
from torch import Tensor

from laconic.ir.onnx.table import op


@dataclass(frozen=True)
class _Match:
    """What is replaced: the value that takes the result's place, the weights, and the nodes that go, last first."""

    result: onnx_ir.Value
    weights: list[onnx_ir.Value]
    nodes: list[onnx_ir.Node]


@op("GroupedMatMul")
def grouped_matmul(rows: Tensor, counts: Tensor, *weights: Tensor) -> Tensor:
    """rows [S, K] times weights of [K, N], of which number e has the next counts[e] rows: [S, N]. Rows behind all of
    them become zeros.

    Every weight multiplies all rows, and each row keeps its own product: torch's `grouped_mm`, which would not waste
    them, is traced for bfloat16 alone.
    """
    ends = torch.cumsum(counts[: len(weights)], 0)
    place = torch.arange(rows.shape[0], device=rows.device)[:, None]
    group = torch.sum(place >= ends, 1, keepdim=True)
    found = torch.zeros([rows.shape[0], weights[0].shape[1]], dtype=rows.dtype, device=rows.device)
    for number, weight in enumerate(weights):
        found = torch.where(group == number, torch.matmul(rows, weight), found)
    return found


def group_products(graph: onnx_ir.Graph, constants: Mapping[str, Tensor]) -> None:
    """Put one node in the place of each such product."""
    for split in [node for node in graph if node.op_type == "Split" and node.domain == ""]:
        match = _match(split, constants)
        if match is None:
            continue
        last = match.result.producer()
        assert last is not None
        whole = onnx_ir.Node("", "GroupedMatMul", [*split.inputs, *match.weights], num_outputs=1, name=split.name)
        match.result.name, whole.outputs[0].name = f"{match.result.name} unrolled", match.result.name
        graph.insert_before(last, whole)
        onnx_ir.convenience.replace_all_uses_with(match.result, whole.outputs[0], replace_graph_outputs=True)
        graph.remove(match.nodes, safe=True)


def _match(split: onnx_ir.Node, constants: Mapping[str, Tensor]) -> _Match | None:
    axis = split.attributes.get("axis")
    if len(split.inputs) != 2 or len(split.outputs) < 2 or (axis is not None and axis.as_int() != 0):
        return None
    products = [_only_use(part, "MatMul") for part in split.outputs]
    rest = split.outputs[-1] if products[-1] is None else None
    matmuls = [node for node in products if node is not None]
    if len(matmuls) < len(products) - (rest is not None):
        return None
    concat = _only_use(matmuls[0].outputs[0], "Concat")
    if concat is None or [value.producer() if value else None for value in concat.inputs] != matmuls:
        return None
    weights = [node.inputs[1] for node in matmuls]
    named = [weight for weight in weights if weight is not None and _is_matrix(weight, constants)]
    if len(named) < len(weights) or concat.attributes["axis"].as_int() != 0:
        return None
    found = [concat, *reversed(matmuls)]
    if rest is None:
        return _Match(concat.outputs[0], named, [*found, split])
    pad = _only_use(concat.outputs[0], "Pad")
    amounts = _only_use(_shape_of(rest), "Concat")
    if pad is None or amounts is None or len(pad.inputs) != 2 or pad.inputs[1] is not amounts.outputs[0]:
        return None
    mode = pad.attributes.get("mode")
    zeros = [constants.get(str(value.name)) for value in amounts.inputs if value is not None]
    known = [None if value is None else value.tolist() for value in zeros]
    if known != [[0, 0], None, [0]] or (mode is not None and mode.as_string() != "constant"):
        return None
    shape = amounts.inputs[1].producer() if amounts.inputs[1] is not None else None
    if shape is None or len(amounts.outputs[0].uses()) != 1:
        return None
    return _Match(pad.outputs[0], named, [pad, amounts, shape, *found, split])


def _only_use(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node | None:
    """The node of this kind that alone reads the value; for others than Concat, as its first input."""
    uses = list(value.uses()) if value is not None else []
    if len(uses) != 1 or (value is not None and value.is_graph_output()):
        return None
    node, place = uses[0]
    return node if node.op_type == kind and node.domain == "" and (place == 0 or kind == "Concat") else None


def _shape_of(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """Its number of rows, if nothing else is asked of it."""
    node = _only_use(value, "Shape")
    if node is None:
        return None
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    rows = (start is None or start.as_int() == 0) and end is not None and end.as_int() == 1
    return node.outputs[0] if rows else None


def _is_matrix(value: onnx_ir.Value, constants: Mapping[str, Tensor]) -> bool:
    weight = constants.get(str(value.name))
    return weight is not None and weight.ndim == 2
