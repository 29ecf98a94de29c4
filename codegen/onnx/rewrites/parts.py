"""What is done alike to each part of a Split is done once, to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from laconic.codegen.onnx.edit import Editor, Size, Sizes, axis_of, known, made_by, sizes
from laconic.codegen.onnx.rewrites.broadcasts import BINARY, UNARY
from laconic.codegen.onnx.rewrites.reshapes import permutation, reshape_target

#: A node and the place of an operand that it reads.
Use = tuple[ir.Node, int]


@dataclass(frozen=True)
class _Parts:
    """A Split: parts of `lengths` along `axis` of `whole`."""

    node: ir.Node
    whole: ir.Value
    axis: int
    lengths: tuple[int, ...]

    @staticmethod
    def of(node: ir.Node | None) -> _Parts | None:
        """The parts of a Split whose sizes are all known by number along its axis."""
        if node is None or node.op_type != "Split" or node.domain or node.inputs[0] is None:
            return None
        shape = sizes(node.inputs[0])
        parts = [sizes(value) for value in node.outputs]
        if shape is None or not known(shape) or any(not known(part) for part in parts):
            return None
        axis = axis_of(node, len(shape))
        lengths = [part[axis] for part in parts if part is not None]
        if not all(isinstance(length, int) for length in lengths):
            return None
        return _Parts(node, node.inputs[0], axis, tuple(n for n in lengths if isinstance(n, int)))

    @property
    def values(self) -> tuple[ir.Value, ...]:
        return tuple(self.node.outputs)


@dataclass(frozen=True)
class _Once:
    """One node in place of several: its operands, attributes, and per result the axis and lengths of the parts."""

    inputs: list[ir.Value | None]
    attributes: dict[str, object]
    axis: int
    lengths: tuple[int, ...]


def hoist(editor: Editor) -> int:
    """q, k, v = Split(x); f(q), f(k), f(v)  ->  Split(f(x)).

    Where f is a reshape, a transpose, a Split or Concat along another axis, or works element by element, and every part
    is read by such a node, of the same attributes, at the same place, with other operands that are the same and do not
    vary along the axis of the Split, or are the parts of a like Split. Safe: f treats the elements of a part as it does
    among those of the others.
    """
    fired = 0
    for node in editor.nodes("Split"):
        while node.graph is not None and (parts := _Parts.of(node)) is not None:
            found = next(((g, once) for g in _alike(parts.values) if (once := _once(editor, parts, g))), None)
            if found is None:
                break
            _hoist(editor, *found)
            fired += 1
    return fired


def regroup(editor: Editor) -> int:
    """q, k, v = Split(x)  ->  qk, v = Split(x); q, k = Split(qk), where two things or more are done alike to q and k.

    So that they can be done once (`hoist`): the rotary embedding of queries and keys. Safe: the parts are the same.
    """
    fired = 0
    for node in editor.nodes("Split"):
        parts = _Parts.of(node)
        if parts is None or len(parts.values) < 3:
            continue
        for first, last in _neighbours(len(parts.values)):
            some = _Parts(node, parts.whole, parts.axis, parts.lengths[first:last])
            groups = [g for g in _alike(parts.values[first:last]) if _once(editor, some, g, parts.values[first:last])]
            if len(groups) >= 2:
                _regroup(editor, parts, first, last)
                fired += 1
                break
    return fired


def slices_to_split(editor: Editor) -> int:
    """Slice(x, 0, 16, axis), Slice(x, 16, end, axis)  ->  Split(x, [16, 16], axis).

    Where slices of step 1 along one axis of known size are the parts of x, each element in one of them. Safe: they
    are.
    """
    fired = 0
    seen: set[tuple[ir.Value, int]] = set()
    for node in editor.nodes("Slice"):
        x, axis = node.inputs[0], _sliced(editor, node)
        if x is None or axis is None or (x, axis[0]) in seen:
            continue
        seen.add((x, axis[0]))
        fired += _split(editor, x, axis[0])
    return fired


def _split(editor: Editor, x: ir.Value, axis: int) -> int:
    """Put a Split in place of the slices of x along this axis, if they are its parts; how often that was."""
    shape = sizes(x)
    slices: dict[tuple[int, int], ir.Node] = {}
    for user, place in x.uses():
        beside = place == 0 and user.op_type == "Slice" and not user.domain and user.graph is editor.graph
        found = _sliced(editor, user) if beside else None
        if found is not None and found[0] == axis:
            slices.setdefault(found[1:], user)
    spans = sorted(slices)
    length = None if shape is None else shape[axis]
    ends = [0, *(stop for _, stop in spans)]
    if len(spans) < 2 or ends[-1] != length or [start for start, _ in spans] != ends[:-1]:
        return 0
    first = next(n for n in editor.graph if n in slices.values())
    results = [slices[span].outputs[0] for span in spans]
    lengths = [stop - start for start, stop in spans]
    made = editor.insert(
        first, "Split", [x, editor.integers(lengths)], {"axis": axis}, [(sizes(r), r.dtype) for r in results]
    )
    for result, part in zip(results, made, strict=True):
        editor.replace(result, part)
    return 1


def _sliced(editor: Editor, node: ir.Node) -> tuple[int, int, int] | None:
    """Axis, start and stop of a Slice of step 1 along one axis whose size is a number."""
    shape = sizes(node.inputs[0])
    given = [editor.numbers(value) for value in node.inputs[1:]]
    if node.op_type != "Slice" or shape is None or len(given) < 3 or any(n is None or len(n) != 1 for n in given):
        return None
    start, stop, axis, *step = (n[0] for n in given if n is not None)
    length = shape[axis]
    if step not in ([], [1]) or not isinstance(length, int):
        return None
    start, stop, _ = slice(start, stop).indices(length)
    return axis % len(shape), start, stop


def _neighbours(count: int) -> Iterator[tuple[int, int]]:
    """Stretches of two parts or more, not all of them; longer ones first."""
    for length in range(count - 1, 1, -1):
        yield from ((first, first + length) for first in range(count - length + 1))


def _alike(parts: tuple[ir.Value, ...]) -> Iterator[list[Use]]:
    """For each use of the first part, one of each other part by a like node at the same place, as far as there are."""
    taken: set[ir.Node] = set()
    for use in parts[0].uses():
        group: list[Use] = [(use.node, use.idx)]
        for part in parts[1:]:
            uses = [(u.node, u.idx) for u in part.uses() if u.node not in taken and u.node.graph is part.graph]
            group += [u for u in uses if u not in group and _like(group[0], u)][:1]
        if len(group) == len(parts) and len({node for node, _ in group}) == len(parts):
            taken |= {node for node, _ in group}
            yield group


def _like(one: Use, other: Use) -> bool:
    a, b = one[0], other[0]
    return (
        one[1] == other[1]
        and (a.domain, a.op_type, len(a.inputs), len(a.outputs)) == (b.domain, b.op_type, len(b.inputs), len(b.outputs))
        and a.domain == ""
        and {k: v.value for k, v in a.attributes.items()} == {k: v.value for k, v in b.attributes.items()}
    )


def _once(editor: Editor, parts: _Parts, group: list[Use], values: tuple[ir.Value, ...] | None = None) -> _Once | None:
    """The one node for a group of like ones, one for each part; None if what they do is not so."""
    nodes = [node for node, _ in group]
    head = nodes[0]
    if any(sizes(out) is None or not known(sizes(out)) for node in nodes for out in node.outputs):
        return None
    inputs: list[ir.Value | None] = []
    for place, operand in enumerate(head.inputs):
        wholes = _whole(parts, [node.inputs[place] for node in nodes], values or parts.values)
        if wholes is not None:
            inputs.append(wholes)
        elif all(node.inputs[place] is operand for node in nodes):
            inputs.append(operand)
        else:
            if head.op_type != "Reshape" or place != 1:
                return None
            inputs.append(None)
    attributes: dict[str, object] = {k: v.value for k, v in head.attributes.items()}
    if head.op_type in UNARY or head.op_type in BINARY:
        return _elementwise(parts, head, inputs, attributes)
    if head.op_type == "Transpose" and permutation(head):
        return _Once(inputs, attributes, permutation(head).index(parts.axis), parts.lengths)
    if head.op_type == "Reshape":
        return _reshape(editor, parts, nodes, inputs)
    shape = sizes(head.inputs[0])
    along = None if shape is None or head.op_type not in ("Split", "Concat") else axis_of(head, len(shape))
    if along is None or along == parts.axis:
        return None
    if head.op_type == "Split":  # the other way round they would take turns for ever
        return _Once(inputs, attributes, parts.axis, parts.lengths) if along > parts.axis else None
    all_parts = all(a is not b for a, b in zip(inputs, head.inputs, strict=True))
    return _Once(inputs, attributes, parts.axis, parts.lengths) if all_parts else None


def _whole(parts: _Parts, operands: list[ir.Value | None], values: tuple[ir.Value, ...]) -> ir.Value | None:
    """What these operands are the parts of: of this Split, or of another that is like it."""
    if all(a is b for a, b in zip(operands, values, strict=True)):
        return parts.whole
    other = _Parts.of(made_by(operands[0], "Split"))
    if other is None or (other.axis, other.lengths) != (parts.axis, parts.lengths):
        return None
    same = len(operands) == len(other.values) and all(a is b for a, b in zip(operands, other.values, strict=True))
    return other.whole if same else None


def _elementwise(
    parts: _Parts, head: ir.Node, inputs: list[ir.Value | None], attributes: dict[str, object]
) -> _Once | None:
    """The node for all parts, if the operands that they share do not vary along their axis."""
    shape = sizes(head.outputs[0])
    part = sizes(head.inputs[[a is not b for a, b in zip(inputs, head.inputs, strict=True)].index(True)])
    if shape is None or part is None or len(shape) != len(part):
        return None
    for mine, operand in zip(inputs, head.inputs, strict=True):
        other = sizes(operand)
        if other is None:
            return None
        from_behind = len(shape) - parts.axis
        if mine is operand and len(other) >= from_behind and other[-from_behind] != 1:
            return None
        if mine is not operand and len(other) != len(shape):
            return None
    return _Once(inputs, attributes, parts.axis, parts.lengths)


def _reshape(editor: Editor, parts: _Parts, nodes: list[ir.Node], inputs: list[ir.Value | None]) -> _Once | None:
    """[.., n, tail] -> [.., m, rest, tail], n = m * prod(rest), for parts that differ in n and m alone."""
    whole = sizes(parts.whole)
    results = [sizes(node.outputs[0]) for node in nodes]
    assert whole is not None
    axis, tail = parts.axis, len(whole) - parts.axis - 1
    lengths, rests = [], set()
    for length, result in zip(parts.lengths, results, strict=True):
        assert result is not None
        stop = len(result) - tail
        middle = result[axis:stop]
        outside = result[:axis] == whole[:axis] and result[stop:] == whole[axis + 1 :]
        if not middle or not outside or not all(isinstance(n, int) for n in middle):
            return None
        numbers = [n for n in middle if isinstance(n, int)]
        if prod(numbers) != length:
            return None
        lengths.append(numbers[0])
        rests.add(tuple(numbers[1:]))
    if len(rests) != 1:
        return None
    wanted: Sizes = (*whole[:axis], sum(lengths), *rests.pop(), *whole[axis + 1 :])
    target = reshape_target(whole, wanted, editor.positive)
    if target is None:
        return None
    return _Once([inputs[0], editor.integers(target)], {}, axis, tuple(lengths))


def _hoist(editor: Editor, group: list[Use], once: _Once) -> None:
    """Put one node and a Split of each of its results in place of the group."""
    nodes = [node for node, _ in group]
    among = set(nodes)
    first = next(node for node in editor.graph if node in among)
    shapes: list[tuple[Sizes | None, ir.DataType | None]] = []
    for result in nodes[0].outputs:
        shape: list[Size] = list(sizes(result) or ())
        shape[once.axis] = sum(once.lengths)
        shapes.append((tuple(shape), result.dtype))
    made = editor.insert(first, nodes[0].op_type, once.inputs, once.attributes, shapes)
    for k, whole in enumerate(made):
        results = [node.outputs[k] for node in nodes]
        split = editor.insert(
            first,
            "Split",
            [whole, editor.integers(once.lengths)],
            {"axis": once.axis},
            [(sizes(result), result.dtype) for result in results],
        )
        for result, part in zip(results, split, strict=True):
            ir.convenience.replace_all_uses_with(result, part, replace_graph_outputs=True)
    for node in nodes:
        editor.sweep(node)


def _regroup(editor: Editor, parts: _Parts, first: int, last: int) -> None:
    """Split off some parts together, then from one another."""
    together = parts.values[first:last]
    shape: list[Size] = list(sizes(parts.values[first]) or ())
    shape[parts.axis] = sum(parts.lengths[first:last])
    kept = [(sizes(value), value.dtype) for value in parts.values]
    described = [*kept[:first], (tuple(shape), together[0].dtype), *kept[last:]]
    lengths = [*parts.lengths[:first], sum(parts.lengths[first:last]), *parts.lengths[last:]]
    outer = editor.insert(parts.node, "Split", [parts.whole, editor.integers(lengths)], {"axis": parts.axis}, described)
    inner = editor.insert(
        parts.node,
        "Split",
        [outer[first], editor.integers(parts.lengths[first:last])],
        {"axis": parts.axis},
        kept[first:last],
    )
    new = [*outer[:first], *inner, *outer[first + 1 :]]
    for old, value in zip(parts.values, new, strict=True):
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    editor.sweep(parts.node)
