"""From a Program to an ONNX model in memory, with the Program's names, axes and dtypes.

torch's exporter translates op by op; what it drops or renames is put right here: states are inputs and outputs, results
that repeat or are inputs themselves stay outputs of their own, tied weights stay one tensor.
"""

from __future__ import annotations

import logging
import re
import traceback
from dataclasses import replace
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from laconic.codegen.onnx.shrink import shrink
from laconic.codegen.onnx.translate import translations
from laconic.ir.errors import UnsupportedError, VerificationError
from laconic.ir.exported import flat_names, to_exported
from laconic.ir.program import Entry, Kind, Program, Role
from laconic.ir.silence import torch_silenced
from laconic.ir.torch_private import oldest_onnx_opset
from laconic.ir.traits import op_name, traits
from laconic.ir.tree import Leaf
from laconic.ir.types import NumberType, TensorType, size_text, type_of

log = logging.getLogger(__name__)

PRODUCER = "laconic"
_NUMBERS = {"int": ir.DataType.INT64, "float": ir.DataType.FLOAT, "bool": ir.DataType.BOOL}


def to_onnx(program: Program, opset: int) -> ir.Model:
    """The entry `forward` as an ONNX model of this standard opset; weights are shared, nothing is checked.

    Inputs are the entry's inputs, then `state.<name>`; outputs its results, then `state.<name>.next` and
    `<input>.next`. A number that the model returns is an output without axes.

    Raises UnsupportedError, naming op and source line, for what ONNX or torch's exporter cannot express.
    """
    entry = program.forward
    _refuse(program, entry)
    inputs, outputs = flat_names(program)
    model = _translate(program, opset)
    _add_constant_outputs(model, entry)
    taken, made = len(model.graph.inputs), len(model.graph.outputs)
    if (taken, made) != (len(inputs), len(outputs)):
        raise VerificationError(
            f"torch's exporter wrote {taken} inputs and {made} outputs, expected {len(inputs)} and {len(outputs)}"
        )
    _shrink(program, model)
    _separate_outputs(model)
    _name_boundary(model, inputs, outputs)
    _name_axes(program, model)
    _type_boundary(program, model)
    _describe(model)
    found = model.opset_imports.get("", 0)
    if found != opset:
        raise UnsupportedError(
            f"the model cannot be written for opset {opset}; torch's exporter left it at {found}",
            hint=f"ask for opset {max(found, oldest_onnx_opset())}",
        )
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid(d, v) for d, v in _standard(model).items()])
    model.ir_version = max(int(model.ir_version or 0), needed)
    return model


def _standard(model: ir.Model) -> dict[str, int]:
    return {domain: version for domain, version in model.opset_imports.items() if domain in ("", "ai.onnx.ml")}


def _refuse(program: Program, entry: Entry) -> None:
    """Raise UnsupportedError for what would come out as another function, or not at all."""
    drawn = [node for node in entry.calls() if traits(node).random]
    if drawn:
        raise UnsupportedError(
            "a model that draws random numbers cannot be written as ONNX: no runtime draws the same ones",
            where="\n".join(program.describe(node) for node in drawn[:4]),
            hint="capture it without sampling, or pass the noise in as an input",
        )
    boundary = [(i.name, n) for i, n in zip(entry.inputs, entry.input_nodes(), strict=True)]
    boundary += [(o.name, v) for o, v in zip(entry.outputs, entry.output_values, strict=True) if isinstance(v, fx.Node)]
    boundary += [(n, node) for n, node in entry.weight_nodes().items() if n in entry.updated()]
    for name, node in boundary:
        kind = type_of(node.meta["val"])
        if isinstance(kind, TensorType) and kind.dtype.is_complex:
            raise UnsupportedError(
                f"{name!r} is complex, and ONNX runtimes take no complex tensors",
                where=program.describe(node),
                hint="pass and return real and imaginary parts (torch.view_as_real)",
            )


