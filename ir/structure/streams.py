"""Residual streams: chains of additions v' = v + f(v, context), found from ops and types alone.

    %f: f32[b, s, 32] = ... computed from %v, with a matrix product or convolution with a constant on the way
    %v2: f32[b, s, 32] = aten.add.Tensor(%v, %f)

An addition may have several terms (parallel attention and MLP), may carry v scaled, copied or cast, and may be followed
by a norm or activation before the next branch starts (post-norm models, ResNet). What f reads beside v is its context:
masks, rotary tables, an encoder's output, caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from laconic.ir.structure.reading import Reading, rearranges, scalar_of, shape_of
from laconic.ir.structure.records import NearMiss
from laconic.ir.types import TensorType, same_size, same_type, type_of

aten = torch.ops.aten

_TAIL = 24  # calls that may stand between an addition and the next branch


@dataclass
class Step:
    """A branch while it is being found. `tail` are the calls behind the addition up to where the next branch starts."""

    v: fx.Node
    add: fx.Node
    inside: set[fx.Node]
    tail: tuple[fx.Node, ...] = ()
    before: Step | None = None
    after: list[Step] = field(default_factory=list)

    @property
    def out(self) -> fx.Node:
        return self.tail[-1] if self.tail else self.add


def find_streams(reading: Reading, near: list[NearMiss]) -> list[list[Step]]:
    """The streams of an entry, in order; a stream that forks goes on where most branches follow."""
    parted: list[NearMiss] = []
    steps = list(_steps(reading, parted))
    inside = {node for step in steps for node in step.inside}
    near += [miss for miss in parted if miss.node not in inside]  # a sum inside a branch is none of the stream's
    by_add = {step.add: step for step in steps}
    for step in steps:
        link = _link(reading, step.v, by_add)
        if link is not None:
            step.before, tail = link
            step.before.after.append(step)
            if not step.before.tail:
                step.before.tail = tail
    return [_with_last_tail(reading, chain) for chain in _chains(steps)]


def _steps(reading: Reading, near: list[NearMiss]) -> Iterator[Step]:
    for node in reading.entry.calls():
        if _is_sum(node) and not _feeds_a_sum(node):
            step = _step(reading, node, near)
            if step is not None:
                yield step


def _is_sum(node: fx.Node) -> bool:
    """Whether a call adds two tensors of one type."""
    if node.target is not aten.add.Tensor or len(node.all_input_nodes) != 2:
        return False
    kinds = [type_of(n.meta["val"]) for n in node.all_input_nodes]
    return all(isinstance(k, TensorType) and k.dtype.is_floating_point for k in kinds) and same_type(
        kinds[0], kinds[1], strides=False
    )


def _feeds_a_sum(node: fx.Node) -> bool:
    """Whether a sum is but a term of a larger one."""
    return len(node.users) == 1 and _is_sum(next(iter(node.users)))


def _terms(node: fx.Node) -> list[fx.Node]:
    """What a sum adds up, over the sums that serve it alone."""
    found: list[fx.Node] = []
    waiting = [*reversed(node.all_input_nodes)]
    while waiting:
        operand = waiting.pop()
        if _is_sum(operand) and len(operand.users) == 1:
            waiting += reversed(operand.all_input_nodes)
        else:
            found.append(operand)
    return found


def _step(reading: Reading, add: fx.Node, near: list[NearMiss]) -> Step | None:
    """The branch that ends at `add`: the earliest term from which the others are computed carries the stream."""
    terms = _terms(add)
    for carrier in sorted(terms, key=reading.position.__getitem__):
        others = [t for t in terms if t is not carrier]
        for v in _carried(reading, carrier):
            if any(reading.from_to(v, term) is None for term in others):
                continue
            inside = reading.from_to(v, add)
            assert inside is not None
            if not any(map(reading.multiplies_constant, inside)):
                return None  # a polynomial, such as a written-out activation
            return Step(v, add, inside)
    if len(terms) == 2 and all(_ends_in_product(reading, t) for t in terms):
        where = str(reading.program.site(add) or "")
        reason = "each term has a matrix product or convolution of its own: no value is carried unchanged"
        near.append(NearMiss("residual branch", add, reason, where))
    return None


def _carried(reading: Reading, node: fx.Node) -> Iterator[fx.Node]:
    """A value, and what it is a copy, cast or multiple of."""
    while not reading.constant(node):
        yield node
        if node.op != "call_function" or not (rearranges(node) or scalar_of(node) is not None):
            return
        node = node.all_input_nodes[0]
        # A view of another shape carries no stream of this type any more.
        if type_of(node.meta["val"]) is None:
            return


def _ends_in_product(reading: Reading, node: fx.Node) -> bool:
    """Whether a value is a matrix product or convolution, but for one-operand calls behind it."""
    for _ in range(8):
        if reading.multiplies_constant(node):
            return True
        operands = [n for n in reading.reads(node) if not reading.constant(n)]
        if len(operands) != 1:
            return False
        node = operands[0]
    return False


def _link(reading: Reading, v: fx.Node, by_add: dict[fx.Node, Step]) -> tuple[Step, tuple[fx.Node, ...]] | None:
    """The branch whose sum `v` is, or is computed from without a product and from nothing else; and what is between."""
    if v in by_add:
        return by_add[v], ()
    stopped, passed = reading.back(v, lambda n: n in by_add, limit=_TAIL)
    if len(stopped) != 1 or len(passed) > _TAIL:
        return None
    if any(n.op != "call_function" or not _in_tail(reading, n) for n in passed):
        return None
    shown = all(map(rearranges, passed)) and _as_many(stopped[0], v)
    if not shown and not same_type(type_of(stopped[0].meta["val"]), type_of(v.meta["val"]), strides=False):
        return None
    return by_add[stopped[0]], tuple(sorted(passed, key=reading.position.__getitem__))


def _as_many(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have equally many elements."""
    return same_size(math.prod(shape_of(a)), math.prod(shape_of(b)))


