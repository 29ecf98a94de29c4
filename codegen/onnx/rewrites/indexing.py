"""Indexing by whole ranges, and by one index for each row."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir

from laconic.codegen.onnx.edit import Editor, attribute, known, made_by, sizes


def index_by_range(editor: Editor) -> int:
    """GatherND(x [B, S], Concat(Unsqueeze(Expand(range(B) [B, 1, 1, 1])), Unsqueeze(Expand(range(S) [1, 1, 1, S]))))
    -> Unsqueeze(x, [1, 2]).

    Where each index is Range(0, n, 1), reshaped so that it runs along one axis, n being the size of x in the axis that
    it indexes, and the axes come in order. This is what `mask[batch, key]` of attention masks looks like. Safe: entry
    (b, 0, 0, s) of the result is x[b, s].
    """
    fired = 0
    for node in editor.nodes("GatherND"):
        source, indices = node.inputs
        result = node.outputs[0]
        joined = made_by(indices, "Concat")
        given, wanted = sizes(source), sizes(result)
        if joined is None or attribute(node, "batch_dims", 0) or source is None or given is None or wanted is None:
            continue
        if not known(given) or not known(wanted) or len(joined.inputs) != len(given):
            continue
        rank = len(wanted)
        if attribute(joined, "axis") not in (-1, rank):
            continue
        found = [_runs_along(editor, index, size, rank) for index, size in zip(joined.inputs, given, strict=True)]
        axes = [axis for axis in found if axis is not None]
        if len(axes) < len(found) or any(b <= a for a, b in pairwise(axes)):
            continue
        added = [axis for axis in range(rank) if axis not in axes]
        if any(wanted[axis] != 1 for axis in added):
            continue
        (new,) = editor.insert(node, "Unsqueeze", [source, editor.integers(added)], outputs=[(wanted, result.dtype)])
        editor.replace(result, new)
        fired += 1
    return fired


def gather_rows(editor: Editor) -> int:
    """GatherND(x, Unsqueeze(i, [-1]))  ->  Gather(x, i).

    Safe: one index for each row of x, counted from behind where it is negative, in both.
    """
    fired = 0
    for node in editor.nodes("GatherND"):
        source, indices = node.inputs
        result = node.outputs[0]
        column = made_by(indices, "Unsqueeze")
        shape = sizes(indices)
        if column is None or shape is None or attribute(node, "batch_dims", 0):
            continue
        if editor.numbers(column.inputs[1]) not in ([-1], [len(shape) - 1]):
            continue
        (rows,) = editor.insert(
            node, "Gather", [source, column.inputs[0]], {"axis": 0}, [(sizes(result), result.dtype)]
        )
        editor.replace(result, rows)
        fired += 1
    return fired


def _runs_along(editor: Editor, index: ir.Value | None, size: object, rank: int) -> int | None:
    """The one axis of the result along which an operand [..., 1] of the Concat runs from 0 to size - 1."""
    last = made_by(index, "Unsqueeze")
    expanded = made_by(last.inputs[0], "Expand") if last is not None else None
    if last is None or expanded is None or editor.numbers(last.inputs[1]) not in ([-1], [rank]):
        return None
    value = expanded.inputs[0]
    shape = sizes(value)
    if not known(shape) or shape is None or len(shape) != rank:
        return None
    along = [axis for axis, length in enumerate(shape) if length != 1]
    while (node := made_by(value, "Unsqueeze", "Reshape")) is not None:
        value = node.inputs[0]
    counted = made_by(value, "Range")
    if counted is None or sizes(value) != (size,) or len(along) != 1 or shape[along[0]] != size:
        return None
    return along[0] if [editor.numbers(counted.inputs[k]) for k in (0, 2)] == [[0], [1]] else None
