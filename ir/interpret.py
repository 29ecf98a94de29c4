"""An entry that calls functions with its values as they are computed, and may go on with others in their place.

Statistics look at values in this way, and training puts others in their place: the graph is copied once, with calls put
in; then each run costs what the entry costs. A value that nobody needs any more is freed as in the entry itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.program import Entry, Program
from laconic.ir.run import Executable, Outcome, declared_weights, outcome


@dataclass(frozen=True)
class Tap:
    """Call `see` with the values of `nodes` (by name) as soon as all are there.

    If `replaces`, those who read the first of the nodes, no other of which may stand behind it, are given what `see`
    returns: of the same type, or the run fails further down. The values must be left as they are. What replaces is
    given the other nodes as those who read them are; its own, and all that is merely seen, as it was computed.
    """

    nodes: tuple[str, ...]
    see: Callable[..., Any]
    replaces: bool = False


class Interpreter:
    """An entry with taps, to be run again and again. Without `results`, it computes no more than the taps need.

    Raises KeyError for the name of no node.
    """

    def __init__(self, program: Program, taps: Sequence[Tap], *, entry: str = "forward", results: bool = True) -> None:
        self.entry = _tapped(program.entries[entry], taps, results)
        self._executable = Executable(self.entry)
        self._weights = declared_weights(program)

    def __call__(self, inputs: list[torch.Tensor], *, gradients: bool = False) -> Outcome:
        """Run on flat inputs; `Outcome` is empty without `results`. With `gradients` autograd records what it can."""
        with torch.set_grad_enabled(gradients):
            return outcome(self.entry, self._executable(self._weights, inputs))


def _tapped(entry: Entry, taps: Sequence[Tap], results: bool) -> Entry:
    entry = entry.clone()
    graph = entry.graph
    order = {node.name: k for k, node in enumerate(graph.nodes)}
    nodes = {node.name: node for node in graph.nodes}
    inputs = list(entry.placeholders())
    calls: dict[fx.Node, Tap] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for k, tap in enumerate(taps):
        seen = tuple(nodes[name] for name in tap.nodes)
        last = max(seen, key=lambda node: order[node.name])
        # Those put in behind one node later stand before those put in earlier: nobody can tell.
        with graph.inserting_after(inputs[-1] if last.op == "placeholder" else last):
            call = graph.call_function(_named(tap.see, k), seen)
        calls[call] = tap
        if tap.replaces:
            replaced[seen[0]] = call
    for value, call in replaced.items():
        value.replace_all_uses_with(call, delete_user_cb=lambda user: user not in calls)
    for call, tap in calls.items():
        if tap.replaces:
            first, *others = (nodes[name] for name in tap.nodes)
            call.args = (first, *(replaced.get(other, other) for other in others))
    if not results:
        entry.output_node.args = ((),)
        entry.outputs = []
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and not node.users and node not in calls:
                graph.erase_node(node)
    return entry


def _named(see: Callable[..., Any], k: int) -> Callable[..., Any]:
    """A function under a name that can stand in generated code."""

    def tap(*values: Any) -> Any:
        return see(*values)

    tap.__name__ = tap.__qualname__ = f"tap_{k}"
    return tap
