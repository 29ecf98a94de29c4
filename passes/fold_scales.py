"""Which scales and shifts can be said by the weights of the products beside them, and what the weights become.

Behind a product, s (x M + b) + t is x (M s) + (s b + t). Before products, (s x + t) M + b is x (s M) + (t M + b); what
is scaled must then be read by products alone. A weight must have no other user. Weights are computed in float64 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from laconic.ir.metrics.differences import bit_equal
from laconic.ir.program import Entry, Kind, Program
from laconic.ir.types import nbytes
from laconic.passes.channelwise import ONE, ZERO, Channelwise, channelwise
from laconic.passes.constants import Constants
from laconic.passes.products import Product, product, products_of, shares_memory

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 1 << 20  # elements widened at a time


@dataclass(frozen=True, eq=False)
class Fold:
    """What is to be folded, and into which products: the one `behind` which it stands, or those before which. `offsets`
    is what its shift adds to the outputs of each of these (float64; nothing if it stands behind)."""

    what: Channelwise
    products: tuple[Product, ...]
    behind: bool
    offsets: tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Scaling:
    """What becomes of a product: y = outer (x diag(inner) M + offset + b) + shift. All float64, of no axes or one."""

    inner: torch.Tensor = ONE
    offset: torch.Tensor = ZERO
    outer: torch.Tensor = ONE
    shift: torch.Tensor = ZERO


def find_folds(program: Program, *, trainable: bool, near: list[str]) -> list[Fold]:
    """All folds that keep the model's meaning and do not let the weights grow; what almost is one goes to `near`."""
    folds = [fold for entry in program.entries.values() for fold in _Finder(program, entry, trainable, near).folds()]
    return _not_growing(program, _fitting(program, folds, near), near)


def scalings(folds: Iterable[Fold]) -> dict[Product, Scaling]:
    """What the folds together make of each product."""
    found: dict[Product, Scaling] = {}
    for fold in folds:
        for into, offset in zip(fold.products, fold.offsets, strict=True):
            old = found.get(into, Scaling())
            if fold.behind:
                found[into] = replace(old, outer=fold.what.scale, shift=fold.what.shift)
            else:
                found[into] = replace(old, inner=fold.what.scale, offset=offset)
    return found


