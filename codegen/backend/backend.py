"""`torch.compile(model, backend="laconic")`: repeated blocks are found on the graph that Dynamo hands over, cut out,
and compiled once.

    Dynamo graph -> read -> repeats -> cut -> pieces -> each distinct one: Inductor, with our passes -> driver

What cannot be cut is compiled whole, by Inductor alone. If a step of ours fails, that is logged with its reason,
counted (`stats`), and the untouched graph is compiled; with `strict` it is an error. Nothing is caught at run time.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from laconic.codegen.backend.ahead import move, moves_that_complete_first_blocks
from laconic.codegen.backend.cut import Cut, Piece, cut
from laconic.codegen.backend.driver import Boxed, drive
from laconic.codegen.backend.inductor import (
    Attempt,
    GraphRewrite,
    RestartDynamo,
    boxed,
    cache_hits,
    compile_graph,
    convolves_channels_last,
    fresh_context,
    has_compiler,
    is_wrapped_number,
    one_unit,
    plainly,
    runs_on_cpu,
)
from laconic.codegen.backend.layouts import hand_over_channels_last
from laconic.codegen.backend.options import Options
from laconic.codegen.backend.out_of_place import autocast_is_on, out_of_place
from laconic.codegen.backend.rewrite import rewrite
from laconic.codegen.backend.snapshots import read_through_copies
from laconic.codegen.backend.stats import GraphRecord, first_time, forget, new_record
from laconic.ir.dynamo import (
    Reading,
    Refusal,
    numbers_beside_their_use,
    obstacle,
    parts_beside_their_tuple,
    read_dynamo,
    value_of,
)
from laconic.ir.errors import MissingDependencyError, UsageError, VerificationError
from laconic.ir.logs import configure_from_environment
from laconic.ir.program import copy_graph
from laconic.ir.repeats import find_repeats
from laconic.ir.torch_traits import written

log = logging.getLogger(__name__)

#: Refusals that are no loss: there was nothing to find.
NOTHING_TO_CUT = frozenset({"no repeated run", "too little is repeated"})


def laconic(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend, as torch.compile calls it. Raises UsageError for options that it does not have; with `strict`,
    VerificationError for whatever would be compiled in another way than asked for."""
    configure_from_environment()
    return compile_dynamo(graph, example_inputs, Options.of(options, mode))


