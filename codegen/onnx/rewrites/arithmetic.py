"""Arithmetic that has a shorter name."""

from __future__ import annotations

from math import isclose, pi, sqrt

import onnx_ir as ir

from laconic.codegen.onnx.edit import Editor, made_by, sizes, sole

GELU = 20  # the operator set that has it


def divide(editor: Editor) -> int:
    """Mul(x, Reciprocal(y)) -> Div(x, y).

    Where nothing else reads the reciprocal. Safe: one rounding instead of two.
    """
    fired = 0
    for node in editor.nodes("Mul"):
        for place in (1, 0):
            inverse = made_by(node.inputs[place], "Reciprocal")
            if inverse is None or not sole(inverse.outputs[0]):
                continue
            result = node.outputs[0]
            operands = [node.inputs[1 - place], inverse.inputs[0]]
            (quotient,) = editor.insert(node, "Div", operands, outputs=[(sizes(result), result.dtype)])
            editor.replace(result, quotient)
            fired += 1
            break
    return fired


def tanh_gelu(editor: Editor) -> int:
    """x * 0.5 * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) -> Gelu(x, approximate="tanh"), from opset 20 on.

    Where the constants are those of the definition to six digits and nothing else reads what is between. Safe: it is
    the definition of that op.
    """
    fired = 0
    for node in editor.nodes("Mul") if editor.opset >= GELU else ():
        x = _gelu_operand(editor, node)
        if x is None:
            continue
        result = node.outputs[0]
        (short,) = editor.insert(node, "Gelu", [x], {"approximate": "tanh"}, outputs=[(sizes(result), result.dtype)])
        editor.replace(result, short)
        fired += 1
    return fired


def _gelu_operand(editor: Editor, node: ir.Node) -> ir.Value | None:
    """x, if the node computes the tanh form of GELU of it."""
    for half, rest in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        x = _with(editor, half, "Mul", 0.5)
        tanh = made_by(_with(editor, rest, "Add", 1.0), "Tanh")
        if x is None or tanh is None or not sole(tanh.outputs[0]):
            continue
        total = made_by(_with(editor, tanh.inputs[0], "Mul", sqrt(2 / pi)), "Add")
        if total is None or x not in total.inputs or not sole(total.outputs[0]):
            continue
        other = total.inputs[1 - total.inputs.index(x)]
        power = made_by(_with(editor, other, "Mul", 0.044715), "Pow")
        if power is not None and power.inputs[0] is x and sole(power.outputs[0]) and _is(editor, power.inputs[1], 3.0):
            return x
    return None


def _with(editor: Editor, value: ir.Value | None, op: str, number: float) -> ir.Value | None:
    """The other operand, if this value is op(operand, number) and is read once."""
    node = made_by(value, op)
    if node is None or value is None or not sole(value):
        return None
    for place in (0, 1):
        if _is(editor, node.inputs[place], number):
            return node.inputs[1 - place]
    return None


def _is(editor: Editor, value: ir.Value | None, number: float) -> bool:
    held = editor.content(value)
    return held is not None and held.size == 1 and isclose(float(held.reshape(-1)[0]), number, rel_tol=1e-6)
