"""The exports that can be written beside a program in a saved DIR. Known here, so that naming one needs no torch."""

FORMATS = ("hf", "onnx", "pt2")
