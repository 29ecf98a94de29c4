"""Audit: what a model is made of, what it says twice, and what could be saved. Nothing is changed.

What passes would do is asked of the passes themselves. Savings of the exact preset are those of running it without its
checks; `optimize` checks them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import sympy
from torch import fx, nn

from laconic.axes_report import AxesAudit, audit_axes
from laconic.cache import cache_folder
from laconic.data.load import load_data
from laconic.ir.capture import capture_module
from laconic.ir.cost import cost_at, measure_at, symbolic_cost
from laconic.ir.data import Data
from laconic.ir.errors import UsageError
from laconic.ir.listing import SlotKind
from laconic.ir.liveness import Peak, peak_activation
from laconic.ir.outline import inline, outline, reads_call
from laconic.ir.program import Entry, Program
from laconic.ir.structure import BlockRun, EntryStructure, NearMiss, entry_structure
from laconic.ir.structure.likeness import Likeness, equal_blocks, likeness
from laconic.ir.structure.records import Attention, Branch, Mlp, Moe, Norm, Projection
from laconic.ir.traits import op_name
from laconic.ir.types import nbytes, size_text, type_text
from laconic.ir.types import type_of as kind_of
from laconic.passes.base import Pass
from laconic.passes.cse import Cse
from laconic.passes.dce import Dce
from laconic.passes.dead_units import DeadUnits
from laconic.passes.dedup import Dedup
from laconic.passes.manager import PassManager
from laconic.passes.pipeline import parse_pipeline
from laconic.passes.simplify import Simplify
from laconic.redundancy import Table, find_redundancy
from laconic.sources import opened

_TOP = 10


@dataclass(frozen=True)
class Saving:
    """What one pass would do on its own: actions by rule, and what goes."""

    spec: str
    actions: Mapping[str, int]
    nodes: int
    weight_bytes: int


@dataclass(frozen=True)
class RunAudit:
    """A run of blocks: groups of blocks with equal weights, and how alike the blocks are."""

    run: BlockRun
    equal: tuple[tuple[int, ...], ...]
    likeness: tuple[Likeness, ...]


@dataclass(frozen=True)
class EntryAudit:
    """One entry: its structure and its costs at the audit's sizes. `flops_text` is an expression of the sizes."""

    structure: EntryStructure
    nodes: int
    flops: int
    flops_text: str
    pointwise: int
    uncounted: tuple[str, ...]
    peak: Peak
    top_flops: tuple[tuple[fx.Node, int], ...]
    runs: tuple[RunAudit, ...]


@dataclass(frozen=True)
class Audit:
    """What `audit` returns. Nodes in it are those of `program`, which is the audited model.

    `outlined` are the nodes left to say if repeated blocks were said once; `exact` are the sizes that the exact preset
    leaves, `exact_outlined` both together. `top_weights` are names and bytes. `redundancy`, None without calibration,
    are the tables of what a run on data found, the most redundant first. `axes` is None unless asked for.
    """

    program: Program
    sizes: Mapping[str, int]
    nodes: int
    weight_bytes: int
    flops: int
    outlined: int
    exact: Mapping[str, int]
    exact_outlined: int
    savings: tuple[Saving, ...]
    entries: tuple[EntryAudit, ...]
    top_weights: tuple[tuple[str, int], ...]
    redundancy: tuple[Table, ...] | None = None
    axes: AxesAudit | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data: the document of `laconic audit --json`, but for the model's name."""
        found: dict[str, Any] = {} if self.axes is None else {"axes": self.axes.to_json()}
        if self.redundancy is not None:
            found["redundancy"] = [table.to_json() for table in self.redundancy]
        return found | {
            "sizes": dict(self.sizes),
            "nodes": self.nodes,
            "weight_bytes": self.weight_bytes,
            "flops": self.flops,
            "outlined_nodes": self.outlined,
            "exact": {**self.exact, "outlined_nodes": self.exact_outlined},
            "savings": [asdict(saving) for saving in self.savings],
            "entries": [_entry_json(self.program, entry) for entry in self.entries],
            "top_weights": [{"name": name, "bytes": size} for name, size in self.top_weights],
        }


