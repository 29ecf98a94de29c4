"""Generation by compiled entries: a prompt's for any number of tokens, and one token's, each compiled once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from laconic.codegen.backend.options import Options
from laconic.codegen.backend.programs import CompiledEntry
from laconic.generate.decoding import ProgramDecoder
from laconic.ir.entries import alone
from laconic.ir.outline import inline, outline
from laconic.ir.program import Kind, Program


class CompiledDecoder(ProgramDecoder):
    """A Program's entries by Inductor's kernels; what cannot be compiled is computed in eager, and logged."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor] | None, options: Options) -> None:
        super().__init__(program, weights)
        flat = inline(program)
        self._own = {name: outline(alone(flat, name, [])) for name in self._entries}
        self.compiled = {name: CompiledEntry(own, "forward", options) for name, own in self._own.items()}

    def _outputs(self, name: str, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        own = self._own[name]
        sizes = {  # one size changes, the tokens of a prompt
            sympy.Symbol(key, positive=True, integer=True): int(inputs["cache_position"].shape[0])
            for key in own.symbols
        }
        function = self.compiled[name].function(sizes)
        if function is None:
            return super()._outputs(name, inputs)
        nodes = own.forward.placeholders()
        return function(
            *(inputs[n.meta["name"]] if n.meta["kind"] == Kind.INPUT else self._rows[n.meta["name"]] for n in nodes)
        )
