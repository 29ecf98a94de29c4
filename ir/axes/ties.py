"""Whether several positions may hold the greatest value, so that which of them is chosen depends on their order.

Values that a product or a sum makes are the same by chance only. Those behind a `relu`, a comparison or a fill are so
often: then an argmax takes the first of them, and another one if they are put in another order. What an op not named
here does is not known, and taken for the latter.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from laconic.ir.traits import argument

#: Their results differ, whatever their operands are.
_MIX = frozenset(
    {
        *("linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "addmv", "mv", "dot", "einsum", "conv1d", "conv2d"),
        *("conv3d", "convolution", "scaled_dot_product_attention", "_grouped_mm", "grouped_mm_fallback", "sum", "mean"),
        *("embedding", "linalg_vector_norm", "cdist", "rand", "randn", "rand_like", "randn_like", "normal"),
    }
)
#: Equal values stay equal, others do not become so: what is asked is their first operand.
_KEEP = frozenset(
    {
        *("clone", "_to_copy", "to", "contiguous", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze"),
        *(
            "expand",
            "select",
            "slice",
            "split",
            "split_with_sizes",
            "chunk",
            "unbind",
            "t",
            "alias",
            "detach",
            "type_as",
        ),
        *("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "layer_norm", "rms_norm"),
        *(
            "sigmoid",
            "tanh",
            "exp",
            "log",
            "log1p",
            "sqrt",
            "rsqrt",
            "square",
            "abs",
            "neg",
            "softplus",
            "gelu",
            "silu",
        ),
        *("pow", "amax", "amin", "max", "min", "topk", "sort", "elu", "leaky_relu", "erf", "dropout", "reciprocal"),
        *("index", "index_select", "gather", "cumsum", "flip", "roll", "upsample_nearest2d", "upsample_bilinear2d"),
        *("batch_norm", "native_layer_norm", "_fused_rms_norm", "group_norm", "cos", "sin", "log_sigmoid", "logit"),
    }
)
#: One operand whose values differ makes all of them differ; one whose values are equal makes the others' equal.
_ALL = frozenset({"add", "sub", "rsub"})
_ANY = frozenset({"mul", "div", "maximum", "minimum", "cat", "stack", "concat"})
_COMPARE = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "isin", "isclose"})


def tied(node: fx.Node, known: Mapping[fx.Node, str | None]) -> str | None:
    """The call by which values of this one may be equal, as `relu`, given that of its operands; None if they are by
    chance only."""
    if node.target is operator.getitem:
        return known.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload):
        return f"%{node.name}"
    name = node.target._schema.name.partition("::")[2]
    if name in _MIX:
        return None
    operands = [known.get(operand) for operand in node.all_input_nodes]
    if name in _KEEP:
        return operands[0] if operands else f"%{node.name} ({name})"
    if name in _ALL and operands:
        return operands[0] if all(operands) else None
    if name in _ANY:
        return next(filter(None, operands), None)
    mask = {"masked_fill": "mask", "where": "condition"}.get(name)
    if mask is not None and not _by_comparison(argument(node, mask)):
        # What is left out because others were chosen is not chosen itself.
        return next((known.get(value) for value in node.all_input_nodes if value is not argument(node, mask)), None)
    return f"%{node.name} ({name})"


def _by_comparison(mask: fx.Node) -> bool:
    """Whether a mask comes of comparing values, so that any number of them may be filled."""
    seen, left = set[fx.Node](), [mask]
    while left:
        value = left.pop()
        if value in seen or not isinstance(value.target, torch._ops.OpOverload):
            continue
        seen.add(value)
        name = value.target._schema.name.partition("::")[2]
        if name in _COMPARE:
            return True
        if name not in _MIX and name not in ("topk", "argmax", "sort", "argsort"):
            left += value.all_input_nodes
    return False
