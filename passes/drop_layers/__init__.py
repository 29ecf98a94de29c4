"""drop-layers: leave out the blocks, or single attention and MLP branches, that a model misses least.

    %a = add(%x, attention(norm(%x)))         block 2 dropped: who read %b reads %x;
    %b = add(%a, mlp(norm(%a)))               its weights go, and in entries with caches its cache

`keep` is the share of blocks that stay; of branches, that of each kind that costs the same. `method` decides which:

- `search` (the default): evolution of whole states by the divergence of the model's predictions;
- `influence`: least 1 - cosine of what goes in and what comes out; `span`: the contiguous blocks of least angle;
- `gates`: one trained number for each layer, all at once, mended by a short search (`repair=no`: not); those of
  branches that stay are folded into their weights;
- `exhaustive`, `greedy`, `random`: what these are measured against.

Fires where blocks recur. Refused: a share that the model cannot give, blocks of which something inside is used
elsewhere. With `keep=1` the program is returned as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from laconic.ir.calibration import Calibration
from laconic.ir.depth import Depth
from laconic.ir.errors import UsageError
from laconic.ir.program import Program
from laconic.passes.base import Contract, Needs, Pass, Plan
from laconic.passes.drop_layers.absorb import output_rows
from laconic.passes.drop_layers.task import Choice, DropTask, Layer, blocks_of, branches_of, space_of
from laconic.passes.methods import load_method
from laconic.passes.options import check_least, check_share


@dataclass(frozen=True)
class DropLayers(Pass):
    """`unit`: whole blocks, or branches. `protect`: so many at either end of a run stay. `generations`: of the search,
    0 for k (n - k) / 1.5 where k of n go. `steps`: of training gates; `repair`: whether a short search mends what they
    choose. Raises ValueError for shares that are none, and
    UsageError for an unknown method."""

    keep: float = 0.75
    method: str = "search"
    unit: Literal["block", "branch"] = "block"
    protect: int = 0
    generations: int = 0
    steps: int = 200
    repair: bool = True

    name: ClassVar[str] = "drop-layers"
    summary: ClassVar[str] = "leave out the blocks or branches that are missed least"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[str] = "arXiv:2410.14649, arXiv:2403.03853, arXiv:2403.17887, FoldGPT 2024"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_least(0, protect=self.protect, generations=self.generations)
        check_least(1, steps=self.steps)
        load_method(self.name, self.method)

    @property
    def reads_values(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        if self.keep == 1:
            return Needs.NOTHING
        return Needs.GRADIENTS if self.method == "gates" else Needs.ACTIVATIONS

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        if self.keep == 1:
            return Plan(self.spec, reason="all layers are kept")
        depth = Depth(program)
        layers = blocks_of(depth) if self.unit == "block" else branches_of(depth)
        if not layers:
            raise UsageError("this model has no blocks that recur", why=_nearest(depth), hint="see `laconic audit`")
        space = space_of(depth, layers, self.keep, self.protect)
        if not space.classes:
            return Plan(self.spec, reason=f"{1 - self.keep:.0%} of {len(layers)} layers is less than half a layer")
        task = DropTask(program, depth, calibration, self.generations, tuple(layers), space, self.steps, self.repair)
        choice: Choice = load_method(self.name, self.method)(task)
        assert space.legal(choice.state)
        return Plan(self.spec, tuple(_actions(task, choice)))

    def rewrite(self, program: Program, plan: Plan) -> None:
        depth = Depth(program.clone())
        layers: dict[tuple[str, int, int], Any] = {(_BLOCK, b.run, b.number): b for b in depth.blocks}
        layers |= {(_BRANCH, unit.stream, unit.place): unit for unit in depth.units}
        chosen: dict[str, list[Any]] = {_BLOCK: [], _BRANCH: []}
        for action in plan.actions:
            if action["rule"] == _SCALE:
                _scale(program, action)
                continue
            found = layers.get((action["rule"], *action["place"]))
            if found is None:
                raise UsageError(f"there is no {action['layer']}", why="the plan was made for another program")
            chosen[action["rule"]].append(found)
        if chosen[_BLOCK]:
            depth.skip_blocks(chosen[_BLOCK], into=program)
        if chosen[_BRANCH]:
            depth.skip(chosen[_BRANCH], into=program)

    def said(self, plan: Plan) -> str:
        gone = [action["layer"] for action in plan.actions if action["rule"] != _SCALE]
        scaled = len(plan.actions) - len(gone)
        return f"{', '.join(gone)} dropped" + (f", {scaled} branches scaled" if scaled else "")


_BLOCK, _BRANCH, _SCALE = "drop block", "drop branch", "scale branch"


def _actions(task: DropTask, choice: Choice) -> list[dict[str, Any]]:
    found = []
    for k, layer in enumerate(task.layers):
        action: dict[str, Any] = {"layer": layer.name, "entry": "forward", "node": layer.out, "site": layer.site}
        if choice.scores:
            action["score"] = choice.scores[k]
        if choice.state[k]:
            found.append(action | _place(layer))
        elif (factor := choice.factors.get(k, 1.0)) != 1.0:
            rows = output_rows(task.depth, layer)
            if rows:
                found.append(action | {"rule": _SCALE, "rows": rows, "factor": factor})
    return found


def _place(layer: Layer) -> dict[str, Any]:
    if layer.block is not None:
        return {"rule": _BLOCK, "place": [layer.block.run, layer.block.number]}
    (unit,) = layer.units
    return {"rule": _BRANCH, "place": [unit.stream, unit.place]}


def _scale(program: Program, action: Mapping[str, Any]) -> None:
    for row in action["rows"]:
        weight = program.weights[row]
        scaled = (weight.value.detach().double() * action["factor"]).to(weight.value.dtype)
        program.weights[row] = replace(weight, value=scaled)


def _nearest(depth: Depth) -> str:
    misses = [miss for found in depth.structures.values() for miss in found.near_misses]
    return misses[0].reason if misses else ""
