"""ONNX Runtime: what it takes, and running a model in it with torch tensors."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch

from laconic.ir.errors import MissingDependencyError, UnsupportedError
from laconic.ir.torch_private import newest_onnx_opset, oldest_onnx_opset

#: dtypes that numpy lacks: their bits travel as integers beside the ONNX type.
_BITS = {
    torch.bfloat16: (np.uint16, onnx.TensorProto.BFLOAT16),
    torch.float8_e4m3fn: (np.uint8, onnx.TensorProto.FLOAT8E4M3FN),
    torch.float8_e5m2: (np.uint8, onnx.TensorProto.FLOAT8E5M2),
}
_FATAL = 4


def onnxruntime() -> Any:
    """The module. Raises MissingDependencyError if it is not installed, or twice."""
    if all(map(_installed, ("onnxruntime", "onnxruntime-gpu"))):
        raise MissingDependencyError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other",
            why="they share one folder: which files are whose depends on which was installed last",
            hint="pip uninstall both, then install one of the extras [cpu] and [gpu]",
        )
    try:
        import onnxruntime as module
    except ImportError as problem:
        raise MissingDependencyError(
            "ONNX Runtime is not installed, and no .onnx is written that was not run in it",
            why=str(problem),
            hint='pip install "laconic-compiler[cpu]"',
        ) from problem
    return module


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its classes have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidGraph", "InvalidArgument", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in names if hasattr(state, name))


@cache
def takes(opset: int, ir_version: int) -> bool:
    """Whether the installed ONNX Runtime takes models of this standard opset and IR version. Asked with a model of one
    node, since it tells its limits in no other way."""
    helper = onnx.helper
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "probe", value[:1], value[1:])
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    try:
        _session(probe.SerializeToString())
    except _failures():
        return False
    return True


def default_opset() -> int:
    """The newest standard opset that torch's exporter is tested with, `onnx` knows and ONNX Runtime takes.

    Raises UnsupportedError if the three have none in common.
    """
    onnxruntime()
    oldest = oldest_onnx_opset()
    for opset in range(min(newest_onnx_opset(), onnx.defs.onnx_opset_version()), oldest - 1, -1):
        if takes(opset, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])):
            return opset
    raise UnsupportedError(
        f"the installed ONNX Runtime takes no opset from {oldest} on, which is where torch's exporter begins",
        hint='pip install --upgrade "laconic-compiler[cpu]"',
    )


def _session(model: bytes | str, threads: int = 0) -> Any:
    module = onnxruntime()
    options = module.SessionOptions()
    options.log_severity_level = _FATAL
    if threads:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it takes time from others
    return module.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Session:
    """A model file in ONNX Runtime on the CPU, with its default graph optimisations.

    Raises UnsupportedError if ONNX Runtime does not take the model, or fails on an input.
    """

    def __init__(
        self, path: str | os.PathLike[str], sources: Mapping[str, str] | None = None, threads: int = 0
    ) -> None:
        """`sources`: the user's line behind each node, by the node's name, for error messages. `threads`: 0 leaves
        ONNX Runtime's choice."""
        self.failures, self.sources = _failures(), sources or {}
        try:
            self.session = _session(os.fspath(path), threads)
        except self.failures as problem:
            raise self._refused("take the exported model", problem) from problem
        self.inputs = [declared.name for declared in self.session.get_inputs()]
        self.outputs = [output.name for output in self.session.get_outputs()]

    @property
    def metadata(self) -> dict[str, str]:
        """The text by key that the model keeps."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name, for inputs by name."""
        found = self.run_values(self.values(inputs))
        return {name: to_torch(value) for name, value in zip(self.outputs, found, strict=True)}

    def values(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Tensors as ONNX Runtime's own values."""
        module = onnxruntime()
        return {name: _to_runtime(module, tensor) for name, tensor in inputs.items()}

    def run_values(self, values: dict[str, Any]) -> Any:
        """The outputs in order, all as ONNX Runtime's own values."""
        options = onnxruntime().RunOptions()
        options.log_severity_level = _FATAL
        try:
            return self.session.run_with_ort_values(self.outputs, values, options)
        except self.failures as problem:
            raise self._refused("run the exported model", problem) from problem

    def _refused(self, what: str, problem: Exception) -> UnsupportedError:
        lines = [line for line in str(problem).splitlines() if line.strip()]
        named = re.search(r"[Nn]ame:? ?'([^']+)'", lines[0]) if lines else None
        return UnsupportedError(
            f"the installed ONNX Runtime does not {what}",
            where=self.sources.get(named[1], "") if named else "",
            why=lines[0][:500] if lines else type(problem).__name__,
            hint="try another --opset or, if the reason names a dtype, float32 weights; or export a .pt2",
        )


def _to_runtime(module: Any, tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _BITS:
        integers, kind = _BITS[tensor.dtype]
        bits = tensor.view(torch.int16 if integers is np.uint16 else torch.uint8).numpy().view(integers)
        return module.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
    return module.OrtValue.ortvalue_from_numpy(tensor.numpy())


def to_torch(value: Any) -> torch.Tensor:
    """One of ONNX Runtime's own values as a tensor."""
    for dtype, (_, kind) in _BITS.items():
        if value.element_type() == kind:
            shape = list(value.shape())
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if not size:
                return torch.empty(shape, dtype=dtype)
            bits = bytearray(ctypes.string_at(value.data_ptr(), size))
            return torch.frombuffer(bits, dtype=dtype).reshape(shape)
    return torch.from_numpy(np.array(value.numpy()))
