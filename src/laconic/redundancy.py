"""The redundancy that calibration shows: what each part of a model contributes, ranked by how little.

Each table is sorted so that what is most redundant comes first, by `score`. `weight_bytes` and `flops` would go with
it; `risk` is what there is to lose, as a share: 0 is nothing, 1 all or more. Nothing is promised: a share of what
passes through a block is not a share of what the model is worth, which `optimize` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from laconic.ir.calibrate import calibrate
from laconic.ir.cost import flops_of, measure_at
from laconic.ir.data import Data
from laconic.ir.evidence import Evidence, evidence_of, expert_matrices
from laconic.ir.program import Kind, Program
from laconic.ir.statistics.base import Statistics
from laconic.ir.statistics.likeness import CLOSE
from laconic.ir.structure import entry_structure
from laconic.ir.structure.likeness import Likeness, alike, likeness
from laconic.ir.structure.records import Moe
from laconic.ir.types import nbytes

#: So many channels are named; the rest is counted.
_NAMED = 8


@dataclass(frozen=True)
class Finding:
    """One part of a model (`what`, of `where`): its score, what it would save and what it risks."""

    what: str
    where: str
    score: float
    weight_bytes: int
    flops: int
    risk: float


@dataclass(frozen=True)
class Table:
    """Findings of one kind, the most redundant first; `meaning` says what the score is. `matrix`, for a heat map, has
    the scores of all pairs."""

    name: str
    meaning: str
    findings: tuple[Finding, ...]
    matrix: tuple[tuple[float, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "meaning": self.meaning,
            "findings": [asdict(finding) for finding in self.findings],
            "matrix": [list(row) for row in self.matrix],
        }


def redundancy(
    program: Program, evidence: Evidence, statistics: Statistics, sizes: Mapping[str, int] | None = None
) -> list[Table]:
    """All tables that this program has something for. `sizes` are those at which FLOPs are counted."""
    reader = _Reader(program, statistics, sizes)
    found = [
        *reader.blocks(evidence),
        *reader.twins(evidence),
        reader.branches(evidence),
        reader.matrices(),
        reader.tokens(evidence),
        *reader.expert_use(evidence),
        reader.expert_twins(evidence),
        reader.heads(evidence),
        reader.channels(evidence),
        reader.outliers(evidence),
        reader.unseen(evidence),
    ]
    return [table for table in found if table.findings]


def find_redundancy(
    program: Program,
    data: Data,
    *,
    sizes: Mapping[str, int] | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Table]:
    """Calibrate a program on data, and say what is redundant in its entry `forward`. `folder` keeps calibration runs.

    Raises what `laconic.ir.calibrate.calibrate` raises.
    """
    evidence = evidence_of(program, entry_structure(program, program.forward))
    statistics = calibrate(program, data, list(evidence.statistics()), folder=folder, progress=progress)
    return redundancy(program, evidence, statistics, sizes)


class _Reader:
    def __init__(self, program: Program, statistics: Statistics, sizes: Mapping[str, int] | None) -> None:
        self._program, self._statistics = program, statistics
        self._measure = measure_at(program, sizes)

    def _place(self, node: fx.Node) -> str:
        return str(self._program.site(node) or f"%{node.name}")

    def _module(self, node: fx.Node) -> str:
        """The user's module that a node belongs to."""
        site = self._program.site(node)
        return site.module if site is not None and site.module else f"%{node.name}"

    def _cost(self, nodes: Iterable[fx.Node]) -> tuple[int, int]:
        """Bytes of the weights that nobody but these nodes reads, and the nodes' FLOPs."""
        inside = set(nodes)
        weights = {n for node in inside for n in node.all_input_nodes if n.op == "placeholder"}
        own = [w for w in weights if w.meta["kind"] != Kind.INPUT and all(user in inside for user in w.users)]
        size = sum(nbytes(self._program.weights[w.meta["name"]].value) for w in own)
        return size, sum(int(flops_of(node, self._measure)) for node in inside if node.op == "call_function")

    def blocks(self, evidence: Evidence) -> Iterable[Table]:
        """Blocks by influence: how far what comes out is from what went in."""
        for run, statistic in evidence.runs:
            cosine = self._statistics.mean(statistic, "cosine")
            angle = self._statistics.mean(statistic, "angle")
            rows = []
            for k in range(run.count):
                influence = 1.0 - float(cosine[k, k + 1])
                where = self._place(run.block(k)[0])
                rows.append(Finding(f"block {k}", where, influence, *self._cost(run.block(k)), min(1.0, influence)))
            yield Table(
                f"blocks of stream {run.stream}",
                "influence: 1 - cosine of what goes in and what comes out; the matrix has the angles (over pi) between "
                "what goes into each block, last what comes out",
                _sorted(rows),
                tuple(tuple(row) for row in angle.tolist()),
            )

    def twins(self, evidence: Evidence) -> Iterable[Table]:
        """Pairs of blocks by the distance of their weights."""
        for run, _ in evidence.runs:
            rows = []
            for pair in likeness(self._program, run):
                size, _ = self._cost(run.block(pair.b))
                where = f"{self._place(run.block(pair.a)[0])} and {self._place(run.block(pair.b)[0])}"
                rows.append(
                    Finding(f"blocks {pair.a} and {pair.b}", where, pair.distance, size, 0, min(1.0, pair.distance))
                )
            yield Table(
                f"alike blocks of stream {run.stream}",
                "distance of their weights, relative to their size",
                _sorted(rows),
            )

    def branches(self, evidence: Evidence) -> Table:
        """Residual branches by how little they change the stream."""
        rows = []
        for branch, statistic in evidence.branches:
            sums = self._statistics[statistic]
            before = float(sums["products"][0, 0])
            share = float(sums["apart"][0, 1] / before) ** 0.5 if before else 0.0
            rows.append(
                Finding(branch.kind, self._place(branch.add), share, *self._cost(branch.nodes), min(1.0, share))
            )
        return Table("branches", "size of what a branch adds, relative to the stream", _sorted(rows))

    def matrices(self) -> Table:
        """Pairs of weight matrices of one shape by distance."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, weight in self._program.weights.items():
            value = weight.value
            if value.ndim == 2 and value.is_floating_point() and value.device.type != "meta" and min(value.shape) > 1:
                groups.setdefault((value.dtype, tuple(value.shape)), []).append(name)
        rows = []
        for names in groups.values():
            values = [self._program.weights[name].value for name in names]
            for pair in _near(alike([[value] for value in values])):
                named = f"{names[pair.a]} and {names[pair.b]}"
                rows.append(Finding("matrices", named, pair.distance, nbytes(values[0]), 0, min(1.0, pair.distance)))
        return Table("alike matrices", "distance of two matrices, relative to their size", _sorted(rows)[:50])

    def tokens(self, evidence: Evidence) -> Table:
        """Places by how alike the tokens of a sample are."""
        behind: dict[str, int] = {}
        for run, similarity in evidence.runs:
            flops = [self._cost(run.block(k))[1] for k in range(run.count)]
            behind |= {name: sum(flops[k:]) for k, name in enumerate(similarity.places)}
        rows = []
        for node, statistic in evidence.tokens:
            if not float(self._statistics[statistic]["rows"]):
                continue
            nearest = float(self._statistics.mean(statistic, "nearest"))
            close = float(self._statistics.mean(statistic, "close")[CLOSE.index(0.95)])
            saved = int(behind.get(node.name, 0) * close / 2)  # of two alike one is left
            rows.append(Finding(f"{close:.0%} of tokens", self._place(node), 1.0 - nearest, 0, saved, 1.0 - close))
        return Table(
            "alike tokens",
            "1 - cosine of a token and the nearest other of its sample; how many have one above 0.95",
            _sorted(rows),
        )

    def expert_use(self, evidence: Evidence) -> Iterable[Table]:
        """Experts by how often they are chosen, and which are chosen together."""
        for moe, statistic in evidence.experts:
            share = self._statistics.mean(statistic, "counts") / moe.top_k
            size = self._expert_bytes(moe)
            rows = [
                Finding(f"expert {k}", self._place(moe.node), float(used) * moe.experts, size, 0, float(used))
                for k, used in enumerate(share)
            ]
            pairs = self._statistics[statistic]["pairs"]
            together = pairs / pairs.diagonal()[:, None].clamp(min=1)
            yield Table(
                f"experts of {self._module(moe.node)}",
                "load: 1 if all were used alike; the matrix has the share of one's tokens that go to another one too",
                _sorted(rows),
                tuple(tuple(row) for row in together.tolist()),
            )

    def expert_twins(self, evidence: Evidence) -> Table:
        """Pairs of experts of one site by the distance of their weights; the risk is that times the share of tokens
        that the less used of the two gets."""
        rows = []
        for moe, statistic in evidence.experts:
            counts = self._statistics.mean(statistic, "counts")
            matrices, size = expert_matrices(self._program, moe), self._expert_bytes(moe)
            for pair in _near(alike(matrices)) if matrices else ():
                used = float(torch.minimum(counts[pair.a], counts[pair.b]))
                what = f"experts {pair.a} and {pair.b}"
                risk = min(1.0, pair.distance * used)
                rows.append(Finding(what, self._place(moe.node), pair.distance, size, 0, risk))
        return Table("alike experts", "distance of their weights, relative to their size", _sorted(rows)[:50])

    def _expert_bytes(self, moe: Moe) -> int:
        matrices = expert_matrices(self._program, moe)
        return sum(nbytes(value) for value in matrices[0]) if matrices else 0

    def channels(self, evidence: Evidence) -> Table:
        """Hidden channels of MLPs by how much they say."""
        rows = []
        for mlp, statistic in evidence.hidden:
            sums = self._statistics[statistic]
            size = (self._statistics.mean(statistic, "squares")).sqrt()
            whole = float(size.square().mean().sqrt())
            cost = self._cost([n for n in mlp.nodes if n.op == "call_function"])
            each = (cost[0] // len(size), cost[1] // len(size))
            silent = torch.nonzero(sums["greatest"] == 0).flatten().tolist()
            if silent:
                saved = (each[0] * len(silent), each[1] * len(silent))
                what = f"{_numbered('channel', silent)}, always zero"
                rows.append(Finding(what, self._place(mlp.node), 0.0, *saved, 0.0))
            for k in [k for k in torch.argsort(size).tolist() if k not in set(silent)][:8]:
                share = float(size[k]) / whole if whole else 0.0
                rows.append(Finding(f"channel {k}", self._place(mlp.node), share, *each, min(1.0, share)))
        return Table(
            "hidden channels", "root mean square, relative to that of all channels of the MLP", _sorted(rows)[:50]
        )

    def heads(self, evidence: Evidence) -> Table:
        """Heads by how much of their attention goes elsewhere than to the first token, where unused heads look."""
        rows = []
        for attention, statistic in evidence.attended:
            first = self._statistics.mean(statistic, "first")
            weights, flops = self._cost(n for n in attention.nodes if n.op == "call_function")
            for head, share in enumerate(first.tolist()):
                parts = (weights // len(first), flops // len(first))
                rows.append(Finding(f"head {head}", self._place(attention.node), 1.0 - share, *parts, 1.0 - share))
        return Table("heads", "share of attention that does not go to the first token", _sorted(rows)[:50])

    def outliers(self, evidence: Evidence) -> Table:
        """Keys and values by how far their greatest channel stands out: what a quantised cache must spend bits on."""
        rows = []
        for name, part in (("keys", evidence.keys), ("values", evidence.values)):
            for attention, statistic in part:
                sums = self._statistics[statistic]
                whole = float((sums["squares"].sum() / sums["rows"] / len(sums["squares"])).sqrt())
                ratio = float(sums["greatest"].max()) / whole if whole else 0.0
                rows.append(Finding(name, self._place(attention.node), ratio, 0, 0, 1.0 - 1.0 / max(1.0, ratio)))
        return Table("cache outliers", "greatest |x| of a channel over the root mean square of all", _sorted(rows))

    def unseen(self, evidence: Evidence) -> Table:
        """What nothing is said of."""
        rows = [Finding(reason, self._place(node), 0.0, 0, 0, 0.0) for node, reason in evidence.unseen]
        return Table("not looked at", "sites of which something is not asked, and why", tuple(rows))


def _numbered(what: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _near(pairs: Iterable[Likeness]) -> list[Likeness]:
    """Those that have something in common: two of equal size that have nothing are 1.41 apart."""
    return [pair for pair in pairs if pair.distance < 1.0]


def _sorted(rows: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(rows, key=lambda finding: finding.score))
