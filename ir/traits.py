"""What is known of an op: does it have effects, draw random numbers, return a view, or leave memory unset.

Read from the op's own schema and tags wherever they tell the truth; the tables below hold what they do not tell.
Passes and the verifier ask here, and keep no lists of ops of their own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import fx

from laconic.ir.types import TensorType, type_of

aten = torch.ops.aten

_OPERATORS = (
    "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ not_ lshift rshift"  # of `operator`
)
_MATH = "ceil floor trunc sqrt"
_SYMBOLIC = "sym_float sym_int sym_max sym_min sym_not sym_ite sym_sum sym_sqrt"

#: Functions on Python numbers and symbolic sizes that may stand in a graph beside ATen ops, by their text name.
PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"math.{name}": getattr(math, name) for name in _MATH.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC.split() if hasattr(torch, name)},
}
PYTHON_NAMES = {function: name for name, function in PYTHON_FUNCTIONS.items()}

_DROPPING = ("dropout_p", 0.0)
_RECURRENT = [f"aten::{cell}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")]

#: Tagged as random by torch, yet deterministic while one of these arguments has this value.
_RANDOM_UNLESS: dict[str, tuple[tuple[str, Any], ...]] = {
    "aten::scaled_dot_product_attention": (_DROPPING,),
    "aten::_scaled_dot_product_attention_math": (_DROPPING,),
    "aten::_scaled_dot_product_flash_attention": (_DROPPING,),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (_DROPPING,),
    "aten::_scaled_dot_product_efficient_attention": (_DROPPING,),
    "aten::_scaled_dot_product_cudnn_attention": (_DROPPING,),
    "aten::dropout": (("train", False),),
    "aten::native_dropout": (("train", False),),
    "aten::alpha_dropout": (("train", False),),
    "aten::feature_dropout": (("train", False),),
    "aten::rrelu": (("training", False),),
    "aten::rrelu_with_noise_functional": (("training", False),),
    **dict.fromkeys(_RECURRENT, (("train", False), ("dropout", 0.0))),
}

#: Results whose bytes are whatever lay in memory.
_UNSET = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::empty_permuted",
    "aten::new_empty",
    "aten::new_empty_strided",
}

#: Facts about sizes that hold for later nodes; they return nothing and must stay.
ASSERTIONS = {
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::_functional_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}

#: Read only the type of their tensor operand, not its values.
_TYPE_ONLY = {
    "aten::new_ones",
    "aten::new_zeros",
    "aten::new_full",
    "aten::ones_like",
    "aten::zeros_like",
    "aten::full_like",
}

#: Declared as views by their schema, yet they copy where strides or types ask for it.
_MAY_COPY = {
    "aten::contiguous",
    "aten::flatten",
    "aten::ravel",
    "aten::reshape",
    "aten::reshape_as",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::to",
    "aten::type_as",
}

#: May return a view of this operand (of a list: result k of element k), though their schemas do not say so.
_UNDECLARED_VIEWS = {
    "aten::atleast_1d": 0,
    "aten::atleast_2d": 0,
    "aten::atleast_3d": 0,
    "aten::broadcast_tensors": 0,
    "aten::conj_physical": 0,
    "aten::dropout": 0,
    "aten::alpha_dropout": 0,
    "aten::feature_dropout": 0,
    "aten::feature_alpha_dropout": 0,
    "aten::einsum": 1,
    "aten::unsafe_chunk": 0,
    "aten::unsafe_split": 0,
    "aten::unsafe_split_with_sizes": 0,
    "aten::flatten_dense_tensors": 0,
    "aten::meshgrid": 0,
    "aten::sum_to_size": 0,
    "aten::to_dense": 0,
    "aten::type_as": 0,
}


@dataclass(frozen=True)
class Traits:
    """What an op call may do. `alias` is the position of the operand that its result may share storage with;
    `may_copy` says that it need not. `pointwise`: each element of the result comes from one of each operand."""

    effectful: bool = False
    random: bool = False
    unset: bool = False
    type_only: bool = False
    alias: int | None = None
    may_copy: bool = False
    pointwise: bool = False

    @property
    def pure(self) -> bool:
        """The same operands give the same result and nothing else happens: may be merged, folded, removed."""
        return not (self.effectful or self.random)


@cache
def _op_traits(op: torch._ops.OpOverload) -> Traits:
    schema = op._schema
    alias = _UNDECLARED_VIEWS.get(schema.name)
    for returned in schema.returns:
        info = returned.alias_info
        if info is None or info.is_write:
            continue
        names = info.before_set | info.after_set
        for position, argument in enumerate(schema.arguments):
            given = argument.alias_info
            # A list of views (split, unbind) names no set of its own; its operand says `a -> *`.
            if given is not None and (given.before_set & names or (not names and "*" in given.after_set)):
                alias = position
                break
    return Traits(
        effectful=schema.is_mutable or not schema.returns or schema.name in ASSERTIONS,
        random=torch.Tag.nondeterministic_seeded in op.tags,
        unset=schema.name in _UNSET,
        type_only=schema.name in _TYPE_ONLY,
        alias=alias,
        may_copy=schema.name in _MAY_COPY or schema.name in _UNDECLARED_VIEWS,
        pointwise=torch.Tag.pointwise in op.tags,
    )


def traits(node: fx.Node) -> Traits:
    """The traits of this call, given its arguments."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return Traits(effectful=True)  # what its graphs do, nothing here looks at
    if not isinstance(target, torch._ops.OpOverload):
        return Traits(alias=0) if target is operator.getitem else Traits()
    found = _op_traits(target)
    quiet = _RANDOM_UNLESS.get(target._schema.name, ()) if found.random else ()
    if any(argument(node, name) == value for name, value in quiet):
        return replace(found, random=False)
    return found


def reads_requires_grad(node: fx.Node) -> bool:
    """Whether a call may compute other bits for a matrix that requires gradients, even where none are recorded.

    `matmul` folds the batch axes of its larger operand into one if the other requires gradients, or if strides allow
    it without a copy; folded and batched products round differently.
    """
    if node.target not in (torch.ops.aten.linear.default, torch.ops.aten.matmul.default):
        return False
    kinds = [type_of(n.meta["val"]) for n in node.all_input_nodes]
    return any(isinstance(k, TensorType) and len(k.shape) >= 3 and not k.contiguous for k in kinds)


def argument(node: fx.Node, name: str) -> Any:
    """The value of a call's argument by its schema name, its default if it is not given."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for position, declared in enumerate(target._schema.arguments):
        if declared.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    raise KeyError(f"{target} has no argument {name!r}")


def op_name(target: Any) -> str:
    """The text name of a call's target: `aten.linear`, `aten.add.Tensor`, `operator.mul`."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        overload = target._overloadname
        return f"{namespace}.{name}" if overload == "default" else f"{namespace}.{name}.{overload}"
    if target in PYTHON_NAMES:
        return PYTHON_NAMES[target]
    raise ValueError(f"{target!r} is no op that may stand in a program")


def find_op(name: str) -> Any:
    """The target with this text name. Raises KeyError if no loaded library registers it."""
    if name in PYTHON_FUNCTIONS:
        return PYTHON_FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) not in (2, 3):
        raise KeyError(name)
    qualified = f"{parts[0]}::{parts[1]}"
    overload = parts[2] if len(parts) == 3 else "default"
    try:
        packet = getattr(getattr(torch.ops, parts[0]), parts[1])
        found = getattr(packet, overload)
    except AttributeError:
        raise KeyError(name) from None
    if not isinstance(found, torch._ops.OpOverload) or found._schema.name != qualified:
        raise KeyError(name)
    return found
