"""ONNX in: an .onnx file as a torch module that is captured like any other."""

from laconic.ir.onnx.read import read_onnx

__all__ = ["read_onnx"]