def compile_dynamo(graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """A function of the graph's inputs that computes what the graph does."""
    record = new_record()
    hits = cache_hits()
    try:
        if runs_on_cpu(example_inputs) and not has_compiler():
            without_compiler(options, record)
            return graph.forward
        if options.freeze:
            from laconic.codegen.backend.freeze import compile_frozen

            frozen = compile_frozen(graph, example_inputs, options, record)
            if frozen is not None:
                return frozen
            options = options.unfrozen()
        found = guarded(lambda: plan_cut(graph, record), options, record)
        if isinstance(found, Cut):
            show_numbers(found, graph, example_inputs)
            driven: Callable[..., Any] | None = guarded(lambda: compile_cut(found, options, record), options, record)
            if driven is not None:
                return driven
            record.pieces = record.steps = record.compiled = 0
        elif isinstance(found, Refusal):
            record.refused = found.reason
            log.info("compiled whole: %s", found)
            if options.strict and found.reason not in NOTHING_TO_CUT:
                raise VerificationError("the graph was not cut", why=str(found), hint="options={'strict': False}")
        with record.timed("whole"):
            attempt = partial(guarded, options=options, record=record)
            attempt(lambda: _copies_in_the_whole(graph, record))
            return compile_graph(graph, example_inputs, dict(options.inductor), record, attempt)
    except RestartDynamo:
        forget(record)
        raise
    finally:
        record.cache_hits = {name: count - hits[name] for name, count in cache_hits().items()}


def _copies_in_the_whole(graph: fx.GraphModule, record: GraphRecord) -> None:
    """What is not cut needs the copies too: Inductor's gradients would be wrong."""
    if torch.is_grad_enabled() and obstacle(graph.graph) is None:
        record.copies = read_through_copies(graph.graph)
        graph.recompile()


def plan_cut(module: fx.GraphModule, record: GraphRecord) -> Cut | Refusal:
    """Find what is repeated and cut the graph there. Leaves it as it is, and compiles nothing."""
    with record.timed("search"), _without_collecting():
        training = torch.is_grad_enabled()
        graph = module.graph
        if not _is_plain(graph):
            refused = obstacle(graph)
            if refused is not None:
                return refused
            graph = copy_graph(graph)
            parts_beside_their_tuple(graph)
            numbers_beside_their_use(graph)
            record.out_of_place = out_of_place(graph, training, autocast_is_on(graph))
            if training:
                record.copies = read_through_copies(graph)
        reading = read_dynamo(graph, training)
        if isinstance(reading, Refusal):
            return reading
        repeats = find_repeats(reading.listing)
        moves = moves_that_complete_first_blocks(reading, repeats)
        if moves:
            graph = copy_graph(graph)
            move(_read(graph, training), moves)
            reading = _read(graph, training)
            repeats = find_repeats(reading.listing)
        record.nodes = len(reading.nodes)
        found = cut(graph, reading, repeats)
    return found


def _is_plain(graph: fx.Graph) -> bool:
    """Whether a graph holds none of what is said otherwise before it is read: tuples, numbers, writes."""
    calls = (node for node in graph.nodes if node.op in ("call_function", "call_method"))
    return not any(isinstance(value_of(node), (list, tuple, torch.SymFloat)) or written(node) for node in calls)


def _read(graph: fx.Graph, training: bool) -> Reading:
    """Read a graph that says what was read before."""
    reading = read_dynamo(graph, training)
    assert isinstance(reading, Reading)
    return reading


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Without Python's collector of cycles: planning makes many small objects and few cycles, and a collection in its
    midst goes through all that Dynamo has made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def show_numbers(found: Cut, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Let pieces be compiled with the very tensors that stand for Python numbers: what these hold is known by them."""
    inputs = zip(graph.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    numbers = {node.name: example for node, example in inputs if is_wrapped_number(node)}
    seen: set[int] = set()
    for step in found.steps if numbers else ():
        piece = found.pieces[step.piece]
        if step.piece not in seen:
            examples = zip(step.operands, piece.examples, strict=True)
            shown = tuple(numbers.get(node.name, example) for node, example in examples)
            found.pieces[step.piece] = replace(piece, examples=shown)
        seen.add(step.piece)


def compile_cut(found: Cut, options: Options, record: GraphRecord) -> Callable[..., Any]:
    """Compile each piece once; the driver that calls them."""
    attempt = partial(guarded, options=options, record=record)
    return drive(found, compile_pieces(found, piece_settings(options, record), record, attempt))


def compile_pieces(
    found: Cut, settings: dict[str, Any], record: GraphRecord, attempt: Attempt = plainly
) -> list[Boxed]:
    """Compile each piece once, all their C++ kernels in one unit."""
    record.repeats = [(r.period, r.count, len(r.slots), len(r.outputs)) for r in found.repeats]
    if convolves_channels_last(settings):
        record.channels_last = hand_over_channels_last(found)
    functions: list[Boxed] = []
    with one_unit(record, attempt):
        for piece in found.pieces:
            functions.append(_compile_piece(piece, settings, record, attempt))
    record.pieces, record.steps, record.compiled = len(found.pieces), len(found.steps), found.compiled
    log.info(
        "%d calls in %d steps of %d pieces, %d calls compiled; repeats (calls x times): %s",
        *(found.nodes, len(found.steps), len(found.pieces), found.compiled),
        ", ".join(f"{r.period} x {r.count}" for r in found.repeats),
    )
    return functions


def _compile_piece(piece: Piece, settings: dict[str, Any], record: GraphRecord, attempt: Attempt) -> Boxed:
    with fresh_context(piece.examples), record.timed("pieces"):
        function, is_boxed = boxed(compile_graph(piece.graph, piece.examples, settings, record, attempt))
    if not is_boxed:
        record.unboxed += 1
        log.warning("what Inductor returned takes no list: operands of a piece live until it returns")
    return function


def piece_settings(options: Options, record: GraphRecord) -> dict[str, Any]:
    """Inductor's settings for pieces: what the user gave, and our passes on each functional graph."""
    passes = options.passes()
    if not passes:
        return dict(options.inductor)

    def run(graph: fx.Graph) -> None:
        with record.timed("passes"):
            done = guarded(lambda: rewrite(graph, passes), options, record)
        if isinstance(done, str):
            log.info("passes are not run on a piece: %s", done)
        for name, count in (done if isinstance(done, dict) else {}).items():
            record.rewritten[name] = record.rewritten.get(name, 0) + count

    return GraphRewrite(run, f"laconic {_own_sources()} {options.pipeline}").settings(dict(options.inductor))


def guarded(step: Callable[[], Any], options: Options, record: GraphRecord) -> Any:
    """A step of ours. If it fails that is logged and counted, and None is the answer; with `strict` it is raised. What
    the user asked for wrongly is no failure, nor is a message to Dynamo."""
    try:
        return step()
    except (UsageError, RestartDynamo):
        raise
    except Exception as problem:
        if options.strict:
            raise
        record.fallback = f"{type(problem).__name__}: {problem}".splitlines()[0]
        log.warning("a step of laconic failed, the graph is compiled as it is: %s", record.fallback, exc_info=True)
        return None


def without_compiler(options: Options, record: GraphRecord) -> None:
    """Say, once, that there is no C++ compiler. Raises MissingDependencyError with `strict`."""
    record.fallback = "there is no C++ compiler"
    if options.strict:
        raise MissingDependencyError("there is no C++ compiler", hint="install g++ or clang++, or set CXX")
    if first_time(record.fallback):  # Python's own memory of warnings is wiped whenever torch touches filters
        warnings.warn(
            "there is no C++ compiler: the model runs uncompiled (install g++ or clang++, or set CXX)", stacklevel=2
        )


@cache
def _own_sources() -> str:
    """A hash of what passes are made of: another version of them must find nothing in Inductor's caches."""
    found = hashlib.sha256()
    root = Path(__file__).parents[2]
    for folder in ("ir", "passes"):
        for path in sorted((root / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
