"""Calls that only the first of several equal blocks makes, moved in front of it.

    %q = linear(%x, %w0)                      %b = embedding(%i, %t)
    %b = embedding(%i, %t)                    %q = linear(%x, %w0)
    %y = attend(%q, %b)               ->      %y = attend(%q, %b)
    %r = linear(%y, %w1)                      %r = linear(%y, %w1)
    %z = attend(%r, %b)                       %z = attend(%r, %b)

Some models make what all layers share (a bias of positions, a mask, a rotary table) in the middle of their first layer,
which is then no repeat of theirs. What is moved reads nothing that the block makes, writes nothing and draws no random
numbers; nothing it is moved past writes either. In training it shares no operand that gradients flow to with what it is
moved past: the order in which they are added up stays the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from laconic.ir.dynamo import Reading, value_of
from laconic.ir.listing import Repeat, SlotKind
from laconic.ir.torch_private import ops_called
from laconic.ir.torch_traits import written

#: A position, and those of the calls that are to stand in front of it.
Move = tuple[int, list[int]]


def moves_that_complete_first_blocks(reading: Reading, repeats: list[Repeat]) -> list[Move]:
    """Where such calls stand, and where they should."""
    found = (_completing(reading, repeat) for repeat in repeats)
    return [move for move in found if move is not None]


def move(reading: Reading, moves: list[Move]) -> None:
    """Make these moves in the graph that was read; the reading holds no more."""
    for first, others in moves:
        place = reading.nodes[first]
        for position in others:
            node = reading.nodes[position]
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    place.prepend(operand)
            place.prepend(node)


def _completing(reading: Reading, repeat: Repeat) -> Move | None:
    block = _block_before(reading, repeat)
    if not block:
        return None
    first, start = block[0], repeat.starts[0]
    others = sorted(set(range(first, start)).difference(block))
    return (first, others) if others and _movable(reading, block, others) else None


def _block_before(reading: Reading, repeat: Repeat) -> list[int]:
    """The calls in front of the first repeat that say the end of a block, as much of it as there is: what makes the
    carried values, followed back for as long as the calls are those of the block."""
    listing, start = reading.listing, repeat.starts[0]
    found: dict[int, int] = {}
    waiting: list[tuple[Any, Any]] = [
        (bound[1], bound[0]) for bound, kind in zip(repeat.slots, repeat.kinds, strict=True) if kind == SlotKind.CARRIED
    ]
    while waiting:
        inside, before = waiting.pop()
        if not (isinstance(inside, int) and isinstance(before, int)) or inside < start:
            continue
        if inside - start in found or listing.signatures[inside] != listing.signatures[before]:
            continue
        found[inside - start] = before
        waiting += zip(listing.operands[inside], listing.operands[before], strict=True)
    block: list[int] = []
    for offset in reversed(range(repeat.period)):
        limit = block[0] if block else start
        if found.get(offset, limit) >= limit:
            break
        block.insert(0, found[offset])
    return block


def _movable(reading: Reading, block: list[int], others: list[int]) -> bool:
    """Whether the calls at `others` may be moved in front of those of the block."""
    nodes, listing = reading.nodes, reading.listing
    stretch = range(block[0], max(block[-1], others[-1]) + 1)
    if len({reading.scopes[p] for p in stretch}) > 1 or any(written(nodes[p]) for p in stretch):
        return False
    if any(operand in block for p in others for operand in listing.operands[p]):
        return False
    if reading.recording:
        read = [{o for p in some for o in nodes[p].all_input_nodes if _requires_grad(o)} for some in (block, others)]
        if read[0] & read[1]:
            return False
    return not any(_draws(nodes[p]) for p in others)


def _requires_grad(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _draws(node: fx.Node) -> bool:
    """Whether a call may draw random numbers: told by the ops that it comes down to, on fake values."""
    tensors = [v for n in (*node.all_input_nodes, node) if isinstance(v := value_of(n), torch.Tensor)]
    mode = next((v.fake_mode for v in tensors if hasattr(v, "fake_mode")), None)
    function: Any = getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target
    if isinstance(function, torch._ops.HigherOrderOperator) or function is None:
        return True
    if mode is None:
        return bool(tensors)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    return any(torch.Tag.nondeterministic_seeded in op.tags for op in ops_called(mode, function, args, kwargs))
