"""An .onnx file, read and checked before anything is built from it.

Nothing in the file is believed: every tensor's bytes are held against its shape, data beside the model must lie in its
folder, and only then does native code (onnx's checker) see the graph, without the weights. Nothing is executed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from laconic.ir.errors import LaconicError, ModelError, UnsupportedError
from laconic.ir.memory import from_file
from laconic.ir.onnx.dtypes import dtype_of
from laconic.ir.types import DTYPE_NAMES

#: The standard operators, and the versions of them that the table describes.
STANDARD = ("", "ai.onnx")
OLDEST, NEWEST = 7, 28
#: A protobuf message holds at most 2 GiB; larger models keep their weights in files beside them.
_LONGEST = 2**31 - 1
#: A few times as many nodes, and functions that call each other in a row, as the largest models have.
_MOST_NODES, _MOST_LEVELS = 100_000, 100
_AGAIN = "copy or export the file again"
#: What Python's protobuf and onnx-ir raise for a message that parses and yet makes no sense.
_GARBLED = (
    ValueError,  # of which text that is no UTF-8 is one
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,  # onnx-ir's, of values in the field of another type
    OverflowError,
    RecursionError,
    onnx_ir.serde.SerdeError,
    onnx_ir.passes.PassError,
)


@dataclass(frozen=True)
class Loaded:
    """A checked model without local functions, and the values of its initializers by name."""

    model: onnx_ir.Model
    weights: dict[str, torch.Tensor]
    opset: int


def load(path: Path) -> Loaded:
    """Raises ModelError for a file that is missing, damaged or leaves its folder, UnsupportedError for what it holds
    that is not read."""
    proto = _parsed(path)
    try:
        opset = _opset(proto, path)
        _refuse_foreign_tensors(proto, path)
        weights = _take_weights(proto, path)
        _refuse_garbled(proto, path)
        levels = _levels(proto, path)
        _check(proto, path)
        return Loaded(_inlined(proto, levels), weights, opset)
    except LaconicError:
        raise
    except _GARBLED as problem:
        raise damaged(path, f"{type(problem).__name__}: {problem}") from problem


def damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path.name} is no valid ONNX model", where=str(path), why=why[:600], hint=_AGAIN)


def _parsed(path: Path) -> ModelProto:
    if not path.is_file():
        raise ModelError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    size = path.stat().st_size
    if not 0 < size <= _LONGEST:
        raise damaged(
            path, "it is empty" if not size else f"it has {size} bytes, and a message holds at most {_LONGEST}"
        )
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as problem:
        raise damaged(path, "it is cut short or was never ONNX: its protobuf message does not parse") from problem
    except OSError as problem:
        raise ModelError(f"{path} cannot be read", why=str(problem)) from problem
    if not proto.HasField("graph"):
        raise damaged(path, "it has no graph")
    return proto


def _opset(proto: ModelProto, path: Path) -> int:
    """The version of the standard operator set; functions must be written in the same."""
    imported = {entry.version for entry in proto.opset_import if entry.domain in STANDARD}
    others = sorted(entry.domain for entry in proto.opset_import if entry.domain not in STANDARD)
    if not imported and others:
        raise UnsupportedError(f"{path.name} uses no standard operators", why=f"it imports {', '.join(others)} alone")
    if len(imported) != 1:
        raise damaged(path, f"it imports {len(imported)} versions of the standard operator set, expected one")
    newest = min(NEWEST, onnx.defs.onnx_opset_version())
    if not OLDEST <= max(imported) <= newest:
        raise UnsupportedError(
            f"{path.name} is written in opset {max(imported)}",
            why=f"opsets {OLDEST} to {newest} are read",
            hint=f"onnx.version_converter.convert_version(model, {newest}) may convert it",
        )
    for function in proto.functions:
        other = {entry.version for entry in function.opset_import if entry.domain in STANDARD} - imported
        if other:
            raise UnsupportedError(
                f"{path.name} mixes operator sets",
                why=f"the model imports opset {max(imported)}, its function {function.name!r} opset {max(other)}",
                hint="convert the functions to the model's opset, or inline them",
            )
    return int(imported.pop())


# ------------------------------------------------------------------------------------------------- tensors


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """These nodes and those of the graphs nested in them."""
    pending = [*nodes]
    while pending:
        yield (node := pending.pop())
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                pending += graph.node


def _attributes(proto: ModelProto) -> Iterator[AttributeProto]:
    """Every attribute of the model: of its graph, nested graphs and functions."""
    for body in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in _nodes(body):
            yield from node.attribute


def _refuse_foreign_tensors(proto: ModelProto, path: Path) -> None:
    """Hold the tensors among the attributes against their shapes; native code reads them."""
    for attribute in _attributes(proto):
        for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
            if tensor.data_location == TensorProto.EXTERNAL:
                raise UnsupportedError(
                    f"{path.name} keeps a tensor of an attribute in another file",
                    why=f"the attribute {attribute.name!r}",
                    hint="keep initializers alone outside (convert_attribute=False)",
                )
            _bytes(tensor, f"the tensor of an attribute {attribute.name!r}", path)
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            for tensor in graph.initializer:
                _bytes(tensor, f"the initializer {tensor.name!r}", path)


def _bytes(tensor: TensorProto, what: str, path: Path) -> int:
    """How many bytes the tensor has by its shape and dtype. Raises ModelError if it holds another number."""
    if any(size < 0 for size in tensor.dims):
        raise damaged(path, f"{what} has the shape {list(tensor.dims)}")
    if tensor.HasField("segment"):
        raise UnsupportedError(f"{path.name} holds a tensor in segments", why=what)
    if tensor.data_type == TensorProto.STRING:
        if len(tensor.string_data) != math.prod(tensor.dims):
            raise damaged(path, f"{what} holds {len(tensor.string_data)} strings for the shape {list(tensor.dims)}")
        return 0
    try:
        bits = int(onnx_ir.DataType(tensor.data_type).bitwidth)
    except (ValueError, TypeError) as problem:
        raise damaged(path, f"{what} has the element type {tensor.data_type}") from problem
    expected = -(-math.prod(map(int, tensor.dims)) * bits // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        return expected
    found = len(tensor.raw_data) if tensor.HasField("raw_data") else _typed_bytes(tensor, expected)
    if found != expected:
        raise damaged(path, f"{what} holds {found} bytes, and {list(tensor.dims)} of its type are {expected}")
    return expected


def _typed_bytes(tensor: TensorProto, expected: int) -> int:
    stored = sum(len(getattr(tensor, f"{kind}_data")) for kind in ("float", "int32", "int64", "double", "uint64"))
    if stored > 2 * expected + 8:  # no type has more than two fields an element, or fewer than a field for two
        return stored
    return len(onnx_ir.serde.TensorProtoTensor(tensor).tobytes()) if expected else stored


def _take_weights(proto: ModelProto, path: Path) -> dict[str, torch.Tensor]:
    """Move the values of the graph's initializers out of the message."""
    graph = proto.graph
    if graph.sparse_initializer:
        raise UnsupportedError(f"{path.name} holds sparse weights", why=graph.sparse_initializer[0].values.name)
    weights: dict[str, torch.Tensor] = {}
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in weights:
            raise damaged(path, f"two initializers are called {tensor.name!r}" if tensor.name else "one has no name")
        weights[tensor.name] = weight_of(tensor, path)
        kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0])
        tensor.CopyFrom(kept)
    return weights


