"""The driver: straight-line Python that calls the pieces of a cut one behind the other.

    def drive(args):                        takes a list, and empties it
        (v0, v1, v2,) = args; args.clear()
        a = [v0, v1]; del v0, v1            a piece gets a list, and empties it: nothing here keeps an activation alive
        (v3,) = f0(a)
        a = [v3, v2]; del v3, v2
        (v4,) = f0(a)
        return (v4,)

It holds no state and no weight: what it is called with is all that it computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from laconic.codegen.backend.cut import Cut
from laconic.ir.torch_traits import held

#: A callable that takes its operands as a list and may empty it.
Boxed = Callable[[list[Any]], Sequence[Any]]


def drive(cut: Cut, functions: Sequence[Boxed]) -> Callable[..., Any]:
    """A function of the graph's inputs, in order, given a callable for each piece."""
    source, constants = write_driver(cut)
    scope: dict[str, Any] = {f"f{number}": function for number, function in enumerate(functions)}
    scope.update(constants, set_grad_enabled=torch._C._set_grad_enabled)
    exec(compile(source, "<laconic driver>", "exec"), scope)
    run = scope["drive"]

    def call(*args: Any) -> Any:
        return run(list(args))

    return call


def write_driver(cut: Cut) -> tuple[str, dict[str, Any]]:
    """The driver's source, and the constant tensors that it names."""
    names: dict[fx.Node, str] = {}
    constants: dict[str, Any] = {}
    last = _last_uses(cut)

    def name(node: fx.Node) -> str:
        if node not in names:
            if node.op == "get_attr":
                names[node] = f"c{len(constants)}"
                constants[names[node]] = held(node)
            else:
                names[node] = f"v{len(names)}"
        return names[node]

    def said(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            constants[f"c{len(constants)}"] = leaf
        return _Named(name(leaf) if isinstance(leaf, fx.Node) else f"c{len(constants) - 1}")

    def forget(nodes: Sequence[fx.Node | None], step: int) -> str:
        gone = dict.fromkeys(
            names[n] for n in nodes if n is not None and n.op != "get_attr" and last.get(n, -1) <= step
        )
        return f"del {', '.join(gone)}" if gone else ""

    inputs = [node for node in cut.graph.nodes if node.op == "placeholder"]
    lines = [f"    ({''.join(name(node) + ', ' for node in inputs)}) = args", "    args.clear()", forget(inputs, -1)]
    for number, step in enumerate(cut.steps):
        lines.append(f"    a = [{', '.join(name(node) for node in step.operands)}]")
        lines.append(forget(step.operands, number))
        results = "".join("_, " if node is None else name(node) + ", " for node in step.results)
        lines.append(f"    ({results}) = f{step.piece}(a)" if results else f"    f{step.piece}(a)")
        if None in step.results:
            lines.append("del _")
    if cut.final_grad is not None:
        lines.append(f"    set_grad_enabled({cut.final_grad})")
    returned = fx.node.map_aggregate(next(iter(reversed(cut.graph.nodes))).args[0], said)
    lines.append(f"    return {returned!r}")
    body = "\n".join("    " + line.strip() for line in lines if line)
    return f"def drive(args):\n{body}\n", constants


class _Named:
    """A name in source text."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _last_uses(cut: Cut) -> dict[fx.Node, int]:
    """The last step that reads each node; one behind the last for what the graph returns."""
    last: dict[fx.Node, int] = {}
    for number, step in enumerate(cut.steps):
        last.update(dict.fromkeys(step.operands, number))
    returned: list[fx.Node] = []
    fx.node.map_arg(next(iter(reversed(cut.graph.nodes))).args, returned.append)
    return last | dict.fromkeys(returned, len(cut.steps))
