"""Convolutions, pooling and resampling: channels go through, places in space stay where they are."""

from __future__ import annotations

from typing import Any

from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Pin, fresh, size_of
from laconic.ir.axes.labels import Label, Several
from laconic.ir.axes.rules.table import rule
from laconic.ir.types import Size

_SPACE = "neighbours in space"


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
def convolution(call: Call) -> Label:
    return _convolution(call, transposed=call.takes("transposed") and bool(call.given("transposed")))


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def conv_transpose(call: Call) -> Label:
    return _convolution(call, transposed=True)


def _convolution(call: Call, *, transposed: bool) -> Label:
    """x (batch, G.I, space), weight (G.O, I, kernel), transposed (G.I, O, kernel): one class where there is one group,
    groups apart else."""
    weight = call.dims(call.given("weight"))
    x = call.dims(call.given("input"))
    batch = x[: len(x) - len(weight) + 1]  # none, for a single image
    channels, space = x[len(batch)], x[len(batch) + 1 :]
    groups = call.given("groups")
    group = fresh(groups)
    outer, inner = weight[0], weight[1]
    if transposed:
        call.join(channels, outer)
        within = fresh(size_of(outer) // groups)
        call.join(outer, (*group, *within))
        out: Dim = (*group, *inner)
    else:
        call.join(channels, (*group, *inner))
        within = fresh(size_of(outer) // groups)
        call.join(outer, (*group, *within))
        out = outer
    bias = call.given("bias")
    if isinstance(bias, fx.Node):
        call.join(call.dims(bias)[0], out)
    call.literal(call.place("groups"), group)
    summed = ((call.given("input"), len(batch)), (call.given("weight"), 0 if transposed else 1))
    whole = groups == 1 and not transposed and call.given("padding") in ([0] * len(space), "valid")
    call.gathers(within if transposed else inner, *summed, bias="bias" if whole else None)
    call.pin([*space, *weight[2:]], Pin.ORDER, _SPACE)
    return (*batch, out, *_places(call, call.shape[len(batch) + 1 :]))


def _places(call: Call, sizes: tuple[Size, ...]) -> Label:
    return call.fresh(sizes, Pin.ORDER, _SPACE)


@rule(
    *(f"aten.{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "_adaptive_avg") for n in (1, 2, 3)),
    *(f"aten.upsample_{how}" for how in ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d")),
    *("aten._upsample_bilinear2d_aa", "aten.grid_sampler_2d"),
)
def pooled(call: Call) -> Label:
    x = call.operand
    call.observe(x)
    for other in call.node.all_input_nodes:
        if other is not x and call.axes.labels.get(other) is not None:
            call.pin(call.dims(other), Pin.ORDER, _SPACE)
    dims = call.dims(x)
    space = _space(call)
    call.pin(dims[len(dims) - space :], Pin.ORDER, _SPACE)
    return (*dims[: len(dims) - space], *_places(call, call.shape[len(dims) - space :]))


def _space(call: Call) -> int:
    """How many axes of space a pooling op has: the digit in its name."""
    return int(next(c for c in str(call.node.target) if c.isdigit()))


@rule(
    *("aten.max_pool1d_with_indices", "aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices"),
    "aten.adaptive_max_pool2d",
)
def pooled_with_places(call: Call) -> Any:
    dims = call.dims(call.operand)
    space = _space(call)
    call.pin(dims[len(dims) - space :], Pin.ORDER, _SPACE)
    found = (*dims[: len(dims) - space], *_places(call, call.shapes[0][len(dims) - space :]))
    return Several((found, found))


@rule("aten.pixel_shuffle")
def pixel_shuffle(call: Call) -> Label:
    """(channels.r.r, height, width) to (channels, height.r, width.r)."""
    *batch, channels, height, width = call.dims(call.given("self"))
    factor = call.given("upscale_factor")
    found, r, s = fresh(call.shape[-3]), fresh(factor), fresh(factor)
    call.join(channels, (*found, *r, *s))
    call.pin([height, width, r, s], Pin.ORDER, _SPACE)
    return (*batch, found, (*height, *r), (*width, *s))