def _tensors_only(program: Program) -> Program:
    """The program with its inputs and computed results as flat lists; torch's exporter trips over constants."""
    entry = program.forward.clone()
    entry.arguments = {f"input_{k}": Leaf(k) for k in range(len(entry.inputs))}
    computed = [
        (o, v)
        for o, v in zip(entry.outputs, entry.output_values, strict=True)
        if o.role is not Role.RESULT or isinstance(v, fx.Node)
    ]
    entry.outputs = [output for output, _ in computed]
    entry.output_node.args = (tuple(value for _, value in computed),)
    entry.results = tuple(Leaf(k) for k in range(sum(output.role is Role.RESULT for output in entry.outputs)))
    return replace(program, entries={"forward": entry}, facts={})


def _translate(program: Program, opset: int) -> ir.Model:
    exported = to_exported(_tensors_only(program), explicit_states=True)
    try:
        with torch_silenced(), torch.no_grad():
            made = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translations(opset),
                optimize=False,
                verbose=False,
                external_data=False,
            )
    except torch.onnx.OnnxExporterError as problem:
        raise _untranslatable(program, problem) from problem
    assert made is not None
    return made.model


def _untranslatable(program: Program, problem: BaseException) -> UnsupportedError:
    """The error for an op that torch's exporter refuses, with the user's line."""
    cause = problem
    failed: fx.Node | None = None
    while True:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            local = frame.f_locals.get("node")
            failed = local if isinstance(local, fx.Node) else failed
        if cause.__cause__ is None:
            break
        cause = cause.__cause__
    node = _origin(program, failed) if failed else None
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return UnsupportedError(
        f"{_target(node or failed)} cannot be written as ONNX",
        where=program.describe(node) if node else str(failed.meta.get("stack_trace") or "").strip() if failed else "",
        why="\n".join(lines[:2])[:400],
        hint="rewrite that part of the model with other ops, or export a .pt2",
    )


def _target(node: fx.Node | None) -> str:
    known = node is not None and isinstance(node.target, torch._ops.OpOverload)
    return op_name(node.target) if node is not None and known else "the model"


def _origin(program: Program, failed: fx.Node) -> fx.Node | None:
    """The Program's node behind one of torch's exporter, which may come from a decomposition of it."""
    calls = {node.name: node for node in program.forward.calls()}
    if failed.name in calls and calls[failed.name].target == failed.target:
        return calls[failed.name]
    step = next(iter(failed.meta.get("from_node") or ()), None)
    origin = None
    while step is not None:
        origin = calls.get(step.name, origin)
        step = next(iter(step.from_node or ()), None)
    return origin


def _add_constant_outputs(model: ir.Model, entry: Entry) -> None:
    """Results that are known numbers, which the exporter leaves out, at their place among the outputs."""
    results = [v for o, v in zip(entry.outputs, entry.output_values, strict=True) if o.role is Role.RESULT]
    for position, value in enumerate(results):
        if isinstance(value, fx.Node):
            continue
        if not isinstance(value, (bool, int, float)):
            raise UnsupportedError(f"result {position} is {value!r}, which no ONNX output can be")
        dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32
        tensor = ir.tensor(torch.tensor(value, dtype=dtype).numpy(), name=f"number_{position}")
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
        node.outputs[0].name = f"number_{position}"
        model.graph.append(node)
        model.graph.outputs.insert(position, node.outputs[0])


def _shrink(program: Program, model: ir.Model) -> None:
    parameters = {name for name, row in program.weights.items() if row.kind is Kind.PARAMETER}
    positive = {key for key, size in program.symbols.items() if size.low > 0}
    shrink(model, frozenset(positive), frozenset(parameters))


def _separate_outputs(model: ir.Model) -> None:
    """An Identity for each result that is an input, a weight or another result, so that each is a value of its own."""
    seen: set[ir.Value] = set()
    for position, value in enumerate(model.graph.outputs):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.Node("", "Identity", [value], num_outputs=1, name=f"output_{position}_identity")
            node.outputs[0].name = f"output_{position}"
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            model.graph.append(node)
            model.graph.outputs[position] = node.outputs[0]
        seen.add(value)


