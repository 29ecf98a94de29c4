"""Programs of equal blocks, as text, and what their entry is called with."""

from __future__ import annotations

from typing import Any

from laconic.ir.program import Kind, Program


def operands(program: Program, inputs: dict[str, Any]) -> list[Any]:
    nodes = program.forward.placeholders()
    return [
        inputs[n.meta["name"]] if n.meta["kind"] == Kind.INPUT else program.weights[n.meta["name"]].value for n in nodes
    ]


BLOCKS = """
    size n in [1, inf] like 4
    parameter @w0: f32[8, 8]
    parameter @w1: f32[8, 8]
    parameter @w2: f32[8, 8]
    {body}
"""
FLAT = BLOCKS.format(
    body="""
    entry forward {
      input %x: f32[n, 8] in [-2.0, 2.0]
      argument x = %x
      %c: f32[2*n, 8] = aten.cat([%x, %x])
      %l0: f32[2*n, 8] = aten.linear(%c, @w0)
      %r0: f32[2*n, 8] = aten.relu(%l0)
      %s0: f32[2*n, 8] = aten.sin(%r0)
      %t0: f32[2*n, 8] = aten.tanh(%s0)
      %l1: f32[2*n, 8] = aten.linear(%t0, @w1)
      %r1: f32[2*n, 8] = aten.relu(%l1)
      %s1: f32[2*n, 8] = aten.sin(%r1)
      %t1: f32[2*n, 8] = aten.tanh(%s1)
      %l2: f32[2*n, 8] = aten.linear(%t1, @w2)
      %r2: f32[2*n, 8] = aten.relu(%l2)
      %s2: f32[2*n, 8] = aten.sin(%r2)
      %t2: f32[2*n, 8] = aten.tanh(%s2)
      return (%t2, %x, 3, [%l0])
    }
    """
)
