"""Rewrites of an ONNX graph, each a function that takes an Editor and returns how often it fired. A rewrite never adds
nodes on balance, and keeps the sizes of all values known that were."""
