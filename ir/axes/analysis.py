"""The analysis: one walk over each entry, one rule an op (`laconic.ir.axes.rules`).

A row of the weight table has one label, whichever entries use it. What the caller sees is pinned: inputs and results.
States are not: what updates a state is joined with it.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import ORDERED, Pin, factors, fresh, pin, size_of
from laconic.ir.axes.labels import Axes, Label, Several, flat
from laconic.ir.axes.rules import rule
from laconic.ir.axes.ties import tied
from laconic.ir.errors import VerificationError
from laconic.ir.program import Entry, Kind, Program, Role
from laconic.ir.torch_private import storage_key
from laconic.ir.traits import op_name
from laconic.ir.types import NumberType, TensorType, TupleType, same_size, type_of


def analyse(program: Program) -> Axes:
    """The axes of a program. Nothing is decided by names or by equal numbers.

    Raises VerificationError if a rule labels a value with other sizes than it has.
    """
    axes = Axes(program)
    for name, weight in program.weights.items():
        axes.rows[name] = tuple(fresh(size) for size in weight.value.shape)
    _overlaps(axes)
    for entry in program.entries.values():
        for node in entry.graph.nodes:
            if node.op == "placeholder":
                axes.labels[node] = _placeholder(axes, node)
            elif node.op == "call_function":
                axes.ties[node] = tied(node, axes.ties)
                axes.labels[node] = _call(axes, node)
                _held_to_sizes(program, node, axes.labels[node])
        _results(axes, entry)
    _arranged(axes)
    for origin, user in axes.counted.items():
        if origin in axes.indexing:
            for dim in flat(axes.labels[origin])[0]:
                pin(dim, Pin.ARANGE_BOTH, "its positions are used as numbers and as indices", user)
    return axes


def _arranged(axes: Axes) -> None:
    """What is in the order of positions shows these, unless all that is done with it puts things back."""
    weighted = {factor for label in axes.rows.values() for dim in label for factor in factors(dim)}
    for dim, domain, node in axes.arranged:
        for factor in factors(dim):
            shown = next((factor.pins[kind].reason for kind in factor.pins if kind in ORDERED), None)
            if factor in weighted:
                shown = "a weight has that axis"
            if shown:
                axes.observe(domain, node, f"what is in the order of its positions is used so: {shown}")


def _overlaps(axes: Axes) -> None:
    """Rows that are parts of one memory move together, in a way that their labels do not tell."""
    homes = defaultdict(list)
    for name, weight in axes.program.weights.items():
        if weight.value.numel() and weight.value.device.type != "meta":
            homes[storage_key(weight.value)].append(name)
    for names in homes.values():
        if len(names) > 1:
            for name in names:
                for dim in axes.rows[name]:
                    pin(dim, Pin.OPAQUE, f"{name!r} shares memory with {next(n for n in names if n != name)!r}")


def _placeholder(axes: Axes, node: fx.Node) -> Label | None:
    kind = type_of(node.meta["val"])
    if not isinstance(kind, TensorType):
        return None
    if node.meta["kind"] != Kind.INPUT:
        return axes.rows[node.meta["name"]]
    label = tuple(map(fresh, kind.shape))
    for dim in label:
        pin(dim, Pin.IO, f"an axis of the input {node.meta['name']!r}", node)
    return label


def _call(axes: Axes, node: fx.Node) -> Label | Several | None:
    kind = type_of(node.meta["val"])
    if node.target is operator.getitem:
        source, k = node.args
        domain = axes.domains.get((source, k))  # type: ignore[arg-type]
        if domain is not None:
            axes.domains[node, None] = domain
        several = axes.labels[source]  # type: ignore[index]
        return several.parts[k] if isinstance(several, Several) else None  # type: ignore[index]
    if isinstance(kind, NumberType) or kind is None:
        return None
    call = Call(axes, node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return call.opaque(f"{node.target} has no rule")
    found = rule.of(node.target)
    if found is None:
        return call.opaque(f"{op_name(node.target)} has no rule")
    label = found(call)
    call.observe_others()
    return label


def _held_to_sizes(program: Program, node: fx.Node, label: Label | Several | None) -> None:
    kind = type_of(node.meta["val"])
    parts = kind.parts if isinstance(kind, TupleType) else (kind,)
    labels = label.parts if isinstance(label, Several) else (label,)
    for part, found in zip(parts, labels, strict=True):
        wanted = part.shape if isinstance(part, TensorType) else None
        sizes = None if found is None else tuple(map(size_of, found))
        if (wanted is None) != (sizes is None) or (
            wanted is not None
            and sizes is not None
            and not (len(wanted) == len(sizes) and all(map(same_size, wanted, sizes)))
        ):
            raise VerificationError(
                f"the axes of %{node.name} were labelled with sizes {sizes}, and it has {wanted}",
                where=program.describe(node),
                why=f"the rule of {node.target} is wrong for this call",
            )


def _results(axes: Axes, entry: Entry) -> None:
    inputs = {node.meta["name"]: node for node in entry.input_nodes()}
    for output, value in zip(entry.outputs, entry.output_values, strict=True):
        label = axes.labels.get(value) if isinstance(value, fx.Node) else None
        if label is None:
            continue
        node = value
        if output.role is Role.RESULT:
            for dim in flat(label)[0]:
                pin(dim, Pin.IO, f"an axis of the result {output.name!r}", node)
            axes.observe(axes.domains.get((node, None)), node, "the caller sees its positions")
            continue
        other = axes.rows[output.name] if output.role is Role.UPDATE else flat(axes.labels[inputs[output.name]])[0]
        for a, b in zip(flat(label)[0], other, strict=True):
            axes.join(a, b, node)
        axes.observe(axes.domains.get((node, None)), node, "its positions are kept in a state")
