"""From an .onnx file to a module with an example call.

The file is checked (`load.py`), every node is looked up in the table of operators before any of them runs, and what
remains is an interpreter (`module.py`) whose inputs, outputs and weights have the names of the file. Sizes stay
symbolic while it is traced (`shapes.py`), so axes that the file names stay dynamic.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from laconic.ir.errors import UnsupportedError
from laconic.ir.onnx import (  # noqa: F401 - each fills the table
    ops_attention,
    ops_conv,
    ops_elementwise,
    ops_index,
    ops_layout,
    ops_linear,
    ops_quantize,
    ops_recurrent,
    ops_reduce,
    ops_resize,
)
from laconic.ir.onnx.examples import examples
from laconic.ir.onnx.grouped import group_products
from laconic.ir.onnx.load import STANDARD, Loaded, damaged, load, weight_of
from laconic.ir.onnx.module import OnnxModel, Step, hold, hold_numbers, parameter_names, signed_model
from laconic.ir.onnx.shapes import KNOWN, MOST, WHOLE, Numbers
from laconic.ir.onnx.table import Op, find
from laconic.ir.source_model import Source

log = logging.getLogger(__name__)

#: Inputs that hold running statistics, which training does not change by gradients.
_STATISTICS = {"BatchNormalization": (3, 4)}


def read_onnx(path: Path, *, seed: int = 0) -> Source:
    """The model of an .onnx file and an example call, whose numbers are drawn by a generator with this seed.

    Axes that the file names (dim_param) are dynamic under these names, nameless ones too. Floating weights are
    parameters, others buffers, under the names of the file; whole numbers of up to 16 elements and floating scalars
    are constants of the code.

    Raises ModelError for a file that is missing, damaged or names data outside its folder; UnsupportedError, with all
    operators at once, for what is not read.
    """
    path = Path(path)
    loaded = load(path)
    graph = loaded.model.graph
    constants = dict(loaded.weights)
    group_products(graph, constants)
    steps = _steps(loaded, constants, path)
    inputs = [value for value in graph.inputs if value.name not in loaded.weights]
    _refuse_dangling(steps, {str(value.name) for value in inputs} | set(constants), graph, path)
    names = parameter_names([str(value.name) for value in inputs])
    model = signed_model(steps, names, [str(value.name) for value in graph.outputs])
    _hold_constants(model, steps, constants, {str(value.name) for value in graph.outputs})
    renamed = [f"{own!r} is {python!r}" for python, own in names.items() if python != own]
    if renamed:
        log.warning("inputs whose names Python cannot take: %s", ", ".join(renamed))
    kwargs, shapes = examples(dict(zip(names, inputs, strict=True)), loaded.weights, path, seed)
    return Source(model.eval(), (), kwargs, shapes, path.stem)


def _refuse_dangling(steps: list[Step], made: set[str], graph: onnx_ir.Graph, path: Path) -> None:
    """Raise ModelError for a value that is read before anything makes it, and for a graph without outputs."""
    for step in steps:
        unknown = [name for name in step.inputs if name and name not in made]
        if unknown:
            raise damaged(path, f"{step.label} reads {unknown[0]!r}, which nothing before it makes")
        made.update(step.outputs)
    lost = [str(value.name) for value in graph.outputs if str(value.name) not in made]
    if lost or not graph.outputs:
        raise damaged(path, f"nothing makes its output {lost[0]!r}" if lost else "it has no outputs")


# ------------------------------------------------------------------------------------------------- nodes


def _steps(loaded: Loaded, constants: dict[str, torch.Tensor], path: Path) -> list[Step]:
    """The nodes in order; those of `Constant` go into `constants`. Raises UnsupportedError with all that is refused."""
    steps: list[Step] = []
    refused: dict[str, list[str]] = defaultdict(list)
    for node in loaded.model.graph:
        label = node.name or f"the node that makes {node.outputs[0].name if node.outputs else 'nothing'}"
        op = find(node.op_type, loaded.opset) if node.domain in STANDARD else None
        if node.op_type == "Constant" and node.domain in STANDARD:
            value = _constant(node, path)
            if value is not None:
                constants[str(node.outputs[0].name)] = value
                continue
        if op is None:
            refused[_kind(node, loaded.model)].append(label)
            continue
        attributes, problem = _attributes(node, op, path)
        if problem:
            refused[f"{_kind(node, loaded.model)} with {problem}"].append(label)
            continue
        steps.append(
            Step(
                op,
                node.op_type,
                node.name or "",
                [str(value.name) if value is not None else "" for value in node.inputs],
                _trimmed([str(value.name or "") for value in node.outputs]),
                attributes,
            )
        )
    if refused:
        raise UnsupportedError(
            f"{path.name} uses {len(refused)} operators that are not read",
            where=str(path),
            why="\n".join(f"{kind}: {_counted(labels)}" for kind, labels in sorted(refused.items())),
            hint="export the model again with standard operators and without control flow, or optimise its source",
        )
    return steps


def _kind(node: onnx_ir.Node, model: onnx_ir.Model) -> str:
    version = model.opset_imports.get(node.domain, node.version)
    return f"{node.domain or 'ai.onnx'}.{node.op_type} (opset {version})"


def _counted(labels: list[str]) -> str:
    return f"{len(labels)} node{'s' * (len(labels) > 1)}, first {labels[0]}"


def _trimmed(outputs: list[str]) -> list[str]:
    """Without the outputs at the end that nobody named."""
    while len(outputs) > 1 and not outputs[-1]:
        outputs.pop()
    return outputs


def _attributes(node: onnx_ir.Node, op: Op, path: Path) -> tuple[dict[str, Any], str]:
    """Attributes as Python values; or what is not read of them, in words."""
    found: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = _attribute(attribute, path)
        if name not in op.attributes or value is None:
            return {}, f"the attribute {name}"
        allowed = op.attributes[name]
        if allowed is not None and value not in allowed:
            return {}, f"{name}={value!r}"
        found[name] = value
    return found, ""


def _attribute(attribute: onnx_ir.Attr, path: Path) -> Any:
    """An attribute as a Python value; None for graphs, types and what else no function takes."""
    kind = onnx_ir.AttributeType
    if attribute.is_ref():
        return None
    if attribute.type in (kind.INT, kind.FLOAT, kind.STRING):
        return attribute.value
    if attribute.type in (kind.INTS, kind.FLOATS, kind.STRINGS):
        return tuple(attribute.value)
    if attribute.type is not kind.TENSOR:
        return None
    value = weight_of(onnx_ir.to_proto(attribute.value), path)
    return Numbers.read(value) if value.numel() == 1 and value.dtype in KNOWN else None


# ------------------------------------------------------------------------------------------------- constants


def _constant(node: onnx_ir.Node, path: Path) -> torch.Tensor | None:
    """The value of a Constant node; None for strings and sparse tensors."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            return weight_of(onnx_ir.to_proto(attribute.value), path)
        if name in ("value_int", "value_ints"):
            return torch.tensor(attribute.value, dtype=torch.int64)
        if name in ("value_float", "value_floats"):
            return torch.tensor(attribute.value, dtype=torch.float32)
    return None


def _hold_constants(model: OnnxModel, steps: list[Step], constants: dict[str, torch.Tensor], outputs: set[str]) -> None:
    """Give the model its weights and constants; those that nothing reads are left out."""
    statistics = {
        step.inputs[place] for step in steps for place in _STATISTICS.get(step.kind, ()) if place < len(step.inputs)
    }
    read = {name for step in steps for name in step.inputs} | outputs
    for name, value in constants.items():
        if name not in read:
            log.info("nothing reads the weight %r", name)
            continue
        known = value.dtype in KNOWN and value.numel() <= MOST
        if known:
            hold_numbers(model, name, Numbers.read(value))
        in_code = known and (value.ndim == 0 if value.dtype not in (torch.bool, *WHOLE) else value.numel() <= 16)
        if not in_code:
            hold(model, name, value, trainable=value.is_floating_point() and name not in statistics)
