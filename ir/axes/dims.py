"""Labels of axes. What is joined here is the same axis, wherever it stands.

A dim labels one axis of one value: an ordered product of atoms, outermost first; the empty product has size 1. An atom
is a `Factor`, a variable, or a `Sum` of dims one behind the other. So heads merged are `h.d`, the rows of a fused QKV
matrix `(h.d + g.d + g.d)`, the halves of a rotary head `(r + r)`, a gate and an up matrix stacked `(i + i)`.

`join` makes two dims one: it walks both products from the right, where strides are smallest, splits atoms whose sizes
divide, and links them. What cannot be aligned is pinned: that costs freedom, and is no error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from torch import fx

from laconic.ir.types import Size, same_size

#: How often a factor may be cut where another axis ends, before cutting it again is given up: `x[1:] - x[:-1]` would
#: cut for ever.
_DEEPEST = 64


class Pin(StrEnum):
    """Why the positions of an axis may not be moved, or not be left out."""

    IO = "io"  # the caller sees it
    OPAQUE = "opaque"  # an op without a rule
    MISALIGNED = "misaligned"  # axes that do not divide into each other
    ENUM = "enum"  # elements are addressed one by one
    ORDER = "order"  # position matters: a sum along it, neighbours in space
    TIES = "ties"  # the first of several that are equal is chosen
    ARRANGED = "arranged"  # in the order of values, which data decides
    DATA_INDEX = "data-index"  # chosen by values that are known at run time only
    OBSERVED = "observed"  # positions are used as numbers
    ARANGE_BOTH = "arange-both"  # positions are used as numbers and as indices
    COUNT = "count"  # its size enters the values: a mean, a norm
    MASK = "mask"  # positions count unless they are masked: a softmax, a maximum, a product over it
    TOPK = "topk"  # the greatest along it are chosen


#: What shows that the order along an axis matters, and not only to calls that put things back.
ORDERED = frozenset({Pin.IO, Pin.OPAQUE, Pin.MISALIGNED, Pin.ENUM, Pin.ORDER, Pin.DATA_INDEX, Pin.OBSERVED})
#: These allow a permutation; a pass that knows why the values stay right may shrink them too.
SOFT = frozenset({Pin.COUNT, Pin.MASK, Pin.TOPK})
#: Of these, those that do not matter at positions where what is gathered holds the neutral element (`labels.Gather`).
MASKED = frozenset({Pin.MASK, Pin.TOPK})


@dataclass(frozen=True)
class Why:
    """What pinned an axis: a reason in words, and the node."""

    reason: str
    node: fx.Node | None = None


@dataclass(eq=False)
class Factor:
    """A variable: `size` positions that are wherever this factor is. `link` is what it was found to be."""

    size: Size
    pins: dict[Pin, Why] = field(default_factory=dict)
    generation: int = 0
    link: Dim | None = None
    joined: int = 1


@dataclass(eq=False)
class Sum:
    """Dims one behind the other. `link` is what it was found to be."""

    parts: list[Dim]
    link: Dim | None = None

    @property
    def size(self) -> Size:
        return total(size_of(part) for part in self.parts)


Atom: TypeAlias = Factor | Sum
Dim: TypeAlias = tuple[Atom, ...]


# Sizes


def total(sizes: Iterator[Size]) -> Size:
    found: Size = 0
    for size in sizes:
        found = found + size
    return found if isinstance(found, int) else _plain(sympy.expand(found))


def size_of(dim: Dim) -> Size:
    found: Size = 1
    for atom in dim:
        found = found * atom.size
    return found


def _plain(size: Any) -> Size:
    return int(size) if size.is_Integer else size


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where b divides a for every value of their symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return _symbolic_quotient(sympy.sympify(a), sympy.sympify(b))


@lru_cache(maxsize=4096)
def _symbolic_quotient(a: sympy.Expr, b: sympy.Expr) -> Size | None:
    if b.is_zero or a.has(sympy.Function) or b.has(sympy.Function):
        return 1 if a == b else None
    over, under = sympy.fraction(sympy.cancel(a / b))
    if under != 1 or any(not c.is_Integer for c in sympy.Poly(over).coeffs() if over.free_symbols):
        return None
    return _plain(sympy.expand(over))


def order(a: Size, b: Size) -> int | None:
    """-1, 0 or 1 as a is less than, equal to or greater than b for every value of their symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return (a > b) - (a < b)
    difference = sympy.expand(sympy.sympify(a) - sympy.sympify(b))
    if difference.is_zero:
        return 0
    if difference.is_positive:
        return 1
    return -1 if difference.is_negative else None


