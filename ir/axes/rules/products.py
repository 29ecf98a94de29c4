"""Products: linear, matrix products, einsum, attention, grouped products. What is summed over is joined."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Pin, fresh, quotient, size_of
from laconic.ir.axes.labels import Label, Several
from laconic.ir.axes.rules.pointwise import broadcast
from laconic.ir.axes.rules.table import rule


@rule("aten.linear")
def linear(call: Call) -> Label:
    *rows, inner = call.dims(call.given("input"))
    weight, bias = call.dims(call.given("weight")), call.given("bias")
    call.join(inner, weight[-1])
    call.gathers(inner, (call.given("input"), -1), (call.given("weight"), -1), bias="bias")
    out = weight[:-1]
    if bias is not None:
        for a, b in zip(reversed(call.dims(bias)), reversed(out), strict=False):
            call.join(a, b)
    return (*rows, *out)


def _product(call: Call, left: fx.Node, right: fx.Node, bias: str | None = None) -> list[Dim]:
    """left @ right as torch.matmul has it, batch axes broadcast."""
    a, b = call.dims(left), call.dims(right)
    rows = a[-2:-1]
    columns = b[-1:] if len(b) > 1 else []
    inner = -2 if len(b) > 1 else -1
    call.join(a[-1], b[inner])
    call.gathers(a[-1], (left, -1), (right, inner), bias=bias)
    return [*broadcast(call, [a[:-2], b[:-2]]), *rows, *columns]


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(call: Call) -> Label:
    a, b = call.node.args[:2]
    for value in (a, b):
        call.observe(value)
    return tuple(_product(call, a, b))  # type: ignore[arg-type]


@rule("aten.addmm", "aten.baddbmm")
def addmm(call: Call) -> Label:
    added, a, b = call.node.args[:3]
    plain = (call.given("alpha"), call.given("beta")) == (1, 1)
    found = _product(call, a, b, bias="self" if plain else None)  # type: ignore[arg-type]
    return tuple(broadcast(call, [found, call.dims(added)]))  # type: ignore[arg-type]


@rule("aten.outer", "aten.ger")
def outer(call: Call) -> Label:
    a, b = call.node.args[:2]
    return (*call.dims(a), *call.dims(b))  # type: ignore[arg-type]


@rule("aten.einsum")
def einsum(call: Call) -> Any:
    equation = str(call.given("equation")).replace(" ", "")
    if "." in equation:
        return call.opaque("einsum with an ellipsis")
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        letters = sorted(set(inputs) - {","})
        output = "".join(letter for letter in letters if inputs.count(letter) == 1)
    known: dict[str, Dim] = {}
    summed: dict[str, list[tuple[fx.Node, int]]] = {letter: [] for letter in inputs if letter not in f"{output},"}
    for term, value in zip(terms, call.given("tensors"), strict=True):
        dims = call.dims(value)
        for letter in summed:
            if letter in term and dims[term.index(letter)]:
                summed[letter].append((value, term.index(letter)))
        for k, (letter, dim) in enumerate(zip(term, dims, strict=True)):
            if letter in term[:k]:
                call.pin([dim], Pin.ORDER, "a diagonal")
            if dim and known.get(letter):
                call.join(known[letter], dim)
            elif dim or letter not in known:
                known[letter] = dim
    for letter, operands in summed.items():
        call.gathers(known[letter], *operands)
    return tuple(known[letter] for letter in output)


def _attention(call: Call) -> tuple[list[Dim], list[Dim], list[Dim]]:
    """Join what attention joins; its batch and head axes, the queries, and the width of values."""
    q, k, v = (call.dims(call.given(name)) for name in ("query", "key", "value"))
    call.join(q[-1], k[-1])
    call.join(k[-2], v[-2])
    call.gathers(q[-1], (call.given("query"), -1), (call.given("key"), -1))
    call.pin([k[-2]], Pin.MASK, "keys that a softmax is over")
    if call.given("is_causal"):
        call.pin([q[-2], k[-2]], Pin.ORDER, "a causal mask")
    for a, b in zip(k[:-2], v[:-2], strict=True):
        if a and b:
            call.join(a, b)
    if call.takes("enable_gqa") and call.given("enable_gqa") and q[-3:-2] and k[-3]:
        times = quotient(size_of(q[-3]), size_of(k[-3]))
        if times is not None:
            call.join(q[-3], (*k[-3], *fresh(times)))
        lead = [*broadcast(call, [q[:-3], k[:-3]]), q[-3]]
    else:
        lead = broadcast(call, [q[:-2], k[:-2], v[:-2]])
    mask = call.given("attn_mask") if call.takes("attn_mask") else None
    if isinstance(mask, fx.Node):
        call.observe(mask)
        broadcast(call, [[*lead, q[-2], k[-2]], call.dims(mask)])
        call.gathers(k[-2], (mask, -1), neutral=_masked(mask))
    else:
        call.gathers(k[-2])
    if call.takes("scale") and call.given("scale") is None:
        call.axes.scales.append((call.node, q[-1]))
    return lead, [q[-2]], [v[-1]]


def _masked(mask: fx.Node) -> float:
    """What keeps a key out of attention: -inf to be added, or False."""
    return 0.0 if mask.meta["val"].dtype == torch.bool else -math.inf


@rule("aten.scaled_dot_product_attention")
def attention(call: Call) -> Label:
    lead, queries, width = _attention(call)
    return (*lead, *queries, *width)


@rule("aten._scaled_dot_product_flash_attention_for_cpu")
def flash_attention(call: Call) -> Several:
    lead, queries, width = _attention(call)
    return Several(((*lead, *queries, *width), (*lead, *queries)))


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(call: Call) -> Label:
    """Rows sorted by group, one matrix a group: (rows, inner) by (groups, inner, columns), ends of the groups."""
    rows, matrices, offsets = (n for n in call.node.all_input_nodes[:3])
    a, b = call.dims(rows), call.dims(matrices)
    if len(a) != 2 or len(b) != 3:
        return call.opaque("a grouped product of other shapes")  # type: ignore[return-value]
    call.join(a[-1], b[-2])
    call.gathers(a[-1], (rows, -1), (matrices, -2))
    call.join(b[0], call.dims(offsets)[0])
    call.chooses(b[0])
    return (a[0], b[-1])


@rule("aten._weight_norm_interface", "aten._weight_norm")
def weight_norm(call: Call) -> Label | Several:
    direction, length = (call.dims(call.node.args[k]) for k in (0, 1))  # type: ignore[arg-type]
    found = tuple(broadcast(call, [direction, length]))
    return Several((found, tuple(length))) if "interface" in str(call.node.target) else found
