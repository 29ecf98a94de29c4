"""ONNX out: `convert` builds the model, `runtime` runs it, `write` checks it and puts it in place."""

from laconic.codegen.onnx.write import OnnxReport, write_onnx

__all__ = ["OnnxReport", "write_onnx"]
