"""Values that are said again and again where a broadcast would do, and operands that change nothing."""

from __future__ import annotations

from math import copysign

import numpy as np
import onnx_ir as ir

from laconic.codegen.onnx.edit import Editor, Sizes, attribute, broadcast, known, made_by, sizes

#: Ops that work element by element on one operand.
UNARY = frozenset(
    {
        "Abs",
        "Cast",
        "Cos",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "IsNaN",
        "Log",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Sigmoid",
        "Sin",
        "Softplus",
        "Sqrt",
        "Tanh",
    }
)
#: Ops that work element by element on operands that are broadcast.
BINARY = frozenset(
    {
        "Add",
        "And",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Or",
        "PRelu",
        "Pow",
        "Sub",
        "Where",
        "Xor",
    }
)
_REDUCTIONS = ("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceProd", "ReduceL2")
#: What leaves the other operand as it is: the number, and at which operand it may stand. Of floating numbers, only -0.0
#: may be added: -0.0 + 0.0 is 0.0.
_NEUTRAL = {
    "Add": (0, (0, 1)),
    "Sub": (0, (1,)),
    "Mul": (1, (0, 1)),
    "Div": (1, (1,)),
    "And": (1, (0, 1)),
    "Or": (0, (0, 1)),
}


def drop_broadcasts(editor: Editor) -> int:
    """Add(Expand(m [B, 1, 1, S], [B, 1, S, S]), scores [B, 4, S, S]) -> Add(m, scores);
    Mul(x, 1) -> x; And(mask, true) -> mask; Where(true, a, b) -> a; Gather(w, Expand(i)) + y -> Gather(w, i) + y.

    Where a node only repeats one of its operands along some axes, and all that is computed from it either works element
    by element, to be broadcast itself, or meets an operand that has the full sizes. Safe: each result has the elements
    it had; none that the graph returns changes its sizes.
    """
    fired = 0
    for node in editor.nodes("Expand", "Where", "GreaterOrEqual", *_NEUTRAL):
        source = _repeated(editor, node)
        result = node.outputs[0]
        before, after = sizes(source), sizes(result)
        if source is None or before is None or after is None or not known(after):
            continue
        changed = {} if before == after else _reach(editor, result, before)
        if changed is None:
            continue
        for value, shape in changed.items():
            value.shape = ir.Shape(shape)
        editor.replace(result, source)
        fired += 1
    return fired


def _repeated(editor: Editor, node: ir.Node) -> ir.Value | None:
    """The value whose elements are those of a node's result, up to repetition."""
    if node.op_type == "Expand":
        return node.inputs[0]
    if node.op_type == "Where":
        chosen = editor.uniform(node.inputs[0])
        return None if chosen is None else node.inputs[1 if chosen else 2]
    if node.op_type == "GreaterOrEqual":
        least, bound = _least(editor, node.inputs[0]), editor.uniform(node.inputs[1])
        shape = sizes(node.outputs[0])
        if least is None or bound is None or least < bound or shape is None:
            return None
        return editor.constant(np.ones((1,) * len(shape), dtype=np.bool_), "true")
    neutral, places = _NEUTRAL[node.op_type]
    for place in places:
        number = editor.uniform(node.inputs[place])
        if number == neutral and (node.op_type != "Add" or isinstance(number, int) or copysign(1, number) < 0):
            return node.inputs[1 - place]
    return None


def _least(editor: Editor, value: ir.Value | None) -> int | None:
    """The first, and least, number of an ascending Range, however it is reshaped."""
    while (node := made_by(value, "Unsqueeze", "Reshape", "Squeeze", "Expand")) is not None:
        value = node.inputs[0]
    node = made_by(value, "Range")
    if node is None:
        return None
    start, step = editor.numbers(node.inputs[0]), editor.numbers(node.inputs[2])
    return start[0] if start and step and step[0] > 0 else None


def _reach(editor: Editor, result: ir.Value, shape: Sizes) -> dict[ir.Value, Sizes] | None:
    """The values that get other sizes if `result` gets these; None if something needs the full ones."""
    changed: dict[ir.Value, Sizes] = {result: shape}
    waiting = [result]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return None
        for user, _ in value.uses():
            new = _result_sizes(editor, user, changed)
            out = user.outputs[0]
            if new is None:
                return None
            if new != changed.get(out, sizes(out)):
                changed[out] = new
                waiting.append(out)
    del changed[result]
    return changed


def _result_sizes(editor: Editor, node: ir.Node, changed: dict[ir.Value, Sizes]) -> Sizes | None:
    """The sizes of a node's result with some operands un-broadcast; None if it would be another result."""
    if node.domain or node.graph is not editor.graph or len(node.outputs) != 1:
        return None
    shapes = [changed.get(v, sizes(v)) if v is not None else None for v in node.inputs]
    if node.op_type in UNARY or node.op_type in BINARY:
        return None if None in shapes else broadcast(*[s for s in shapes if s is not None])
    if node.op_type == "Gather" and node.inputs[0] not in changed and shapes[0] and shapes[1] is not None:
        axis = int(attribute(node, "axis", 0)) % len(shapes[0])
        return shapes[0][:axis] + shapes[1] + shapes[0][axis + 1 :]
    if node.op_type in _REDUCTIONS and len(node.inputs) == 2 and attribute(node, "keepdims", 1):
        axes, old, new = editor.numbers(node.inputs[1]), sizes(node.inputs[0]), shapes[0]
        greatest = node.op_type in ("ReduceMax", "ReduceMin")  # for which it does not matter how often a number stands
        if axes and old and new and len(old) == len(new) and (greatest or all(old[a] == new[a] for a in axes)):
            kept = {axis % len(new) for axis in axes}
            return tuple(1 if k in kept else size for k, size in enumerate(new))
    return None
