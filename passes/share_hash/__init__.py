"""share-hash: all matrices stand in one array of fewer numbers, fitted to them; `mapping` says which number is whose.

    parameter @a: f32[8, 8]                        constant @hash_shared: f32[64]       constant @hash_signs: f32[8191]
    parameter @b: f32[8, 8]                        %p = slice(@hash_shared, 0, 40, 64)  %q = slice(@hash_shared, ...)
    %y = linear(%x, @b)                     ->     %w = reshape(mul(mul(cat(%p, %q), signs), scale))
                                                   %y = linear(%x, %w)

A trained model says little of itself in a fraction of its numbers, drawn at random: this is what a model that is
trained so from the start is compared with. For that, `share_hash` converts a module, and `scale_steps` an optimizer.

Fires on floating-point parameters of two axes or more and of `least` elements. With `ratio=1` the program is returned
as it is. `simplify` folds what is computed from constants: behind this pass it would store the signs of
small weights one by one, up to its `max-bytes` each, so it belongs before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from laconic.ir.calibration import Calibration
from laconic.ir.errors import UsageError
from laconic.ir.program import Alias, Entry, Program
from laconic.ir.rewrite import add_constant, drop_weight, insert_call, weight_node
from laconic.ir.types import nbytes
from laconic.passes.base import Contract, Pass, Plan
from laconic.passes.deciding import is_matrix, refuse_quantised
from laconic.passes.options import check_least, check_share
from laconic.passes.share_hash.mapping import RandomFold
from laconic.passes.share_hash.module import fitted, scale_of, scale_steps, share_hash, slot_scale

__all__ = ["ShareHash", "scale_steps", "share_hash", "slot_scale"]

aten = torch.ops.aten

#: How many numbers one may stand for: each turn of the array is a piece of the graph.
_TURNS = 1000


@dataclass(frozen=True)
class ShareHash(Pass):
    """`ratio`: how many numbers are left for each; `least`: elements of a weight that takes part; `seed`: of the
    mapping. Raises ValueError for numbers that are none."""

    ratio: float = 0.5
    least: int = 1024
    seed: int = 0

    name: ClassVar[str] = "share-hash"
    summary: ClassVar[str] = "fit all matrices into one smaller array, by address arithmetic"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[str] = "STABLE-RPS, after ROAST 2023"

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        check_least(1, least=self.least)
        check_least(0, seed=self.seed)

    @property
    def reads_values(self) -> bool:
        return True

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        if self.ratio == 1:
            return Plan(self.spec, reason="all numbers are kept")
        refuse_quantised(program, program.weights)
        rows = [
            row
            for row, weight in program.weights.items()
            if is_matrix(program, row) and weight.value.numel() >= self.least
        ]
        if not rows:
            return Plan(self.spec, reason=f"no parameter has two axes and {self.least} elements")
        values = [program.weights[row].value.detach() for row in rows]
        total = sum(value.numel() for value in values)
        fold = RandomFold(total, max(1, int(self.ratio * total)), self.seed)
        if fold.slots * _TURNS < total:
            raise UsageError(
                f"{fold.slots} numbers for {total} are too few", why=f"each would stand for more than {_TURNS}"
            )
        actions, weights, first = [], [], 0
        for row, value in zip(rows, values, strict=True):
            scale = scale_of(value)
            actions.append({"rule": "fold", "row": row, "first": first, "scale": scale, "entry": "forward", "site": -1})
            weights.append((value, first, scale))
            first += value.numel()
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
        array = fitted(fold, weights).to(dtype)
        if nbytes(array) + nbytes(fold.table.to(dtype)) >= sum(map(nbytes, values)):
            return Plan(self.spec, reason="the array and its signs would take no fewer bytes than the matrices")
        return Plan(self.spec, tuple(actions), {"array": array})

    def rewrite(self, program: Program, plan: Plan) -> None:
        array = add_constant(program, "hash_shared", plan.tensors["array"], trainable=True)
        total = sum(program.weights[action["row"]].value.numel() for action in plan.actions)
        fold = RandomFold(total, len(plan.tensors["array"]), self.seed)
        signs = add_constant(program, "hash_signs", fold.table.to(plan.tensors["array"].dtype))
        for action in plan.actions:
            row = action["row"]
            for entry in program.entries.values():
                node = entry.weight_nodes().get(row)
                if node is not None and node.users:
                    made = _Expansion(program, entry, node, self.name).of(fold, (array, signs), action)
                    node.replace_all_uses_with(made)
            drop_weight(program, row, Alias(None))

    def said(self, plan: Plan) -> str:
        return f"{len(plan.actions)} weights in {len(plan.tensors['array'])} numbers"


class _Expansion:
    """The calls that compute one weight from the array, in front of what reads it first."""

    def __init__(self, program: Program, entry: Entry, node: fx.Node, by: str) -> None:
        self._program, self._entry, self._node, self._by = program, entry, node, by
        order = {n: k for k, n in enumerate(entry.graph.nodes)}
        self._first = min(node.users, key=order.__getitem__)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return insert_call(self._program, self._entry, self._first, target, args, by=self._by, like=self._first)

    def _parts(self, row: fx.Node, parts: Sequence[tuple[int, int, int]]) -> fx.Node:
        """Parts of a row (start, stop, how often) one behind the other."""
        found = []
        for start, stop, times in parts:
            whole = (start, stop) == (0, int(row.meta["val"].shape[0]))
            piece = row if whole else self._call(aten.slice.Tensor, row, 0, start, stop)
            found.append(self._call(aten.repeat.default, piece, [times]) if times > 1 else piece)
        return found[0] if len(found) == 1 else self._call(aten.cat.default, found)

    def of(self, fold: RandomFold, rows: tuple[str, str], action: Mapping[str, Any]) -> fx.Node:
        shape = [int(n) for n in self._node.meta["val"].shape]
        first, count = action["first"], self._node.meta["val"].numel()
        array, signs = (weight_node(self._program, self._entry, row) for row in rows)
        values = self._parts(array, [(start, start + length, 1) for start, length in fold.pieces(first, count)])
        signed = self._call(aten.mul.Tensor, values, self._parts(signs, list(fold.periods(first, count))))
        scaled = self._call(aten.mul.Tensor, signed, action["scale"])
        made = self._call(aten.reshape.default, scaled, shape)
        dtype = self._node.meta["val"].dtype
        return made if dtype == made.meta["val"].dtype else self._call(aten.to.dtype, made, dtype)
