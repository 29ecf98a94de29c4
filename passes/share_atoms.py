"""share-atoms: the matrices of one projection in all blocks are mixtures of a few atoms; MASA.

    parameter @layers.0.q: f32[8, 8]               constant @q_atoms: f32[2, 64]
    parameter @layers.1.q: f32[8, 8]               constant @q_mix_0: f32[1, 2]
    parameter @layers.2.q: f32[8, 8]       ->      %m = mm(@q_mix_0, @q_atoms)         the matrix anew, for many tokens
    %y = linear(%x, @layers.0.q)                   %y = linear(%x, reshape(%m, [8, 8]))

Atoms and mixtures are the principal components of the matrices, side by side as columns: of all dictionaries of so many
atoms the one that misses least, which is the tail of the eigenvalues of their Gram matrix. For one token, where reading
the atoms is all there is to do, they are multiplied first and then mixed. `rank` adds to each matrix what it then
misses, whitened by its inputs. FLOPs grow by the mixing; bytes fall to `keep`.

Fires on attention projections of blocks that recur. With `keep=1` the program is returned as it is.

"MASA: matrix-based dictionary learning for attention", 2025; its fit of trained models, Matrix PCA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from laconic.ir.calibration import Calibration
from laconic.ir.errors import UsageError
from laconic.ir.listing import SlotKind
from laconic.ir.memory import row_major
from laconic.ir.program import Program
from laconic.ir.rewrite import add_constant, drop_unused, insert_call, used_rows, weight_node
from laconic.ir.statistics.moments import Covariance
from laconic.ir.structure import EntryStructure, entry_structure
from laconic.passes.base import Contract, Needs, Pass, Plan
from laconic.passes.deciding import ENTRY, is_matrix
from laconic.passes.low_rank import add_correction, correction_of
from laconic.passes.options import check_least, check_share
from laconic.passes.products import Product, products_of

aten = torch.ops.aten

_RANKLESS = 1e-12


@dataclass(frozen=True)
class ShareAtoms(Pass):
    """`keep`: atoms for each matrix, rounded; `parts`: which projections have dictionaries, each its own. `lowering`:
    whether matrices are made anew (`rebuild`) or products mixed (`mix`); `auto` takes what needs fewer operations.
    Raises ValueError for numbers that are none."""

    keep: float = 0.5
    parts: Literal["qkv", "qkvo"] = "qkv"
    rank: int = 0
    lowering: Literal["auto", "rebuild", "mix"] = "auto"

    name: ClassVar[str] = "share-atoms"
    summary: ClassVar[str] = "mix the attention projections of all blocks from a few atoms"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[str] = "MASA 2025"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_least(0, rank=self.rank)

    @property
    def reads_values(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs.ACTIVATIONS if self.rank and self.keep < 1 else Needs.NOTHING

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        if self.keep == 1:
            return Plan(self.spec, reason="there are as many atoms as matrices")
        structure = entry_structure(program, program.forward)
        groups = list(_groups(program, structure, self.parts))
        if not groups:
            raise UsageError(
                "no attention projections recur as matrices that products alone read", hint="laconic audit"
            )
        actions, tensors = list[dict[str, Any]](), dict[str, torch.Tensor]()
        for rows in groups:
            made = _dictionary(program, rows, math.floor(self.keep * len(rows) + 0.5))
            if made is None:
                continue
            atoms, mixtures, left = made
            tensors[f"atoms.{rows[0]}"] = atoms
            for row, mixture in zip(rows, mixtures, strict=True):
                node = products_of(program, row)[0][0].node
                where = {"entry": ENTRY, "node": node.name, "site": node.meta.get("site", -1)}
                actions.append({"rule": "mix", "row": row, "atoms": rows[0], "left": left, **where})
                tensors[f"mix.{row}"] = row_major(mixture[None])
        if self.rank and calibration is not None:
            tensors |= _corrections(program, actions, tensors, self.rank, calibration)
        return Plan(self.spec, tuple(actions), tensors, "no dictionary would be smaller than the matrices")

    def rewrite(self, program: Program, plan: Plan) -> None:
        used = used_rows(program)
        names: dict[str, str] = {}
        for action in plan.actions:
            row, first = action["row"], action["atoms"]
            stem = row.replace(".", "_")
            if first not in names:
                names[first] = add_constant(
                    program, f"{first.replace('.', '_')}_atoms", plan.tensors[f"atoms.{first}"], trainable=True
                )
            mixture = add_constant(program, f"{stem}_mix", plan.tensors[f"mix.{row}"], trainable=True)
            pair = plan.tensors.get(f"outer.{row}"), plan.tensors.get(f"inner.{row}")
            for use in products_of(program, row)[0]:
                if pair[0] is not None and pair[1] is not None:
                    add_correction(program, use.entry, use.node, stem, (pair[0], pair[1]), by=self.name)
                self._lower(program, use, names[first], mixture)
        drop_unused(program, used)

    def _lower(self, program: Program, use: Product, atoms: str, mixture: str) -> None:
        """Let a product read its matrix off the atoms."""
        entry, node = use.entry, use.node
        rows = [weight_node(program, entry, name) for name in (mixture, atoms)]
        shape = [int(n) for n in use.weight.meta["val"].shape]

        order = list(entry.graph.nodes)
        readers = {node, *use.views}
        first = min(readers, key=order.index)

        def call(target: Any, *args: Any) -> fx.Node:
            return insert_call(program, entry, first, target, args, by=self.name, like=node)

        if self._mixes(use, int(rows[1].meta["val"].shape[0])):
            every = call(aten.reshape.default, rows[1], [-1, shape[1]])  # atoms one below the other
            products = call(aten.linear.default, use.data, every)
            apart = call(aten.unflatten.int, products, -1, [-1, shape[0]])
            mixed = call(aten.squeeze.dim, call(aten.matmul.default, rows[0], apart), -2)
            total = mixed if use.bias is None else call(aten.add.Tensor, mixed, use.bias)
            node.replace_all_uses_with(total)
            entry.graph.erase_node(node)
            return
        made = call(aten.reshape.default, call(aten.mm.default, *rows), shape)
        for reader in readers:
            reader.replace_input_with(use.weight, made)

    def _mixes(self, use: Product, atoms: int) -> bool:
        """Whether atoms are multiplied first: where that is said, or takes fewer operations, and the op has a form."""
        plain = use.outputs_first and not use.views and use.node.target is aten.linear.default
        if self.lowering != "auto" or not plain:
            return plain and self.lowering == "mix"
        tokens = math.prod(int(n) if isinstance(n, int) else 1 << 20 for n in use.data.meta["val"].shape[:-1])
        return tokens * atoms < tokens + atoms

    def said(self, plan: Plan) -> str:
        atoms = sum(len(value) for name, value in plan.tensors.items() if name.startswith("atoms."))
        return f"{len(plan.actions)} matrices mixed from {atoms} atoms"


def _groups(program: Program, structure: EntryStructure, parts: str) -> Iterator[list[str]]:
    """The rows of each projection in all blocks of a run, those that products alone read, each in one block."""
    wanted = {
        projection.weight
        for attention in structure.attentions
        for part in parts
        if (projection := getattr(attention, part)) is not None
    }
    for run in structure.runs:
        for slot in run.slots(SlotKind.PRIVATE):
            bound = [run.bound(slot, k) for k in range(run.count)]
            rows = [str(node.meta.get("name")) for node in bound]
            if not wanted.issuperset(bound) or len(set(rows)) < len(rows):
                continue
            if all(is_matrix(program, row) and _alone(program, row) for row in rows):
                yield rows


def _alone(program: Program, row: str) -> bool:
    uses, alone = products_of(program, row)
    return alone and bool(uses) and all(use.matrix for use in uses)


def _dictionary(program: Program, rows: list[str], count: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Atoms (atoms, numbers), mixtures (matrices, atoms), and the share of the matrices' size that is missed; None if
    that is no fewer numbers. Fewer atoms where matrices depend on each other."""
    values = [program.weights[row].value.detach() for row in rows]
    flat = torch.stack([value.double().flatten() for value in values])
    energy, vectors = torch.linalg.eigh(flat @ flat.T)
    energy, vectors = energy.flip(0).clamp(min=0.0), vectors.flip(1)
    rank = int((energy > _RANKLESS * energy[0]).sum())
    count = min(max(1, count), max(1, rank))
    if count * (flat.shape[1] + len(rows)) >= flat.numel():
        return None
    roots = energy[:count].sqrt().clamp(min=1e-300)
    atoms = (vectors[:, :count] / roots).T @ flat
    mixtures = vectors[:, :count] * roots
    left = float((energy[count:].sum() / energy.sum().clamp(min=1e-300)).sqrt())
    # Atoms of the matrices' own size: both factors then round alike in narrow dtypes.
    scale = energy.sum().div(len(rows)).sqrt().clamp(min=1e-300)
    dtype = values[0].dtype
    return row_major((atoms * scale).to(dtype)), (mixtures / scale).to(dtype), left


def _corrections(
    program: Program,
    actions: list[dict[str, Any]],
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    calibration: Calibration,
) -> dict[str, torch.Tensor]:
    """What each matrix misses, whitened by its inputs, in so many directions."""
    uses = {}
    for action in actions:
        own = [use for use in products_of(program, action["row"])[0] if use.entry.name == ENTRY]
        uses[action["row"]] = own[0]
    asked = {row: Covariance(use.data.name) for row, use in uses.items()}
    found = calibration.statistics(program, list(asked.values()))
    made = dict[str, torch.Tensor]()
    for action in actions:
        row, use = action["row"], uses[action["row"]]
        value = program.weights[row].value.detach()
        now = (tensors[f"mix.{row}"].double() @ tensors[f"atoms.{action['atoms']}"].double()).reshape(value.shape)
        missing = value.double() - now
        correction = correction_of(use, missing, found[asked[row]], rank, value.dtype)
        made |= {f"outer.{row}": correction.outer, f"inner.{row}": correction.inner}
    return made
