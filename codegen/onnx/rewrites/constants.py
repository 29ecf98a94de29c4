"""Weights that are rearranged in every call although they could be stored that way."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from laconic.codegen.onnx.edit import Editor, attribute, axis_of
from laconic.codegen.onnx.rewrites.reshapes import permutation

#: What is put behind the name of a weight that is stored another way.
_SUFFIX = {"Transpose": ".T"}


def fold_layout(editor: Editor) -> int:
    """Transpose(w), Split(w), Squeeze(w), Unsqueeze(w), Reshape(w) -> the weight as it comes out, of any size.

    Where nothing else reads w, which would then stand there twice. Safe: elements move, none is computed.
    """
    fired = 0
    for node in editor.nodes("Transpose", "Split", "Squeeze", "Unsqueeze", "Reshape"):
        weight = node.inputs[0]
        if weight is None or not _movable(weight):
            continue
        assert weight.const_value is not None
        parts = _moved(editor, node, weight.const_value.numpy())
        if parts is None or any(result.is_graph_output() for result in node.outputs):
            continue
        for k, (result, part) in enumerate(zip(list(node.outputs), parts, strict=True)):
            name = f"{weight.name}.{k}" if len(parts) > 1 else f"{weight.name}{_SUFFIX.get(node.op_type, '')}"
            editor.replace(
                result, editor.constant(np.ascontiguousarray(part), name, parameter=editor.is_parameter(weight))
            )
        fired += 1
    return fired


def _movable(value: ir.Value) -> bool:
    alone = len(value.uses()) == 1 and not value.is_graph_output() and not value.is_graph_input()
    return alone and value.is_initializer() and value.const_value is not None


def _moved(editor: Editor, node: ir.Node, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]] | None:
    """What a node makes of its first operand; None where that depends on what is not known."""
    if node.op_type == "Transpose":
        return [array.transpose(permutation(node))]
    if node.op_type == "Split":
        lengths = editor.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        axis = axis_of(node, array.ndim)
        if lengths is None:
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                return None
            step = -(-array.shape[axis] // len(node.outputs))
            return np.split(array, [k * step for k in range(1, len(node.outputs))], axis=axis)
        return np.split(array, np.cumsum(lengths)[:-1].tolist(), axis=axis)
    given = editor.numbers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if node.op_type == "Squeeze":
        return [np.squeeze(array, None if given is None else tuple(given))] if len(node.inputs) == 1 or given else None
    if given is None:
        return None
    if node.op_type == "Unsqueeze":
        return [np.expand_dims(array, tuple(given))]
    if attribute(node, "allowzero", 0) and 0 in given:
        return None
    return [array.reshape([array.shape[k] if size == 0 else size for k, size in enumerate(given)])]