def _in_tail(reading: Reading, node: fx.Node) -> bool:
    return bool(reading.reads(node)) and not reading.multiplies_constant(node)


def _chains(steps: list[Step]) -> Iterator[list[Step]]:
    length: dict[int, int] = {}
    for step in reversed(steps):
        length[id(step)] = 1 + max((length[id(s)] for s in step.after), default=0)
    taken: set[int] = set()
    for step in steps:
        if id(step) in taken:
            continue
        chain, here = [], step
        while True:
            chain.append(here)
            taken.add(id(here))
            if not here.after:
                break
            following = max(here.after, key=lambda s: length[id(s)])
            if id(following) in taken:
                break
            here = following
        yield chain


def _with_last_tail(reading: Reading, chain: list[Step]) -> list[Step]:
    """The norm behind the last sum belongs to its branch if one does behind the like branches before it."""
    last = chain[-1]
    ops = _ops(last)
    model = next((s for s in reversed(chain[:-1]) if _ops(s) == ops), None)
    if model is not None and model.tail and not last.tail:
        last.tail = _same_tail(reading, model, last.add)
    return chain


def _ops(step: Step) -> list[str]:
    return sorted(str(n.target) for n in step.inside)


def _same_tail(reading: Reading, model: Step, add: fx.Node) -> tuple[fx.Node, ...]:
    """The calls behind `add` that say what those behind the model's sum say; () if there are none."""
    twin = {model.add: add}
    for node in model.tail:
        source = next(n for n in reading.reads(node) if n in twin)

        def alike(
            candidate: fx.Node, args: tuple[object, ...] = node.args, target: object = node.target, like: fx.Node = node
        ) -> bool:
            return (
                candidate.target is target
                and same_type(type_of(candidate.meta["val"]), type_of(like.meta["val"]), strides=False)
                and len(candidate.args) == len(args)
                and all(_same_argument(a, b, twin) for a, b in zip(args, candidate.args, strict=True))
            )

        found = next((user for user in twin[source].users if alike(user)), None)
        if found is None:
            return ()
        twin[node] = found
    return tuple(twin[n] for n in model.tail)


def _same_argument(a: object, b: object, twin: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(a, fx.Node):
        if a in twin:
            return b is twin[a]
        return isinstance(b, fx.Node) and same_type(type_of(a.meta["val"]), type_of(b.meta["val"]))
    return type(a) is type(b) and repr(a) == repr(b) if not isinstance(a, (list, tuple)) else repr(a) == repr(b)