# What labels say


def fresh(size: Size) -> Dim:
    """A new axis of this size."""
    return () if isinstance(size, int) and size == 1 else (Factor(size),)


def resolve(dim: Dim) -> Dim:
    """The dim as it is known now: links followed."""
    if all(atom.link is None for atom in dim):
        return dim
    found: list[Atom] = []
    stack = list(reversed(dim))
    while stack:
        atom = stack.pop()
        if atom.link is None:
            found.append(atom)
        else:
            if len(atom.link) == 1 and atom.link[0].link is not None:
                atom.link = atom.link[0].link  # a chain gets shorter each time it is walked
            stack.extend(reversed(atom.link))
    return tuple(found)


def parts_of(atom: Sum) -> list[Dim]:
    """The parts of a sum as they are known now, those of sums in it among them."""
    found: list[Dim] = []
    for part in atom.parts:
        known = resolve(part)
        if len(known) == 1 and isinstance(known[0], Sum):
            found += parts_of(known[0])
        else:
            found.append(known)
    atom.parts = found
    return found


def sum_of(parts: list[Dim]) -> Dim:
    """Dims one behind the other, empty ones left out."""
    kept = [part for part in parts if not _is_zero(size_of(part))]
    return kept[0] if len(kept) == 1 else (Sum(kept),)


def _is_zero(size: Size) -> bool:
    return isinstance(size, int) and size == 0


def factors(dim: Dim) -> Iterator[Factor]:
    """The variables in a dim, each as often as it stands there."""
    for atom in resolve(dim):
        if isinstance(atom, Factor):
            yield atom
        else:
            for part in parts_of(atom):
                yield from factors(part)


def pin(dim: Dim, kind: Pin, reason: str, node: fx.Node | None = None) -> None:
    """Hold all positions of an axis where they are."""
    for factor in factors(dim):
        factor.pins.setdefault(kind, Why(reason, node))


# Joining


class Misfit(Exception):
    """Two atoms that do not align."""


def join(a: Dim, b: Dim, node: fx.Node | None = None) -> bool:
    """Make two dims of equal size one. Where they do not align, both are pinned; whether they did."""
    try:
        _join(a, b)
    except Misfit as problem:
        for dim in (a, b):
            pin(dim, Pin.MISALIGNED, str(problem), node)
        return False
    return True


def _join(a: Dim, b: Dim) -> None:
    left, right = list(resolve(a)), list(resolve(b))
    while left and right:
        x, y = left.pop(), right.pop()
        if x.link is not None or y.link is not None:  # linked meanwhile, by what stood to the right
            left += resolve((x,))
            right += resolve((y,))
        elif x is y:
            continue
        elif same_size(x.size, y.size):
            _join_atoms(x, y)
        elif (times := quotient(x.size, y.size)) is not None:
            left += _split_right(x, times, y.size)
            right.append(y)
        elif (times := quotient(y.size, x.size)) is not None:
            right += _split_right(y, times, x.size)
            left.append(x)
        else:
            raise Misfit(f"{x.size} and {y.size} elements do not divide into each other")
    if any(not same_size(atom.size, 1) for atom in left + right):
        raise Misfit(f"axes of {size_of(a)} and {size_of(b)} elements")


def _join_atoms(a: Atom, b: Atom) -> None:
    if isinstance(a, Sum) and isinstance(b, Sum):
        _align(a, b)
    elif isinstance(a, Sum):
        _link_to_sum(b, a)  # type: ignore[arg-type]
    elif isinstance(b, Sum):
        _link_to_sum(a, b)
    else:
        if a.joined < b.joined:
            a, b = b, a
        _merge_pins(a, b)
        a.generation = max(a.generation, b.generation)
        a.joined += b.joined
        b.link = (a,)