def audit(
    model: nn.Module | Program | str | Path,
    *,
    inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    sizes: Mapping[str, int] | None = None,
    calibration: Data | str | Path | None = None,
    axes: bool = False,
) -> Audit:
    """What a model is made of and what it says twice. Never changes `model`.

    `inputs` (a tuple of positional or a dict of keyword arguments) and `dynamic_shapes` are those of `optimize`, for a
    module. `sizes` are those at which costs are counted, by the axes' names; the example's where not given. With
    `calibration` (`laconic.ir.data.Data`, or what the command line calls DATA) the model is run to find redundancy.
    With `axes` it says which axes of weights are one, and what may be done to them.

    Raises UsageError for the name of no dynamic size, a size out of its range or data that does not fit, and what
    capture raises.
    """
    folder = None
    if isinstance(model, nn.Module):
        if inputs is None:
            raise UsageError("a module needs example inputs", hint="audit(model, inputs=(x,)) or inputs={'name': x}")
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        program = capture_module(model, args, kwargs, dynamic_shapes)
    else:
        program, folder = (model, None) if isinstance(model, Program) else opened(str(model))
    data = calibration
    if isinstance(data, (str, Path)):
        data = load_data(data, program, folder=folder, split="calibration")
    return audit_program(program, sizes=sizes, calibration=data, axes=axes)


