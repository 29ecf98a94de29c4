"""The exact preset on a graph of ten thousand nodes, each pass verified, no numeric checks: static and dynamic sizes.

    python benchmarks/graph_10k.py benchmarks/results/graph_10k.json [layers]

The graph is a deep decoder written as people write them: each layer makes its own mask and rotary tables, casts to the
dtype that a value has, copies what is contiguous, multiplies by one, and forgets what it computed. One layer is
captured and said again with weights of its own, which makes the same graph as capturing all of them and takes less
long; neither is counted.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from laconic.ir.capture import capture_module
from laconic.ir.program import Kind, Program
from laconic.ir.propagate import recompute
from laconic.ir.rewrite import by_name, weight_node
from laconic.machine import machine
from laconic.passes.manager import Instrument, PassManager
from laconic.passes.pipeline import parse_pipeline

WIDTH, HEADS, LAYERS, REPEATS = 16, 2, 156, 3


class Layer(nn.Module):
    """About 64 captured nodes, a third of them redundant."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("frequency", 1.0 / 10000 ** (torch.arange(0, 4) / 4.0))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return self.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[0], x.shape[1]
        positions = torch.arange(length, device=x.device)
        mask = positions[:, None] >= positions[None, :]
        angles = positions.float()[:, None] * self.frequency[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * 1.0, angles.sin() * 1.0
        parts = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        scores = (q @ k.transpose(-2, -1)) / 8**0.5
        scores.sum().add(1)  # forgotten
        weights = scores.masked_fill(~mask[None, None], float("-inf")).softmax(-1).to(v.dtype)
        mixed = (weights @ v).transpose(1, 2).contiguous().view(batch, length, WIDTH).contiguous()
        x = x + nn.functional.dropout(self.out(mixed), 0.1, self.training)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x.clone()))))


def graph(layers: int, dynamic: bool) -> Program:
    """A decoder of so many layers: the nodes of one, again and again, each time with weights and sites of their own."""
    torch.manual_seed(0)
    axes = {"x": {0: Dim("batch", max=64), 1: Dim("length", max=128)}} if dynamic else None
    one = capture_module(Layer().eval(), (torch.randn(2, 8, WIDTH),), {}, axes, check=False)
    deep = one.clone()
    graph, first, calls = deep.forward.graph, by_name(deep.forward), list(one.forward.calls())
    (start,), (end,) = one.forward.input_nodes(), one.forward.output_values
    sizes = {node: first[node.name] for node in calls if node.target is torch.ops.aten.sym_size.int}
    value = first[end.name]
    graph.inserting_before(deep.forward.output_node)
    for number in range(1, layers):
        stands_for = {start: value, **sizes}
        for name, node in one.forward.weight_nodes().items():
            row = one.weights[name]
            initial = row.kind is Kind.BUFFER or name == "gain"
            own = row.value.clone() if initial else torch.randn_like(row.value) / WIDTH**0.5
            deep.weights[f"{number}.{name}"] = replace(row, name=f"{number}.{name}", value=own)
            stands_for[node] = weight_node(deep, deep.forward, f"{number}.{name}")
        for node in (call for call in calls if call not in sizes):
            new = graph.node_copy(node, stands_for.__getitem__)
            new.meta["site"] = number * len(calls) + node.meta["site"]
            deep.sites[new.meta["site"]] = deep.sites[node.meta["site"]]
            new.meta["val"] = recompute(deep, new)
            stands_for[node] = new
        value = stands_for[end]
    deep.forward.output_node.args = ((value,),)
    return deep


class Phases(Instrument):
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def spent(self, phase: Any, seconds: float) -> None:
        self.seconds[str(phase)] = self.seconds.get(str(phase), 0.0) + seconds


def measure(program: Program) -> dict[str, Any]:
    """One run of the preset: seconds in all and by phase, nodes before and after."""
    phases = Phases()
    start, busy = time.perf_counter(), time.process_time()
    run = PassManager(parse_pipeline("exact"), True, False, (phases,)).run(program)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(busy, 2),
        "phases": {name: round(value, 2) for name, value in phases.seconds.items()},
        "nodes": [run.ledger.before.nodes, run.ledger.after.nodes],
        "weights": [len(program.weights), len(run.program.weights)],
        "passes": {row.name: [round(row.seconds, 2), row.reason] for row in run.ledger.rows},
    }


def main(out: Path, layers: int) -> None:
    rows: dict[str, Any] = {}
    for kind, dynamic in (("static", False), ("dynamic", True)):
        print(f"making the {kind} graph", file=sys.stderr)
        program = graph(layers, dynamic)
        runs = sorted((measure(program) for _ in range(REPEATS)), key=lambda run: run["seconds"])
        spread = [runs[0]["seconds"], runs[-1]["seconds"]]
        rows[kind] = {**runs[len(runs) // 2], "spread": spread}
        print(rows[kind], file=sys.stderr)
    data = {"schema": 1, "machine": machine(), "layers": layers, "runs": REPEATS, "graphs": rows}
    out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else LAYERS)
