"""A .pt2 as a Program: read, never unpickled.

torch unpickles the example inputs of each .pt2 that it loads, and turns strings of its graph into code. So the archive
is read here (`pt2_archive`: tensors as bytes, no pickle at all), the graph is held to a grammar (`pt2_graph`), and only
then does torch make an ExportedProgram of both, which is captured like a module.

Example inputs are drawn. Names and ranges of sizes are those of the file; torch writes no names of axes and no ranges
of values, so `write_pt2` puts both beside the graph, as `extra/laconic.json`:

    {"model": "BertModel", "returned": "", "sizes": {"s0": "batch"}, "ranges": {"input_ids": [0, 99]}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from laconic.ir.capture import capture_exported
from laconic.ir.errors import ModelError, UnsupportedError
from laconic.ir.inputs import draw_values
from laconic.ir.program import Input, Program
from laconic.ir.pt2_archive import read_archive
from laconic.ir.pt2_graph import cut, harmless
from laconic.ir.silence import torch_silenced
from laconic.ir.torch_private import expression, read_exported, symbol_hint
from laconic.ir.tree import leaves

#: What `write_pt2` puts beside the graph.
NOTES = "laconic.json"

_MOST_EXAMPLE_BYTES = 1 << 32
#: Ops that hand indices on as they are.
_MOVES = {
    "reshape",
    "view",
    "unsqueeze",
    "squeeze",
    "expand",
    "clone",
    "to",
    "_to_copy",
    "slice",
    "alias",
    "detach",
    "t",
}


def notes(program: Program) -> str:
    """What a .pt2 of the entry `forward` needs beside its graph, to be read back as it was."""
    sizes = {key: size.name for key, size in program.symbols.items()}
    ranges = {i.name: [i.low, i.high] for i in program.forward.inputs if math.isfinite(i.low) and math.isfinite(i.high)}
    facts = {key: program.facts.get(key, "") for key in ("model", "returned")}
    return json.dumps({**facts, "sizes": sizes, "ranges": ranges})


def read_pt2(path: Path, progress: Callable[[str], None] = lambda stage: None) -> Program:
    """The Program that a .pt2 says, verified, and held to the bits of the exported program on drawn inputs.

    Raises ModelError for a file that is missing, damaged or no .pt2; UnsupportedError for pickled weights, constants
    and objects, for compiled code, and for a graph that a Program cannot hold.
    """
    path = Path(path)
    archive = read_archive(path)
    graph = harmless(archive.model, str(path))
    noted = _Notes.of(archive.extra.get(NOTES, b"{}"), path)
    progress("reading the exported program")
    exported = _exported(graph.data, archive.state, archive.constants, path)
    args, kwargs, dynamic = _example(exported, noted, path)
    program = capture_exported(exported, args, kwargs, dynamic, progress=progress)
    program.facts["model"] = noted.model or path.stem
    if noted.returned or graph.returned:
        program.facts["returned"] = noted.returned or graph.returned
    entry = program.forward
    entry.inputs = [noted.range(declared) for declared in entry.inputs]
    return program


@dataclass(frozen=True)
class _Notes:
    """What `notes` wrote: the model's class and that of its results, names of sizes, ranges of inputs."""

    model: str
    returned: str
    sizes: dict[str, str]
    ranges: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, text: bytes, path: Path) -> _Notes:
        try:
            data = json.loads(text)
            sizes = {str(key): str(name) for key, name in data.get("sizes", {}).items()}
            ranges = {str(name): (_number(low), _number(high)) for name, (low, high) in data.get("ranges", {}).items()}
            if len(set(sizes.values())) != len(sizes) or any(low > high for low, high in ranges.values()):
                raise ValueError("two sizes have one name, or a range is empty")
            return cls(str(data.get("model", "")), str(data.get("returned", "")), sizes, ranges)
        except (ValueError, TypeError, AttributeError, RecursionError) as problem:
            raise ModelError(f"extra/{NOTES} of {path.name} is damaged", where=str(path), why=str(problem)) from problem

    def range(self, declared: Input) -> Input:
        """An input with its range, in the kind of numbers that its dtype has."""
        low, high = self.ranges.get(declared.name, (declared.low, declared.high))
        kind = type(declared.low)
        return replace(declared, low=kind(low), high=kind(high))


def _exported(data: dict[str, Any], state: dict[str, Any], constants: dict[str, Any], path: Path) -> ExportedProgram:
    try:
        with torch_silenced():
            return read_exported(data, state, constants)
    except Exception as problem:  # torch's deserializer meets what it does not know with errors of any type
        lines = [line for line in str(problem).splitlines() if line.strip()]
        raise ModelError(
            f"torch cannot read {path.name}",
            where=str(path),
            why=f"{type(problem).__name__}: " + "\n".join(map(cut, dict.fromkeys([*lines[:1], *lines[-1:]]))),
            hint="the file is damaged, or of another version of torch: export the model again",
        ) from problem


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no end of a range")
    return float(value) if isinstance(value, float) else int(value)


