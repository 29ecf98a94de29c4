"""Shapes that are computed although they are known, and reshapes and transposes one behind the other."""

from __future__ import annotations

import onnx_ir as ir

from laconic.codegen.onnx.edit import Editor, Sizes, attribute, known, made_by, sizes, sole

_RESHAPES = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")


def constant_shapes(editor: Editor) -> int:
    """Reshape(x [B, S, 128], Concat(Shape(x)[0:2], 4, 32)) -> Reshape(x, [0, 0, 4, 32]);
    Expand(x [B, 2, 1, S, 32], Concat(Shape(x)[0:1], 2, 2, ...)) -> Expand(x, [1, 1, 2, 1, 1]).

    Where all sizes before and after are known by number or name, and every named one can be said without a number.
    Safe: 0 copies a size, 1 keeps one, and -1 stands at most once, beside sizes that are never 0. No name becomes a
    number.
    """
    fired = 0
    for node in editor.nodes("Reshape", "Expand"):
        shape = node.inputs[1]
        given, wanted = sizes(node.inputs[0]), sizes(node.outputs[0])
        if shape is None or editor.numbers(shape) is not None or given is None or wanted is None:
            continue
        reshape = node.op_type == "Reshape"
        target = reshape_target(given, wanted, editor.positive) if reshape else expand_target(given, wanted)
        if target is not None:
            node.replace_input_with(1, editor.integers(target))
            node.attributes.pop("allowzero", None)
            editor.sweep(shape.producer())
            fired += 1
    return fired


def reshape_target(given: Sizes, wanted: Sizes, positive: frozenset[str]) -> list[int] | None:
    """The operand of a Reshape between these sizes, for any values of the named ones; None if there is no constant."""
    if not known(given) or not known(wanted) or 0 in wanted:
        return None
    target = [
        size if isinstance(size, int) else 0 if k < len(given) and given[k] == size else -1
        for k, size in enumerate(wanted)
    ]
    copied = {size for size, number in zip(wanted, target, strict=True) if number == 0}
    unclear = -1 in target and not copied <= positive
    return None if target.count(-1) > 1 or unclear else target


def expand_target(given: Sizes, wanted: Sizes) -> list[int] | None:
    """The operand of an Expand between these sizes; None if a size that is new has no number."""
    if not known(given) or not known(wanted):
        return None
    given = (1,) * (len(wanted) - len(given)) + given
    target = [1 if new == old else new for old, new in zip(given, wanted, strict=True)]
    return [size for size in target if isinstance(size, int)] if all(isinstance(n, int) for n in target) else None


def merge_reshapes(editor: Editor) -> int:
    """Reshape(Reshape(x, s), t) -> Reshape(x, u); x again if it has the sizes of the result. Unsqueeze, Squeeze and
    Flatten are reshapes.

    Where the sizes of x and of the result are known. Safe: all keep the elements in their order.
    """
    fired = 0
    for node in editor.nodes(*_RESHAPES, "Expand"):
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        given, wanted = sizes(source), sizes(result)
        if known(given) and given == wanted:
            editor.replace(result, source)
            fired += 1
            continue
        before = made_by(source, *_RESHAPES) if node.op_type != "Expand" else None
        if before is None or before.inputs[0] is None or wanted is None:
            continue
        origin = before.inputs[0]
        given = sizes(origin)
        if known(given) and given == wanted:
            editor.replace(result, origin)
            fired += 1
            continue
        target = None if given is None or not sole(source) else reshape_target(given, wanted, editor.positive)
        if target is not None:
            (merged,) = editor.insert(
                node, "Reshape", [origin, editor.integers(target)], outputs=[(wanted, result.dtype)]
            )
            editor.replace(result, merged)
            fired += 1
    return fired


def merge_transposes(editor: Editor) -> int:
    """Transpose(Transpose(x, p), q) -> Transpose(x, p[q]); x if that is no transpose.

    Where nothing else reads what is between. Safe: a permutation of a permutation is one.
    """
    fired = 0
    for node in editor.nodes("Transpose"):
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        perm = permutation(node)
        if perm == sorted(perm) and perm:
            editor.replace(result, source)
            fired += 1
            continue
        before = made_by(source, "Transpose")
        if before is None or not sole(source) or not perm:
            continue
        first = permutation(before)
        if len(first) != len(perm):
            continue
        both = [first[axis] for axis in perm]
        (merged,) = editor.insert(
            node, "Transpose", [before.inputs[0]], {"perm": both}, outputs=[(sizes(result), result.dtype)]
        )
        editor.replace(result, merged)
        fired += 1
    return fired


def permutation(node: ir.Node) -> list[int]:
    """The axes of a Transpose; empty if its rank is not known."""
    given = attribute(node, "perm")
    if given is not None:
        return [int(axis) for axis in given]
    shape = sizes(node.inputs[0])
    return [] if shape is None else list(range(len(shape)))[::-1]
