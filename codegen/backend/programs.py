"""A Program compiled without Dynamo: cut where it calls functions, each distinct piece compiled once, its kernels taken
from Inductor's caches on disk where they hold them.

    laconic.load(DIR, compile=True)        a saved Program as a model (`CompiledModel`)
    CompiledEntry(program, "forward", ...) one entry, called with flat operands

Nothing is traced and nothing unpickled but what Inductor has in its own caches. Dynamic sizes stay dynamic. Where what
Inductor made holds for some sizes only (a size of 1 is another program to it), those that it does not hold for get a
compilation of their own, as a recompilation of Dynamo would be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx, nn

from laconic.codegen.backend.backend import compile_pieces, guarded, without_compiler
from laconic.codegen.backend.cut import Piece
from laconic.codegen.backend.driver import drive
from laconic.codegen.backend.inductor import cache_hits, compile_lock, has_compiler, own_context
from laconic.codegen.backend.options import Options
from laconic.codegen.backend.program_cut import ProgramCut, cut_program
from laconic.codegen.backend.stats import GraphRecord, new_record
from laconic.ir.dynamo import Refusal
from laconic.ir.errors import UsageError, VerificationError
from laconic.ir.logs import configure_from_environment
from laconic.ir.program import Kind, Program, copy_graph
from laconic.ir.run import Runnable
from laconic.ir.torch_private import FakeTensorMode, decisions, fake_mode, fake_tensor, new_symbol, sym_int
from laconic.ir.types import NumberType, TensorType, ValueType, same_type, type_of, type_text

log = logging.getLogger(__name__)

#: How many compilations an entry may have, as many as Dynamo allows; and for how many sizes it is remembered which.
MOST_VARIANTS, MOST_SIZES = 8, 4096

Function = Callable[..., tuple[Any, ...]]
Sizes = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Variant:
    """What was compiled; the sizes that it takes behind the operands; and what must be true of all sizes."""

    run: Function
    more: tuple[sympy.Symbol, ...]
    conditions: tuple[sympy.Basic, ...]

    def holds(self, sizes: Sizes) -> bool:
        values = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
        return all(condition.xreplace(values) == sympy.true for condition in self.conditions)

    def at(self, sizes: Sizes) -> Function:
        more = [sizes[symbol] for symbol in self.more]
        return (lambda *operands: self.run(*operands, *more)) if more else self.run


class CompiledEntry:
    """An entry of a Program, compiled for the sizes of its example, and for others when they come.

    If a step of laconic fails, that is logged and counted, and there is no function: the caller computes in eager. With
    `options.strict` it is raised: whatever the step raised, or VerificationError where it had a reason.
    """

    def __init__(self, program: Program, entry: str, options: Options, record: GraphRecord | None = None) -> None:
        self._program, self._entry, self._options, self._record = program, entry, options, record
        self._symbols = [sympy.Symbol(name, positive=True, integer=True) for name in program.symbols]
        self._cut: ProgramCut | None = None
        self._variants: list[Variant] = []
        self._chosen: dict[tuple[int, ...], Function | None] = {}
        self._failed = False
        self.function({symbol: program.symbols[symbol.name].hint for symbol in self._symbols})

    @property
    def compiled(self) -> bool:
        """Whether anything is."""
        return bool(self._variants)

    def __deepcopy__(self, memo: Any) -> CompiledEntry:
        return self  # it knows no weight, and what it learns of sizes holds for any copy

    def function(self, sizes: Sizes) -> Function | None:
        """What computes the entry's outputs at these sizes, given the operands of its placeholders in order; None if
        nothing is compiled for them."""
        key = tuple(sizes.get(symbol, -1) for symbol in self._symbols)
        chosen = self._chosen
        if key in chosen:
            return chosen[key]
        with compile_lock:
            if key not in self._chosen:
                kept = {} if len(self._chosen) >= MOST_SIZES else self._chosen
                self._chosen = {**kept, key: self._choose(sizes)}
            return self._chosen[key]

    def _choose(self, sizes: Sizes) -> Function | None:
        found = next((variant for variant in self._variants if variant.holds(sizes)), None)
        if (
            found is None
            and not self._failed
            and len(self._variants) < MOST_VARIANTS
            and len(sizes) == len(self._symbols)
        ):
            found = self._compile(sizes)
            self._failed = found is None
            if found is not None:
                self._variants.append(found)
        if found is None or not found.holds(sizes):
            names = self._program.names
            told = ", ".join(f"{names[symbol.name]} = {size}" for symbol, size in sizes.items())
            log.warning("nothing is compiled for %s: calls run in eager", told or "the program")
            return None
        return found.at(sizes)

    def _compile(self, sizes: Sizes) -> Variant | None:
        record, hits = self._record or new_record(), cache_hits()
        self._record = None  # another compilation has one of its own
        try:
            found = self._cut = self._cut or self._find_cut(record)
            if found is None:
                return None
            record.nodes = found.nodes
            if "cpu" in _devices(found) and not has_compiler():
                without_compiler(self._options, record)
                return None
            compiled: Variant | None = guarded(lambda: self._compile_cut(found, sizes, record), self._options, record)
            return compiled
        finally:
            record.cache_hits = {name: count - hits[name] for name, count in cache_hits().items()}

    def _find_cut(self, record: GraphRecord) -> ProgramCut | None:
        with record.timed("search"):
            found = guarded(lambda: cut_program(self._program, self._entry), self._options, record)
        if not isinstance(found, Refusal):
            return found  # type: ignore[no-any-return]
        record.refused = found.reason
        log.info("not compiled: %s", found)
        if self._options.strict:
            raise VerificationError("the program was not compiled", why=str(found), hint="options={'strict': False}")
        return None

    def _compile_cut(self, found: ProgramCut, sizes: Sizes, record: GraphRecord) -> Variant:
        mode = fake_mode()
        for number, symbol in enumerate(self._program.symbols.values()):
            made = new_symbol(mode, number, symbol.low, symbol.high, sizes[self._symbols[number]])
            assert made == self._symbols[number]
        pieces = [_fresh(piece, mode) for piece in found.pieces]  # compiling takes a piece's graph for itself
        with own_context(mode, _devices(found)):
            attempt = partial(guarded, options=self._options, record=record)
            functions = compile_pieces(replace(found, pieces=pieces), dict(self._options.inductor), record, attempt)
        return Variant(drive(found, functions), tuple(found.sizes), tuple(decisions(mode)))


def _fresh(piece: Piece, mode: FakeTensorMode) -> Piece:
    """A piece with a graph of its own, and with values of `mode` for its operands."""
    graph = fx.GraphModule(nn.Module(), copy_graph(piece.graph.graph), "Piece")
    return replace(piece, graph=graph, examples=tuple(_value(kind, mode) for kind in piece.examples))


def _value(kind: ValueType, mode: FakeTensorMode) -> Any:
    if isinstance(kind, TensorType):
        return fake_tensor(mode, kind.shape, kind.stride, kind.dtype, kind.device)
    assert isinstance(kind, NumberType)
    return sym_int(mode, kind.value)


def _devices(found: ProgramCut) -> set[str]:
    kinds = [kind for piece in found.pieces for kind in piece.examples]
    return {torch.device(kind.device).type for kind in kinds if isinstance(kind, TensorType)}


class CompiledModel(Runnable):
    """A saved Program as a compiled model, which checks arguments and writes updates as any `Runnable`.

    `program` is read, with every type recomputed, when it is asked for. Where nothing is compiled, the call is computed
    in eager.
    """

    def __init__(
        self, outlined: Program, whole: Callable[[], Program], options: Options, record: GraphRecord | None = None
    ) -> None:
        configure_from_environment()
        self._whole, self._options = whole, options
        self._read: Program | None = None
        super().__init__(outlined)
        self._operands = [(n.meta["kind"] == Kind.INPUT, n.meta["name"]) for n in self._entry.placeholders()]
        self._positions = {declared.name: k for k, declared in enumerate(self._entry.inputs)}
        rows = self._entry.weight_nodes()
        kinds = {name: type_of(node.meta["val"]) for name, node in rows.items()}
        self._row_types = {name: kind for name, kind in kinds.items() if isinstance(kind, TensorType)}
        self._seen: list[tuple[Any, ...]] = []
        self._compiled = CompiledEntry(outlined, self._entry.name, options, record)

    @property
    def compiled(self) -> bool:
        """Whether anything is compiled; where nothing is, calls are computed in eager."""
        return self._compiled.compiled

    @property
    def program(self) -> Program:
        if self._read is None:
            self._read = self._whole()
        return self._read

    def _compute(
        self, rows: dict[str, torch.Tensor], inputs: list[torch.Tensor], sizes: dict[sympy.Symbol, int]
    ) -> tuple[Any, ...]:
        function = self._compiled.function(sizes)
        if function is None:
            return super()._compute(rows, inputs, sizes)
        rows = self._as_compiled(rows)
        return function(*(inputs[self._positions[name]] if given else rows[name] for given, name in self._operands))

    def _as_compiled(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows with the strides that was compiled for: itself, or a copy where one was replaced by another. Raises
        UsageError for a row of another type."""
        seen = [(id(row), row.data_ptr(), row.dtype, row.shape, row.stride()) for row in rows.values()]
        if seen == self._seen:
            return rows
        laid_out = {name: self._like(kind, name, rows[name]) for name, kind in self._row_types.items()}
        self._seen = seen if all(row is rows[name] for name, row in laid_out.items()) else []
        return laid_out

    def _like(self, kind: TensorType, name: str, row: torch.Tensor) -> torch.Tensor:
        found = type_of(row)
        if same_type(found, kind):
            return row
        if not same_type(found, kind, strides=False):
            raise UsageError(
                f"the weight {name!r} must be {type_text(kind, {})}, is {type_text(found, {})}",
                hint="load the model without compile=True, or save it as it is now",
            )
        return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=kind.device).copy_(row)


def load_options(given: Mapping[str, Any] | None) -> Options:
    """Options for a saved program. Raises UsageError for what is none, or comes too late: its passes have run."""
    chosen = Options.of(given)
    wrong = sorted(set(given or {}) - {"strict", "inductor"})
    if wrong:
        raise UsageError(f"a saved program is compiled as it is, without the option {wrong[0]!r}")
    return chosen