def _name_boundary(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs their names. A result called like an input or another result gets `.out` behind it, any
    other value in the way a number."""
    graph = model.graph
    taken: set[str] = set()
    boundary: dict[ir.Value, str] = {}
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        while name in taken:
            name += ".out"
        taken.add(name)
        boundary[value] = name
    others = list(graph.initializers.values()) + [out for node in graph.all_nodes() for out in node.outputs]
    names = taken | {str(value.name) for value in others}
    for value in others:
        if value not in boundary and value.name in taken:
            _rename(graph, value, _unused(str(value.name), names))
    for number, value in enumerate(boundary):
        value.name = f"{number} on its way"  # no two may have one name at any time
    for value, name in boundary.items():
        value.name = name


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.is_initializer():
        del graph.initializers[str(value.name)]
        value.name = name
        graph.initializers[name] = value
    else:
        value.name = name


def _unused(name: str, names: set[str]) -> str:
    number = 1
    while f"{name}.{number}" in names:
        number += 1
    names.add(f"{name}.{number}")
    return f"{name}.{number}"


def _name_axes(program: Program, model: ir.Model) -> None:
    """Dynamic axes of all values under their display names."""
    symbols = program.names
    if not symbols:
        return
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(symbols, key=len, reverse=True))) + r")\b")
    values = [*model.graph.inputs, *(out for node in model.graph.all_nodes() for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = [
                pattern.sub(lambda m: symbols[m[0]], d.value) if isinstance(d, ir.SymbolicDim) and d.value else d
                for d in value.shape
            ]
            value.shape = ir.Shape(sizes)


def _type_boundary(program: Program, model: ir.Model) -> None:
    """Shapes and dtypes of inputs and outputs as the Program has them. Raises VerificationError if a dtype differs."""
    entry = program.forward
    known: dict[str, Any] = {i.name: n.meta["val"] for i, n in zip(entry.inputs, entry.input_nodes(), strict=True)}
    known.update({f"state.{name}": node.meta["val"] for name, node in entry.weight_nodes().items()})
    produced = _ordered_outputs(entry)
    pairs = [(v, known[str(v.name)]) for v in model.graph.inputs] + list(
        zip(model.graph.outputs, produced, strict=True)
    )
    for value, fake in pairs:
        kind = type_of(fake)
        if isinstance(kind, NumberType):
            dtype, sizes = _NUMBERS[kind.kind], []
        else:
            assert isinstance(kind, TensorType)
            dtype = ir.tensor_adapters.from_torch_dtype(kind.dtype)
            sizes = [n if isinstance(n, int) else size_text(n, program.names) for n in kind.shape]
        if value.dtype is not None and value.dtype != dtype:
            raise VerificationError(f"{value.name} came out as {value.dtype}, expected {dtype}")
        value.shape = ir.Shape(sizes)
        value.type = ir.TensorType(dtype)


def _ordered_outputs(entry: Entry) -> list[Any]:
    """The fake values of the outputs in the order of `flat_names`: results, then what would have been written."""
    pairs = list(zip(entry.outputs, entry.output_values, strict=True))
    ordered = [v for o, v in pairs if o.role is Role.RESULT] + [v for o, v in pairs if o.role is not Role.RESULT]
    return [v.meta["val"] if isinstance(v, fx.Node) else v for v in ordered]


def _describe(model: ir.Model) -> None:
    """Producer, and of torch's own notes on each node only the line of the user's code."""
    model.producer_name, model.producer_version = PRODUCER, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        source = node.metadata_props.get("pkg.torch.onnx.stack_trace")
        node.metadata_props.clear()
        if source:
            node.metadata_props["source"] = source.strip()
        for out in node.outputs:
            out.metadata_props.clear()
