"""share-rows: store rows of embedding tables that hold the same bytes once.

    parameter @t: f32[6, 8]  (rows 2, 4, 5 alike)      constant @t_places: i32[6, 1]   constant @t_rows: f32[4, 8]
    %y = aten.embedding(%t, %ids)               ->     %k = aten.embedding(@t_places, %ids)
                                                       %p = aten.squeeze.dim(%k, -1)
                                                       %y = aten.embedding(@t_rows, %p)

Unused vocabulary, padding, words that were initialised and never seen: such rows are often alike. With `merge`, tables
of one width and dtype that have rows in common are stored as one, each with places of its own.

Fires where lookups alone read a table and the rows that go are worth more than the places, four bytes each, and
`min_bytes` besides. Bytes are compared, not values. Ids that are none of the table are refused as before. A table that
something else reads, as a tied output head does, stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from laconic.ir.alias import exposed
from laconic.ir.calibration import Calibration
from laconic.ir.program import Alias, Kind, Program, Weight
from laconic.ir.rewrite import add_constant, by_name, drop_weight, insert_call, weight_node
from laconic.passes.base import Contract, Pass, Plan

aten = torch.ops.aten

_PLACE_BYTES = 4


@dataclass(frozen=True)
class ShareRows(Pass):
    """`merge`: store tables that have rows in common as one. `min_bytes`: what is saved at least."""

    merge: bool = True
    min_bytes: int = 4096

    name: ClassVar[str] = "share-rows"
    summary: ClassVar[str] = "store equal rows of embedding tables once"
    contract: ClassVar[Contract] = Contract.EXACT

    @property
    def reads_values(self) -> bool:
        return True

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        near: list[str] = []
        tables = list(_tables(program, near))
        actions, tensors = [], dict[str, torch.Tensor]()
        for group in _groups(tables, merge=self.merge):
            first, places = _unique([table.value for table in group])
            rows, width = sum(len(table.value) for table in group), group[0].value[0].nbytes
            saved = (rows - len(first)) * width - rows * _PLACE_BYTES
            if rows > len(first) and saved < self.min_bytes:
                near.append(
                    f"{rows - len(first)} rows of {' and '.join(t.name for t in group)} would save {saved} bytes"
                )
            elif rows > len(first):
                names = [table.name for table in group]
                node = _lookups(program, names[0])[0]
                actions.append(
                    {
                        "rule": "equal rows",
                        "entry": node[0],
                        "node": node[1],
                        "site": by_name(program.entries[node[0]])[node[1]].meta.get("site"),
                        "weights": names,
                        "rows": rows - len(first),
                    }
                )
                tensors[f"first.{names[0]}"] = torch.from_numpy(first)
                tensors |= {f"places.{n}": torch.from_numpy(p) for n, p in zip(names, places, strict=True)}
        reason = "no two rows of an embedding table hold the same bytes"
        if near:
            reason = "; ".join(near[:4])
        return Plan(self.spec, tuple(actions), tensors, reason)

    def rewrite(self, program: Program, plan: Plan) -> None:
        for action in plan.actions:
            names = action["weights"]
            whole = torch.cat([program.weights[name].value.detach() for name in names])
            stem = names[0].replace(".", "_")
            rows = add_constant(program, f"{stem}_rows", whole[plan.tensors[f"first.{names[0]}"]])
            for name in names:
                places = plan.tensors[f"places.{name}"][:, None]
                self._look_up(program, name, rows, add_constant(program, f"{name.replace('.', '_')}_places", places))

    def _look_up(self, program: Program, name: str, rows: str, places: str) -> None:
        """Let all lookups in a table find their row by its place."""
        for entry_name, node_name in _lookups(program, name):
            entry = program.entries[entry_name]
            node = by_name(entry)[node_name]
            table = weight_node(program, entry, places)
            found = insert_call(
                program, entry, node, aten.embedding.default, (table, node.args[1]), by=self.name, like=node
            )
            place = insert_call(program, entry, node, aten.squeeze.dim, (found, -1), by=self.name, like=node)
            node.args = (weight_node(program, entry, rows), place)
            node.kwargs = {}
            node.meta["by"] = self.name
        drop_weight(program, name, Alias(None))

    def said(self, plan: Plan) -> str:
        rows = sum(action["rows"] for action in plan.actions)
        return f"{rows} rows of {sum(len(action['weights']) for action in plan.actions)} tables stored once"


def _lookups(program: Program, name: str) -> list[tuple[str, str]]:
    """The lookups in a table: entry and call."""
    return [
        (entry.name, user.name)
        for entry in program.entries.values()
        if name in entry.weight_nodes()
        for user in entry.weight_nodes()[name].users
    ]


def _tables(program: Program, near: list[str]) -> Iterator[Weight]:
    """The rows of the weight table that lookups alone read."""
    returned = exposed(program)
    for name, weight in program.weights.items():
        users = [u for e in program.entries.values() if name in e.weight_nodes() for u in e.weight_nodes()[name].users]
        reads = [user.target is aten.embedding.default and user.args[0].meta.get("name") == name for user in users]  # type: ignore[union-attr]
        if weight.value.dim() != 2 or not any(reads) or weight.kind is Kind.STATE or weight.value.device.type == "meta":
            continue
        if all(reads) and name not in returned:
            yield weight
        else:
            near.append(f"{name} is read by other calls too")


def _groups(tables: Sequence[Weight], *, merge: bool) -> Iterator[list[Weight]]:
    """The tables that are stored as one: those that have a row in common, directly or by way of others."""
    kinds: dict[Hashable, list[Weight]] = defaultdict(list)
    for table in tables:
        kinds[table.value.dtype, int(table.value.shape[1]), str(table.value.device)].append(table)
    for alike in kinds.values():
        groups: list[tuple[list[Weight], set[bytes]]] = []
        for table in alike:
            own = set(map(bytes, _bytes(table.value)))
            joined = [group for group in groups if merge and not own.isdisjoint(group[1])]
            groups = [group for group in groups if all(group is not other for other in joined)]
            groups.append(([w for group in joined for w in group[0]] + [table], own.union(*(g[1] for g in joined))))
        yield from (group for group, _ in groups)


def _bytes(value: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of each row, (rows, bytes)."""
    found: np.ndarray[Any, Any] = value.detach().contiguous().cpu().view(torch.uint8).numpy()
    return found


def _unique(tables: Sequence[torch.Tensor]) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """The first position of each row that differs, among the rows of all tables, and for each table the places of its
    rows among these, int32."""
    rows = np.concatenate([_bytes(table) for table in tables])
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1]))).reshape(-1)
    _, first, places = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)  # rows stay in the order in which they came
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    found = rank[places.reshape(-1)].astype(np.int32)
    return first[order], np.split(found, np.cumsum([len(table) for table in tables])[:-1])