def weight_of(tensor: TensorProto, path: Path) -> torch.Tensor:
    """The values of a tensor, from the message or from a file beside the model."""
    what = f"the initializer {tensor.name!r}"
    expected = _bytes(tensor, what, path)
    dtype = dtype_of(tensor.data_type)
    if dtype is None:
        raise UnsupportedError(
            f"{path.name} holds {what} of an element type that is not read",
            why=f"it is {TensorProto.DataType.Name(tensor.data_type)}",
            hint="known dtypes: " + ", ".join(DTYPE_NAMES.values()),
        )
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, dtype, expected, path)
    if not expected:
        return torch.empty(list(tensor.dims), dtype=dtype)
    flat = torch.empty(math.prod(tensor.dims), dtype=dtype)  # torch aligns what it allocates
    flat.view(torch.uint8).numpy()[:] = np.frombuffer(onnx_ir.serde.TensorProtoTensor(tensor).tobytes(), np.uint8)
    return flat.view(list(tensor.dims))


def _external(tensor: TensorProto, dtype: torch.dtype, expected: int, path: Path) -> torch.Tensor:
    """Values from a file of the model's folder: no absolute name, no way out of it by `..` or a link."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    given = Path(location)
    file = (folder / given).resolve()
    if not location or given.is_absolute() or ".." in given.parts or not file.is_relative_to(folder):
        raise ModelError(
            f"{path.name} names data outside its folder",
            where=f"the initializer {tensor.name!r}",
            why=f"its location is {location!r}",
            hint="data of a model lies in the model's folder",
        )
    if not file.is_file():
        raise ModelError(
            f"{location} is missing", where=str(folder), why=f"it holds the weight {tensor.name!r}", hint=_AGAIN
        )
    offset, length = (int(entries.get(key) or default) for key, default in (("offset", 0), ("length", expected)))
    if length != expected:
        raise damaged(path, f"{tensor.name!r} has {length} bytes in {location}, and its shape takes {expected}")
    try:
        with file.open("rb") as stream:
            return from_file(stream, offset, list(tensor.dims), dtype)
    except (EOFError, OSError) as problem:
        raise ModelError(
            f"{location} is damaged or cut short",
            where=str(file),
            why=f"{tensor.name!r} is not there: {problem}",
            hint=_AGAIN,
        ) from problem


# ------------------------------------------------------------------------------------------------- the graph


def _refuse_garbled(message: Message, path: Path) -> None:
    """Raise ModelError for text that is no UTF-8, which protobuf hands out as bytes."""
    for field, value in message.ListFields():
        values = (value,) if isinstance(value, (str, bytes, Message)) else value
        if field.type == field.TYPE_STRING:
            if any(not isinstance(text, str) for text in values):
                raise damaged(path, f"its {field.name} {value!r} is no UTF-8 text")
        elif field.type == field.TYPE_MESSAGE:
            for part in values:
                _refuse_garbled(part, path)


_Op = tuple[str, str, str]


def _identifier(domain: str, name: str, overload: str) -> _Op:
    return "" if domain in STANDARD else domain, name, overload


def _calls(body: Iterable[NodeProto]) -> Counter[_Op]:
    return Counter(_identifier(n.domain, n.op_type, n.overload) for n in _nodes(body))


def _levels(proto: ModelProto, path: Path) -> list[tuple[_Op, ...]]:
    """The functions of the model, those first that call none, then those that call only these, and so on. Raises
    ModelError for functions that call themselves, or that are too many nodes once each call is its body: the number
    may double with each function of the file."""
    calls = {_identifier(f.domain, f.name, f.overload): _calls(f.node) for f in proto.functions}
    sizes: dict[_Op, int] = {}
    levels: list[tuple[_Op, ...]] = []

    def expanded(body: Counter[_Op]) -> int:
        return sum(times * sizes.get(op, 1) for op, times in body.items())

    sorter = TopologicalSorter({op: body.keys() & calls.keys() for op, body in calls.items()})
    try:
        sorter.prepare()
    except CycleError as problem:
        raise damaged(path, f"its function {problem.args[1][0][1]!r} calls itself") from problem
    while level := sorter.get_ready():
        levels.append(level)
        sorter.done(*level)
        # Enough is known beyond the limit, and the numbers stay short.
        sizes |= {op: min(expanded(calls[op]), _MOST_NODES + 1) for op in level}
    many = [size for size in (*sizes.values(), expanded(_calls(proto.graph.node))) if size > _MOST_NODES]
    if levels and (many or len(levels) > _MOST_LEVELS):
        raise ModelError(
            f"{path.name} expands to more than {_MOST_NODES:,} nodes" if many else f"{path.name} nests its functions",
            where=str(path),
            why=f"its {len(calls)} functions call each other, {len(levels)} levels deep",
            hint=f"at most {_MOST_NODES:,} nodes and {_MOST_LEVELS} levels are read: export the model in fewer",
        )
    return levels


def _check(proto: ModelProto, path: Path) -> None:
    """The rules of ONNX: names, order, operators, inputs and attributes; of the weights only their names are left."""
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as problem:
        raise damaged(path, "\n".join(str(problem).splitlines()[:4])) from problem


def _name_apart(body: Iterable[NodeProto]) -> None:
    """Name those nodes of a body that have no name, or that of another: the pass that inlines makes names of the names
    of calls, and where they are equal tries one number after another, in quadratic time."""
    taken: set[str] = {""}
    for number, node in enumerate(_nodes(body)):
        if node.name in taken:
            node.name = f"{node.name or node.op_type}_{number}"
        taken.add(node.name)


def _inlined(proto: ModelProto, levels: list[tuple[_Op, ...]]) -> onnx_ir.Model:
    """The model without functions. They are put in line from the innermost outwards: a call inside of a call would
    get a name that holds the names of all around it, each of which does likewise, and doubles in length each time."""
    for function in proto.functions:
        _name_apart(function.node)
    model = onnx_ir.from_proto(proto)
    if levels:
        from onnx_ir.passes.common import InlinePass

        for level in map(set, levels):
            model = InlinePass(lambda function, level=level: function.identifier() in level)(model).model  # type: ignore[misc]
    return model
