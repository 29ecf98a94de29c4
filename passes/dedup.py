"""dedup: keep one of the weights that hold the same bytes.

    parameter @a: f32[8, 8]                       parameter @a: f32[8, 8]
    parameter @b: f32[8, 8]  (same bytes)   ->    alias @b = @a
    parameter @c: f32[4, 8]  (rows 2-5 of a)      alias @c = @a[2:6]      %s = aten.slice.Tensor(@a, 0, 2, 6)

With `transposed=yes`, off unless asked for, also

    parameter @d: f32[6, 8]  (a transposed)       alias @d = transpose @a
    %y = aten.linear(%x, @d)                ->    %y = aten.matmul(%x, @a)

for weights that products alone read. Matrix kernels round otherwise on other strides, so the contract is then
`tolerance`.

Bytes are compared, not values: -0.0 is not 0.0 and a NaN equals itself. Weights of any size count. A part of another
must be contiguous rows, be worth a call (`min_slice_bytes`), and lie on 64-byte boundaries as it did, because matrix
kernels may round differently on memory aligned otherwise.

Never merged: states; weights that a result shares storage with; weights of different dtype or device; and weights that
an optimizer would treat apart, which are a parameter and a buffer, or a trained and a frozen parameter. Two trained
parameters with equal bytes are merged, since a Program is an inference program: whoever goes on training them as two
says `dedup{trainable=no}`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from laconic.ir.alias import exposed
from laconic.ir.calibration import Calibration
from laconic.ir.memory import misalignment
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.program import Alias, Entry, Kind, Program, Weight
from laconic.ir.rewrite import drop_weights, insert_call, weight_node
from laconic.ir.signature import content_key
from laconic.ir.traits import reads_requires_grad
from laconic.ir.types import nbytes
from laconic.passes.base import Contract, Pass, Plan
from laconic.passes.products import products_of, rewrite_product

_PROBES = 8
_TURNED = "another transposed"


@dataclass(frozen=True)
class Dedup(Pass):
    """`slices`: find weights that are rows of another. `min_slice_bytes`: smaller ones are not worth a call.
    `trainable`: merge trained parameters too. `transposed`: find weights that are another, transposed."""

    slices: bool = True
    min_slice_bytes: int = 4096
    trainable: bool = True
    transposed: bool = False

    name: ClassVar[str] = "dedup"
    summary: ClassVar[str] = "store weights with the same bytes once"

    @property
    def contract(self) -> Contract:
        return Contract.TOLERANCE if self.transposed else Contract.EXACT

    @property
    def reads_values(self) -> bool:
        return True

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        returned = exposed(program)
        rows = [
            w
            for w in program.weights.values()
            if w.kind is not Kind.STATE
            and w.name not in returned
            and w.value.numel()
            and (self.trainable or not w.trainable)
        ]
        actions, kept = _whole(rows)
        near: list[str] = []
        if self.transposed:
            turned, kept = _turned(program, kept, near)
            actions += turned
        if self.slices:
            actions += _parts(kept, self.min_slice_bytes, _read_for_gradients(program), near)
        reason = "no two weights hold the same bytes"
        if near:
            reason = "parts of another weight, or one transposed, yet apart: " + ", ".join(near[:4])
        return Plan(self.spec, tuple(actions), reason=reason)

    def rewrite(self, program: Program, plan: Plan) -> None:
        nodes = {entry.name: entry.weight_nodes() for entry in program.entries.values()}
        gone: dict[str, Alias] = {}
        for action in plan.actions:
            name, target = action["weight"], action["same_as"]
            rows = tuple(action["rows"]) if "rows" in action else None
            gone[name] = Alias(target, rows, transposed=action["rule"] == _TURNED)
            for entry in program.entries.values():
                known = nodes[entry.name]
                if name not in known:
                    continue
                new = weight_node(program, entry, target, known)
                if gone[name].transposed:
                    _turn(program, entry, name, new)
                    continue
                if rows is not None:
                    first = next(entry.calls())
                    args = (new, 0, rows[0], rows[1])
                    new = insert_call(
                        program, entry, first, torch.ops.aten.slice.Tensor, args, by=self.name, like=first
                    )
                known[name].replace_all_uses_with(new)
        drop_weights(program, gone)


def _read_for_gradients(program: Program) -> set[str]:
    """Trained weights that a kernel is chosen by; their rows taken by a slice do not require gradients."""
    return {
        name
        for entry in program.entries.values()
        for name, node in entry.weight_nodes().items()
        if program.weights[name].trainable and any(reads_requires_grad(user) for user in node.users)
    }


def _treated_alike(weight: Weight) -> Hashable:
    """What an optimizer and a kernel tell apart."""
    return (weight.kind is Kind.PARAMETER, weight.trainable, weight.value.dtype, str(weight.value.device))


def _whole(rows: list[Weight]) -> tuple[list[dict[str, Any]], list[Weight]]:
    """Weights equal to an earlier one, and the ones that stay."""
    groups: dict[Hashable, list[Weight]] = defaultdict(list)
    for weight in rows:
        value = weight.value
        key = (_treated_alike(weight), tuple(value.shape), value.stride(), misalignment(value))
        groups[key].append(weight)
    actions: list[dict[str, Any]] = []
    gone: set[str] = set()
    for group in groups.values():
        if len(group) < 2:
            continue
        by_content: dict[bytes, Weight] = {}
        for weight in sorted(group, key=lambda w: not w.persistent):  # a row of the state dict stays one
            first = by_content.setdefault(content_key(weight.value), weight)
            if first is not weight and bit_equal(first.value, weight.value):
                actions.append({"rule": "same bytes", "weight": weight.name, "same_as": first.name})
                gone.add(weight.name)
    return actions, [w for w in rows if w.name not in gone]


def _turned(program: Program, rows: list[Weight], near: list[str]) -> tuple[list[dict[str, Any]], list[Weight]]:
    """Matrices equal to another one transposed, and the ones that stay.

    Of two the later one goes, if nothing but products reads it (a table that is looked up stays as it is), else the
    other one; a row of the state dict stays one.
    """
    groups: dict[Hashable, list[Weight]] = defaultdict(list)
    for weight in rows:
        value = weight.value
        if value.dim() == 2 and value.is_contiguous() and not value.is_conj() and not value.is_neg():
            groups[(_treated_alike(weight), *sorted(value.shape))].append(weight)
    actions: list[dict[str, Any]] = []
    gone: set[str] = set()
    for group in groups.values():
        if len({tuple(w.value.shape) for w in group}) == 1 and len(set(group[0].value.shape)) == 2:
            continue  # all are wide, or all are tall
        by_content = {content_key(w.value): w for w in group}
        for weight in [
            *[w for w in reversed(group) if not w.persistent],
            *[w for w in reversed(group) if w.persistent],
        ]:
            other = by_content.get(content_key(weight.value.t())) if weight.name not in gone else None
            if other is None or other is weight or other.name in gone or not bit_equal(other.value, weight.value.t()):
                continue
            for less, more in ((weight, other), (other, weight)):
                if more.persistent >= less.persistent and products_of(program, less.name)[1]:
                    actions.append({"rule": _TURNED, "weight": less.name, "same_as": more.name})
                    gone.add(less.name)
                    break
            else:
                near.append(f"{weight.name} and {other.name} (not only products read them)")
    return actions, [w for w in rows if w.name not in gone]


def _turn(program: Program, entry: Entry, name: str, other: fx.Node) -> None:
    """Let the products that read a weight read the placeholder of another one, which is its transpose."""
    for product in products_of(program, name)[0]:
        if product.entry is entry:
            rewrite_product(program, product, other, product.bias, first=not product.outputs_first, by=Dedup.name)


def _parts(rows: list[Weight], min_bytes: int, fixed: set[str], near: list[str]) -> Iterator[dict[str, Any]]:
    """Weights that are consecutive rows of a larger one that stays."""
    groups: dict[Hashable, list[Weight]] = defaultdict(list)
    for weight in rows:
        if weight.value.dim() and weight.value.is_contiguous() and nbytes(weight.value) >= min_bytes:
            groups[(_treated_alike(weight), tuple(weight.value.shape[1:]))].append(weight)
    for group in groups.values():
        kept: list[Weight] = []
        for weight in sorted(group, key=lambda w: -w.value.shape[0]):
            found = next(_places(weight, kept, fixed, near), None)
            if found is None:
                kept.append(weight)
                continue
            larger, start = found
            stop = start + weight.value.shape[0]
            yield {"rule": "rows of another", "weight": weight.name, "same_as": larger.name, "rows": [start, stop]}


def _places(part: Weight, larger: list[Weight], fixed: set[str], near: list[str]) -> Iterator[tuple[Weight, int]]:
    for candidate in larger:
        if candidate.value.shape[0] <= part.value.shape[0]:
            continue
        for start in _offsets(_words(candidate.value), _words(part.value)):
            rows = candidate.value[start : start + part.value.shape[0]]
            if not bit_equal(rows, part.value):
                continue
            if misalignment(rows) != misalignment(part.value):
                why = "aligned otherwise to the 64-byte boundary"
            elif part.name in fixed:
                why = "a matmul of strided operands asks whether it requires gradients"
            else:
                yield candidate, start
                continue
            near.append(f"{part.name} in {candidate.name} ({why})")


def _words(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's rows as unsigned integers of its element size (complex numbers as two), without a copy."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found: np.ndarray[Any, Any] = real.cpu().view(kinds[real.element_size()]).reshape(tensor.shape[0], -1).numpy()
    return found


def _offsets(whole: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> list[int]:
    """Row offsets at which `part` agrees with `whole` in a few probed elements; a full comparison must follow."""
    count = whole.shape[0] - part.shape[0] + 1
    possible = np.ones(count, dtype=bool)
    for k in range(_PROBES):
        row = k * (part.shape[0] - 1) // max(1, _PROBES - 1)
        column = (k * 7919) % part.shape[1]
        possible &= whole[row : row + count, column] == part[row, column]
        if not possible.any():
            break
    return [int(i) for i in np.flatnonzero(possible)]