def audit_program(
    program: Program,
    *,
    sizes: Mapping[str, int] | None = None,
    calibration: Data | None = None,
    axes: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
    calibrating: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Audit a Program at these sizes (by display name; the example's where not given), and on this data.

    Raises UsageError for the name of no dynamic size or a size out of its range, and what calibration raises.
    """
    program = inline(program)
    measure_at(program, sizes)
    entries = []
    for entry in program.entries.values():
        progress(f"reading the structure of {entry.name}")
        entries.append(_entry_audit(program, entry, sizes))
    progress("asking the passes")
    asked = (Simplify(), Dedup(), Dedup(transposed=True), Cse(), Dce(), DeadUnits())
    savings = tuple(_saving(program, item) for item in asked)
    run = PassManager(parse_pipeline("exact"), verify_each=False, check_contracts=False).run(program)
    after, small = run.ledger.after, run.program
    exact = {
        "nodes": after.nodes,
        "weight_bytes": after.weight_bytes,
        "flops": sum(int(cost_at(small, entry, sizes).flops) for entry in small.entries.values()),
        "peak_bytes": max(peak_activation(small, entry, sizes).bytes for entry in small.entries.values()),
    }
    labelled = None
    if axes:
        progress("labelling axes")
        labelled = audit_axes(program)
    tables = None
    if calibration is not None:
        kept = cache_folder() / "calibration"
        tables = tuple(find_redundancy(program, calibration, sizes=sizes, folder=kept, progress=calibrating))
    weights = sorted(((w.name, nbytes(w.value)) for w in program.weights.values()), key=lambda pair: -pair[1])
    return Audit(
        program=program,
        sizes={s.name: (sizes or {}).get(s.name, s.hint) for s in program.symbols.values()},
        nodes=program.node_count(),
        weight_bytes=program.weight_bytes(),
        flops=sum(entry.flops for entry in entries),
        outlined=_said(outline(program)),
        exact=exact,
        exact_outlined=_said(outline(small)),
        savings=savings,
        entries=tuple(entries),
        top_weights=tuple(weights[:_TOP]),
        redundancy=tables,
        axes=labelled,
    )


def _said(program: Program) -> int:
    """The calls that a program writes down: those of its functions once, and the calls of the functions."""
    inside = sum(len(function.calls()) for function in program.functions.values())
    nodes = [n for entry in program.entries.values() for n in entry.graph.nodes]
    return inside + sum(1 for n in nodes if n.op == "call_module" or (n.op == "call_function" and not reads_call(n)))


def _saving(program: Program, item: Pass) -> Saving:
    plan = item.plan(program)
    after = item.apply(program, plan).program
    return Saving(
        spec=item.spec,
        actions=dict(Counter(action["rule"] for action in plan.actions)),
        nodes=program.node_count() - after.node_count(),
        weight_bytes=program.weight_bytes() - after.weight_bytes(),
    )


def _entry_audit(program: Program, entry: Entry, sizes: Mapping[str, int] | None) -> EntryAudit:
    structure, cost = entry_structure(program, entry), cost_at(program, entry, sizes)
    dearest = sorted(cost.nodes, key=lambda n: -n.flops)[:_TOP]
    return EntryAudit(
        structure=structure,
        nodes=sum(1 for _ in entry.calls()),
        flops=int(cost.flops),
        flops_text=size_text(sympy.sympify(symbolic_cost(entry).flops), program.names),
        pointwise=int(cost.pointwise),
        uncounted=cost.uncounted,
        peak=peak_activation(program, entry, sizes),
        top_flops=tuple((n.node, int(n.flops)) for n in dearest if n.flops),
        runs=tuple(
            RunAudit(run, tuple(equal_blocks(program, run)), tuple(likeness(program, run))) for run in structure.runs
        ),
    )


# As plain data


def _entry_json(program: Program, entry: EntryAudit) -> dict[str, Any]:
    found = entry.structure
    sites: list[Attention | Mlp | Moe | Norm] = [*found.attentions, *found.mlps, *found.moes, *found.norms]
    return {
        "name": found.entry,
        "nodes": entry.nodes,
        "flops": entry.flops,
        "flops_text": entry.flops_text,
        "pointwise": entry.pointwise,
        "uncounted": list(entry.uncounted),
        "peak_bytes": entry.peak.bytes,
        "peak_node": entry.peak.node.name if entry.peak.node is not None else None,
        "live_at_peak": [{**_place(program, node), "bytes": size} for node, size in entry.peak.live[:_TOP]],
        "top_flops": [{**_place(program, node), "flops": flops} for node, flops in entry.top_flops],
        "streams": [
            {"start": stream.start.name, "branches": [_branch_json(program, b) for b in stream.branches]}
            for stream in found.streams
        ],
        "runs": [_run_json(run) for run in entry.runs],
        "sites": [_site_json(program, site) for site in sites],
        "near_misses": [_miss_json(program, miss) for miss in found.near_misses],
    }


def _place(program: Program, node: fx.Node) -> dict[str, Any]:
    """A node in words: its name, op, type, and where in the user's model it is."""
    return {
        "node": node.name,
        "op": op_name(node.target) if node.op == "call_function" else node.op,
        "type": type_text(kind_of(node.meta["val"]), program.names),
        "site": node.meta.get("site"),
        "where": str(program.site(node) or ""),
    }


def _branch_json(program: Program, branch: Branch) -> dict[str, Any]:
    return {
        "kind": str(branch.kind),
        "reason": branch.reason,
        "nodes": len(branch.nodes),
        "exits": [node.name for node in branch.exits],
        **_place(program, branch.add),
    }


def _run_json(audit: RunAudit) -> dict[str, Any]:
    run = audit.run
    return {
        "stream": run.stream,
        "first": run.first,
        "period": run.period,
        "count": run.count,
        "turns": run.turns,
        "nodes": run.repeat.period,
        "slots": {str(kind): len(run.slots(kind)) for kind in SlotKind},
        "outputs": len(run.repeat.outputs),
        "said_again": run.repeat.saved,
        "equal_weights": [list(group) for group in audit.equal],
        "likeness": [asdict(pair) for pair in audit.likeness],
    }


def _miss_json(program: Program, miss: NearMiss) -> dict[str, Any]:
    return {"wanted": miss.wanted, "node": miss.node.name, "reason": miss.reason, "where": miss.where}


def _site_json(program: Program, site: Attention | Mlp | Moe | Norm) -> dict[str, Any]:
    """A site's fields: nodes and weights by name. A norm's kind is `norm`, its own the field `norm`."""
    kind = type(site).__name__.lower()
    anchor = site.out if isinstance(site, Norm) else site.node
    found: dict[str, Any] = {"site": site.site, "kind": kind, "where": str(program.site(anchor) or "")}
    for part in fields(site):
        if part.name in ("site", "nodes"):
            continue
        found["norm" if part.name == "kind" else part.name] = _plain(getattr(site, part.name))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _name(value)
    if isinstance(value, Projection):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _name(node: fx.Node) -> str:
    """A weight's name, or a node's."""
    return str(node.meta["name"]) if node.op == "placeholder" else node.name