def _example(exported: ExportedProgram, noted: _Notes, path: Path) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Example arguments of the declared types, and which of their axes are dynamic, in the form of `dynamic_shapes`."""
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    generator = torch.Generator().manual_seed(0)
    flat: list[Any] = []
    axes: list[Any] = []
    names = _input_names(exported)
    room = _MOST_EXAMPLE_BYTES
    for spec in exported.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            flat.append(spec.arg.value)
            axes.append(None)
            continue
        if not isinstance(spec.arg, TensorArgument):
            raise UnsupportedError(
                f"{path.name} takes a number that varies ({spec.arg.name})",
                where=str(path),
                hint="pass a tensor instead",
            )
        value = placeholders[spec.arg.name].meta["val"]
        shape = [_hint(size, path) for size in value.shape]
        room -= math.prod(shape) * value.dtype.itemsize
        if room < 0:
            raise UnsupportedError(
                f"{path.name} was exported for inputs of more than 4 GiB",
                where=str(path),
                why=f"{spec.arg.name}: {shape}",
            )
        name = names[len(flat)]
        low, high = noted.ranges.get(name) or _likely_range(placeholders[spec.arg.name], value.dtype)
        drawn = draw_values(Input(name, low, high), value.dtype, shape, generator)
        strides = [_hint(step, path) for step in value.stride()]
        flat.append(drawn if list(drawn.stride()) == strides else _strided(drawn, strides, path))
        axes.append(
            {axis: _dim(exported, size, noted.sizes) for axis, size in enumerate(value.shape) if _is_symbol(size)}
        )
    in_spec = exported.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(flat, in_spec)
    by_position, by_name = pytree.tree_unflatten(axes, in_spec)
    return args, kwargs, (*by_position, *by_name.values())


def _strided(values: torch.Tensor, strides: list[int], path: Path) -> torch.Tensor:
    try:
        return torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)
    except RuntimeError as problem:
        raise UnsupportedError(f"{path.name} takes an input whose elements overlap", why=str(problem)) from problem


def _input_names(exported: ExportedProgram) -> list[str]:
    """The dotted path of each leaf of the arguments, as a Program names its inputs."""
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    names = signature.forward_arg_names or []
    args, kwargs = pytree.tree_unflatten(list(range(signature.in_spec.num_leaves)), signature.in_spec)
    arguments = {names[k] if k < len(names) else f"args_{k}": value for k, value in enumerate(args)} | kwargs
    return [path for path, _ in sorted(leaves(arguments), key=lambda leaf: leaf[1])]


def _is_symbol(size: Any) -> bool:
    return isinstance(expression(size), sympy.Symbol)


def _dim(exported: ExportedProgram, size: Any, names: dict[str, str]) -> Any:
    """The axis under the name and range that the file has for it; sizes are at least 1."""
    symbol = expression(size)
    assert isinstance(symbol, sympy.Symbol)
    known = exported.range_constraints.get(symbol)
    low = max(1, int(known.lower)) if known is not None else 1
    bounded = known is not None and isinstance(known.upper, sympy.Integer) and int(known.upper) < 2**62
    name = names.get(symbol.name, "")
    if not name.isidentifier():
        return Dim.AUTO(min=low)
    return Dim(name, min=low, max=int(known.upper) if known is not None and bounded else None)


def _hint(size: Any, path: Path) -> int:
    """The example of a size. Raises UnsupportedError if the file has none."""
    value = expression(size)
    try:
        if isinstance(value, int):
            return value
        known = {s: sympy.Integer(symbol_hint(size.node.shape_env, s)) for s in value.free_symbols}
        return int(value.xreplace(known))
    except (KeyError, TypeError) as problem:
        raise UnsupportedError(f"{path.name} has no example of the size {value}", where=str(path)) from problem


def _likely_range(node: fx.Node, dtype: torch.dtype) -> tuple[float, float]:
    """A range of values that the graph takes: of indices, what they index; of flags and counts, 0 and 1."""
    if dtype.is_floating_point or dtype.is_complex:
        return -1.0, 1.0
    limit = _index_limit(node)
    return (0, max(0, limit - 1)) if limit is not None and dtype is not torch.bool else (0, 1)


def _index_limit(node: fx.Node) -> int | None:
    """The least size of what is indexed by a value; None if nothing is."""
    sizes: list[int] = []
    pending = [node]
    while pending:
        value = pending.pop()
        for user in value.users:
            op = str(user.target).split(".")[1] if isinstance(user.target, torch._ops.OpOverload) else ""
            if op == "embedding" and user.args[1] is value:
                sizes.append(_size_of(user.args[0], 0))
            elif op in ("index_select", "gather") and user.args[2] is value:
                sizes.append(_size_of(user.args[0], user.args[1]))
            elif op == "index" and isinstance(user.args[1], (list, tuple)):
                sizes += [_size_of(user.args[0], k) for k, index in enumerate(user.args[1]) if index is value]
            elif op in _MOVES and user.args[0] is value:
                pending.append(user)
    return min(sizes, default=None)


def _size_of(node: Any, axis: Any) -> int:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else size.node.hint or 1
