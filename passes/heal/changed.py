"""Which rows healing trains: what differs from the original, and what stands next to what is gone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from laconic.ir.depth import Depth, Unit
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.program import Kind, Program
from laconic.ir.rewrite import used_rows


@dataclass(frozen=True)
class Change:
    """A program and the one that it was made of."""

    original: Program
    program: Program

    @cached_property
    def trainable(self) -> list[str]:
        """The rows that could be trained: parameters, and what they became."""
        weights, before = self.program.weights, self.original.weights
        return [
            row
            for row in sorted(used_rows(self.program))
            if weights[row].value.is_floating_point()
            and (weights[row].kind is Kind.PARAMETER or (weights[row].trainable and row not in before))
        ]

    @cached_property
    def blocks(self) -> set[str]:
        """Those that blocks read."""
        depth = Depth(self.program)
        read = {row for block in depth.blocks for unit in block.units for row in depth.reads(unit)}
        return read.intersection(self.trainable)

    @cached_property
    def differing(self) -> set[str]:
        """Those that are new, hold other values, or stand for more of the original's rows than themselves."""
        known = self.original.weights
        stands = {alias.target for name, alias in self.program.aliases.items() if name in known}
        return {row for row in self.trainable if row in stands or row not in known or not self._held(row)}

    def _held(self, row: str) -> bool:
        before, now = self.original.weights[row].value, self.program.weights[row].value
        return now is before or bit_equal(before, now)

    @cached_property
    def beside(self) -> set[str]:
        """Those beside what is gone: of the nearest branches before and behind it, and of the rest of its block."""
        whole = Depth(self.original)
        units = [(unit, block) for block in whole.blocks for unit in block.units]
        gone = [self._gone(unit) for unit, _ in units]
        found: set[str] = set()
        for k in (k for k, missing in enumerate(gone) if missing):
            run, block = units[k][1].run, units[k][1]
            found |= block.rows
            for step in (-1, 1):
                near = k + step
                while 0 <= near < len(units) and gone[near]:
                    near += step
                if 0 <= near < len(units) and units[near][1].run == run:
                    found |= units[near][1].rows
        if not found and len(Depth(self.program).blocks) < len(whole.blocks):
            found = self.blocks  # of blocks that share all, none takes weights along
        return found.intersection(self.trainable)

    def _gone(self, unit: Unit) -> bool:
        return any(row in self.program.aliases and self.program.value_of(row) is None for row in unit.rows)

    def rows(self, which: str) -> dict[str, int]:
        """The rows to train, each with how many calls of `forward` read it; none if nothing was changed. `which` is
        `changed`, `blocks` or `all`."""
        if not (self.differing or self.beside):
            return {}
        vectors = {row for row in self.blocks if self.program.weights[row].value.dim() < 2}
        chosen = {
            "changed": self.differing | self.beside | vectors,
            "blocks": self.blocks | self.differing,
            "all": set(self.trainable),
        }[which]
        nodes = self.program.forward.weight_nodes()
        return {row: len(nodes[row].users) for row in sorted(chosen) if row in nodes and nodes[row].users}

    def matrices(self) -> list[str]:
        """The matrices that blocks read, sorted."""
        return sorted(row for row in self.blocks if self.program.weights[row].value.dim() == 2)