def scaled(program: Program, into: Product, scaling: Scaling) -> torch.Tensor:
    """The product's weight with its inputs and outputs scaled, rounded once; the old one if no bit changes."""
    value = program.weights[into.row].value
    old = value.detach()
    inputs, outputs = into.sizes()
    inner, outer = scaling.inner.expand(inputs), scaling.outer.expand(outputs)
    of_row, of_column = (outer, inner) if into.outputs_first else (inner, outer)
    of_column = of_column.reshape(into.groups, -1)  # each group of rows has columns of its own
    group = torch.arange(old.shape[0]) // (old.shape[0] // into.groups)
    new = torch.empty_like(old)
    ones = (1,) * (old.dim() - 2)
    step = max(1, _CHUNK * old.shape[0] // old.numel())
    for start in range(0, old.shape[0], step):
        rows = slice(start, start + step)
        wide = old[rows].double() * of_row[rows].reshape(-1, 1, *ones)
        new[rows] = (wide * of_column[group[rows]].reshape(-1, of_column.shape[1], *ones)).to(old.dtype)
    return value if bit_equal(old, new) else new


def new_bias(program: Program, into: Product, scaling: Scaling) -> torch.Tensor | None:
    """The product's bias after folding, rounded once; None if it needs none, the old one if no bit changes."""
    old = None if into.bias is None else program.weights[into.bias.meta["name"]].value
    wide = ((ZERO if old is None else old.detach().double()) + scaling.offset) * scaling.outer + scaling.shift
    if old is None and not bool(wide.any()):
        return None
    new = wide.expand(into.sizes()[1]).to(program.weights[into.row].value.dtype).contiguous()
    return old if old is not None and bit_equal(old, new) else new


def _offset(program: Program, into: Product, shift: torch.Tensor) -> torch.Tensor:
    """What a shift of the inputs adds to each output."""
    if not bool(shift.any()):
        return ZERO
    weight = program.weights[into.row].value.detach()
    weight = weight if into.outputs_first else weight.t()
    vector = shift.expand(into.sizes()[0])
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    return torch.cat([part.double() @ vector for part in torch.split(weight, rows)])


class _Finder:
    """Finds the folds of an entry: first behind each product, then before those that share an operand."""

    def __init__(self, program: Program, entry: Entry, trainable: bool, near: list[str]) -> None:
        self._program, self._entry, self._trainable, self._near = program, entry, trainable, near
        self._constants = Constants(program, entry, read_weights=True, parameters=True)

    def folds(self) -> Iterator[Fold]:
        taken: set[fx.Node] = set()
        for node in self._entry.calls():
            into = product(self._entry, node)
            chain = self._behind(into) if into else None
            if into and chain:
                taken.update(chain.nodes)
                yield Fold(chain, (into,), True, (ZERO,))
        for node in reversed(list(self._entry.calls())):
            if node not in taken:
                found = [product(self._entry, user) for user in node.users]
                into_all = tuple(p for p in found if p is not None and p.data is node)
                chain = self._before(node, into_all, taken) if into_all else None
                if chain:
                    offsets = tuple(_offset(self._program, each, chain.shift) for each in into_all)
                    yield Fold(chain, into_all, False, offsets)

    def _behind(self, into: Product) -> Channelwise | None:
        """The longest chain that starts with the result of a product and that nothing else reads."""
        chain: Channelwise | None = None
        while True:
            last = into.node if chain is None else chain.result
            step = next((s for user in last.users if (s := channelwise(user, self._constants))), None)
            if step is None or step.source is not last or step.norm is not None:
                return chain
            longer = step if chain is None else step.after(chain)
            if not self._fits(step, longer, (into,), len(last.users) == 1, behind=True):
                return chain
            chain = longer

    def _before(self, last: fx.Node, into: tuple[Product, ...], taken: set[fx.Node]) -> Channelwise | None:
        """The longest chain that ends with what products, and nothing else, read."""
        chain: Channelwise | None = None
        step = channelwise(last, self._constants)
        alone = len(into) == len(last.users)
        while step is not None and step.result is (last if chain is None else chain.source):
            longer = step if chain is None else chain.after(step)
            if not taken.isdisjoint(step.nodes) or not self._fits(step, longer, into, alone, behind=False):
                break
            chain = longer
            alone = len(step.source.users) == 1
            step = None if step.norm else channelwise(step.source, self._constants)
        return chain

    def _fits(
        self, step: Channelwise, chain: Channelwise | None, into: tuple[Product, ...], alone: bool, *, behind: bool
    ) -> bool:
        """Whether a chain, which `step` made longer, can be folded; if not, why goes to the near misses."""
        if chain is None:
            why = "another axis is scaled beside it"
        elif not alone:
            why = "it is read by more than " + ("what scales it" if behind else "products")
        else:
            why = chain.unusable() or next((w for each in into if (w := self._misfit(chain, each, behind))), "")
        if why:
            self._near.append(f"%{step.result.name} ({why})")
        return not why

    def _misfit(self, what: Channelwise, into: Product, behind: bool) -> str:
        """Why something cannot be folded into a product; "" if it can."""
        uses, alone = products_of(self._program, into.row)
        bias = [] if into.bias is None else [into.bias]
        if not alone or len(uses) != 1 or shares_memory(self._program, into.row):
            return f"the weight {into.row!r} has other users"
        if self._program.weights[into.row].value.dtype not in _FLOATS:
            return "its weight is not of a dtype that is computed in"
        if what.axis not in (None, into.axis):
            return "it stands along another axis than the channels"
        if not behind and not into.matrix and bool(what.shift.any()):
            return "a convolution's padding would not be shifted"
        if not all(node.op == "placeholder" and self._constants.known(node) for node in (into.weight, *bias)):
            return f"a caller receives a weight of %{into.node.name}, or it is computed"
        rows = [self._program.weights[n.meta["name"]] for n in (into.weight, *bias, *_rows(what.reads))]
        if not self._trainable and any(row.trainable for row in rows):
            return "what it is made of, or folded into, is trained"
        return ""


def _rows(reads: Iterable[fx.Node]) -> set[fx.Node]:
    """The rows that constants are computed from."""
    found, waiting = set(), list(reads)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return {node for node in found if node.op == "placeholder"}


def _fitting(program: Program, folds: list[Fold], near: list[str]) -> list[Fold]:
    """The folds whose new weights hold what the old ones held: no overflow, no channel lost below normal numbers."""
    while True:
        unfit = {
            into for into, scaling in scalings(folds).items() if _loses(into, scaled(program, into, scaling), program)
        }
        if not unfit:
            return folds
        near += [f"%{into.node.name} (its weight's dtype cannot hold the product)" for into in unfit]
        folds = [fold for fold in folds if unfit.isdisjoint(fold.products)]


def _loses(into: Product, new: torch.Tensor, program: Program) -> bool:
    old = program.weights[into.row].value
    if new is old:
        return False
    least = torch.finfo(old.dtype).tiny / torch.finfo(old.dtype).eps
    was, now = (_greatest(into, value) for value in (old.detach(), new))
    return bool((torch.isfinite(was) & ~torch.isfinite(now)).any() or ((was >= least) & (now < least)).any())


def _greatest(into: Product, weight: torch.Tensor) -> torch.Tensor:
    """The greatest magnitude among the weights of each output channel; [groups, outputs of one]."""
    grouped = weight.abs().reshape(into.groups, -1, *weight.shape[1:])
    return grouped.movedim(1 if into.outputs_first else 2, 1).flatten(2).amax(2)


def _not_growing(program: Program, folds: list[Fold], near: list[str]) -> list[Fold]:
    """All folds if together they add no bytes to the weights; else those that add none, one after another."""
    if _growth(program, folds) <= 0:
        return folds
    kept: list[Fold] = []
    waiting = list(folds)
    while True:
        found = next((fold for fold in waiting if _growth(program, [*kept, fold]) <= _growth(program, kept)), None)
        if found is None:
            near += [f"%{fold.what.result.name} (a new bias would need more bytes than are saved)" for fold in waiting]
            return [fold for fold in folds if fold in kept]
        kept.append(found)
        waiting.remove(found)


def _growth(program: Program, folds: list[Fold]) -> int:
    """How many more bytes the weights have after the folds: new biases, less the rows that nothing reads any more."""
    gone = {node for fold in folds for node in fold.what.nodes}
    kept = {fold.what.source for fold in folds}
    cut: set[tuple[fx.Node | None, fx.Node]] = set()
    cut |= {(operand, fold.what.norm) for fold in folds if fold.what.norm for operand in fold.what.reads}
    added = 0
    for into, scaling in scalings(folds).items():
        bias = new_bias(program, into, scaling)
        if bias is not None and (into.bias is None or bias is not program.weights[into.bias.meta["name"]].value):
            added += nbytes(bias)
            cut.add((into.bias, into.node))
    read: set[str] = set()
    freed: set[str] = set()
    for entry in program.entries.values():
        for node in reversed(entry.graph.nodes):
            cut_off = bool(node.users) and all(u in gone or (node, u) in cut for u in node.users)
            if cut_off and node.op == "call_function" and node not in kept:
                gone.add(node)
            elif node.op == "placeholder" and node.meta["kind"] not in (Kind.INPUT, Kind.STATE):
                (freed if cut_off else read).add(node.meta["name"])
    return added - sum(nbytes(program.weights[name].value) for name in freed - read)
