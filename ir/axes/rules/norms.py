"""Norms: what they average over counts, what they scale is joined with their weights."""

from __future__ import annotations

from typing import Any

from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Pin, fresh, size_of
from laconic.ir.axes.labels import Label, Several
from laconic.ir.axes.rules.table import rule


def _vectors(call: Call, names: tuple[str, ...]) -> list[list[Dim]]:
    """The labels of those of these arguments that are given."""
    given = [call.given(name) for name in names]
    return [call.dims(value) for value in given if isinstance(value, fx.Node)]


def _over_last(call: Call) -> tuple[list[Dim], int]:
    """A norm over the last axes; its operand's labels, and how many axes."""
    dims = call.dims(call.given("input"))
    count = len(call.given("normalized_shape"))
    last = dims[len(dims) - count :]
    for vector in _vectors(call, tuple(name for name in ("weight", "bias") if call.takes(name))):
        for a, b in zip(vector, last, strict=True):
            call.join(a, b)
    call.pin(last, Pin.COUNT, "a norm over it")
    call.spells("normalized_shape", last)
    return dims, count


@rule("aten.layer_norm", "aten.rms_norm")
def layer_norm(call: Call) -> Label:
    return tuple(_over_last(call)[0])


@rule("aten.native_layer_norm", "aten._fused_rms_norm")
def native_layer_norm(call: Call) -> Several:
    dims, count = _over_last(call)
    statistics = (*dims[: len(dims) - count], *[()] * count)
    return Several((tuple(dims), *[statistics] * (len(call.shapes) - 1)))


@rule("aten._native_batch_norm_legit_no_training", "aten.batch_norm", "aten._batch_norm_no_update")
@rule("aten.native_batch_norm")
def batch_norm(call: Call) -> Any:
    """Each channel by vectors of its own: statistics are constants here."""
    if call.takes("training") and call.given("training"):
        return call.opaque("batch norm that takes statistics of its input")
    dims = call.dims(call.given("input"))
    for vector in _vectors(call, ("weight", "bias", "running_mean", "running_var")):
        call.join(vector[0], dims[1])
    found = tuple(dims)
    if not isinstance(call.node.meta["val"], (tuple, list)):
        return found
    return Several((found, *[tuple(map(fresh, shape)) for shape in call.shapes[1:]]))


@rule("aten.group_norm", "aten.native_group_norm")
def group_norm(call: Call) -> Any:
    """Channels are groups of members; a norm is over the members and all space."""
    dims = call.dims(call.given("input"))
    native = "native" in str(call.node.target)
    groups = call.given("group" if native else "num_groups")
    members = size_of(dims[1]) // groups
    group, member = fresh(groups), fresh(members)
    call.join(dims[1], (*group, *member))
    call.pin([member, *dims[2:]], Pin.COUNT, "a norm over it")
    for vector in _vectors(call, ("weight", "bias")):
        call.join(vector[0], dims[1])
    call.literal(call.place("group" if native else "num_groups"), group)
    if not native:
        return tuple(dims)
    call.literal(call.place("C"), dims[1])
    return Several((tuple(dims), (dims[0], group), (dims[0], group)))


@rule("aten.instance_norm")
def instance_norm(call: Call) -> Label:
    dims = call.dims(call.given("input"))
    for vector in _vectors(call, ("weight", "bias", "running_mean", "running_var")):
        call.join(vector[0], dims[1])
    call.pin(dims[2:], Pin.COUNT, "a norm over it")
    return tuple(dims)