def _merge_pins(into: Factor, of: Factor) -> None:
    for kind, why in of.pins.items():
        into.pins.setdefault(kind, why)


def _link_to_sum(factor: Factor, found: Sum) -> None:
    """A factor turns out to have parts; each is a generation further from an axis as a whole."""
    generation = factor.generation + 1
    leaves = list(factors((found,)))
    if generation > _DEEPEST:
        raise Misfit("an axis that is cut again and again")
    for leaf in leaves:
        _merge_pins(leaf, factor)
        leaf.generation = max(leaf.generation, generation)
    factor.link = (found,)


def _split_right(atom: Atom, times: Size, size: Size) -> Dim:
    """An atom as a product of `times` by `size`; sums are split part by part, or where whole parts add up to `size`."""
    if isinstance(atom, Factor):
        halves = tuple(Factor(n, dict(atom.pins), atom.generation) for n in (times, size))
        atom.link = halves
        return halves
    parts = parts_of(atom)
    if all(quotient(size_of(part), size) is not None for part in parts):
        pieces = [_split_dim(part, size) for part in parts]
        for _, right in pieces[1:]:
            _join(pieces[0][1], right)
        found: Dim = (Sum([left for left, _ in pieces]), *resolve(pieces[0][1]))
    else:
        groups = _grouped(parts, size)
        for group in groups[1:]:
            _join(groups[0], group)
        found = (Sum([()] * len(groups)), *resolve(groups[0]))
    atom.link = found
    return found


def _split_dim(dim: Dim, size: Size) -> tuple[Dim, Dim]:
    """A dim cut into a left and a right product, the right one of this size."""
    left: list[Atom] = list(resolve(dim))
    taken: list[Atom] = []
    wanted = size
    while not same_size(wanted, 1):
        if not left:
            raise Misfit(f"no {size} elements at the right of an axis")
        atom = left.pop()
        if (rest := quotient(wanted, atom.size)) is not None:
            taken.insert(0, atom)
            wanted = rest
        elif (times := quotient(atom.size, wanted)) is not None:
            left += _split_right(atom, times, wanted)
        else:
            raise Misfit(f"{atom.size} and {wanted} elements do not divide into each other")
    return tuple(left), tuple(taken)


def _grouped(parts: list[Dim], size: Size) -> list[Dim]:
    """Consecutive parts put together so that each group has this size."""
    groups: list[Dim] = []
    own: list[Dim] = []
    for part in parts:
        own.append(part)
        reached = total(size_of(p) for p in own)
        if same_size(reached, size):
            groups.append(sum_of(own))
            own = []
        elif order(reached, size) != -1:
            break
    else:
        if not own:
            return groups
    raise Misfit(f"parts that do not add up to {size} elements")


def _align(a: Sum, b: Sum) -> None:
    """Join two sums part by part, cutting parts where only one of them ends."""
    left, right = list(reversed(parts_of(a))), list(reversed(parts_of(b)))
    while left and right:
        x, y = left.pop(), right.pop()
        relation = order(size_of(x), size_of(y))
        if relation is None:
            raise Misfit(f"parts of {size_of(x)} and {size_of(y)} elements")
        if relation < 0:
            y, rest = _cut(y, size_of(x))
            right.append(rest)
        elif relation > 0:
            x, rest = _cut(x, size_of(y))
            left.append(rest)
        _join(x, y)
    if left or right:
        raise Misfit("sums of other lengths")
    parts_of(a)
    b.link = (a,)


def _cut(dim: Dim, size: Size) -> tuple[Dim, Dim]:
    """A dim as its first `size` positions and the rest."""
    rest = size_of(dim) - size
    first, second = fresh(size), fresh(rest if isinstance(rest, int) else _plain(sympy.expand(rest)))
    generation = max((factor.generation for factor in factors(dim)), default=0)
    for factor in (*factors(first), *factors(second)):
        factor.generation = generation
    _join(dim, (Sum([first, second]),))
    return resolve(first), resolve(second)
