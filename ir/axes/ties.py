"""Whether several positions may hold the greatest value, so that which of them is chosen depends on their order.

Values that a product makes are the same by chance only. Those behind a `relu`, or behind rounding, are often: then an
argmax takes the first of them, and another one if they are put in another order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from laconic.ir.types import TensorType, type_of

#: Many values become one.
_LEVELS = frozenset(
    {
        *("relu", "relu6", "threshold", "clamp", "clamp_min", "clamp_max", "hardtanh", "hardsigmoid", "hardswish"),
        *("floor", "ceil", "round", "trunc", "frac", "sign", "sgn", "heaviside", "floor_divide"),
        *("zeros", "ones", "full", "zeros_like", "ones_like", "full_like"),
    }
)
#: Equal values stay equal: what is asked is their first operand.
_KEEP = frozenset(
    {
        *("clone", "_to_copy", "to", "contiguous", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze"),
        *("expand", "select", "slice", "split", "split_with_sizes", "chunk", "t", "alias", "detach", "type_as"),
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
        *("pow", "amax", "amin", "max", "min", "topk", "masked_fill", "elu", "leaky_relu", "erf", "dropout"),
    }
)
#: One operand whose values differ makes all of them differ; one whose values are equal makes the others' equal.
_ALL, _ANY = frozenset({"add", "sub"}), frozenset({"mul", "div", "maximum", "minimum", "where"})


def tied(node: fx.Node, known: Mapping[fx.Node, str | None]) -> str | None:
    """The call by which values of this one may be equal, as `relu`, given that of its operands; None if they are by
    chance only."""
    if node.target is operator.getitem:
        return known.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    kind = type_of(node.meta["val"])
    if isinstance(kind, TensorType) and not kind.dtype.is_floating_point:
        return f"%{node.name}, which is {kind.dtype}"
    name = node.target._schema.name.partition("::")[2]
    if name in _LEVELS:
        return f"%{node.name} ({name})"
    operands = [known.get(operand) for operand in node.all_input_nodes if _is_floating(operand)]
    if name in _KEEP:
        return operands[0] if operands else None
    if name in _ALL:
        return operands[0] if operands and all(operands) else None
    return next(filter(None, operands), None) if name in _ANY else None


def _is_floating(node: fx.Node) -> bool:
    kind = type_of(node.meta["val"])
    return not isinstance(kind, TensorType) or kind.dtype.is_floating_point
