"""Everything private in torch that laconic touches, in one place. Works with torch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp import autocast_mode
from torch.autograd import grad_mode
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import CeilToInt, CleanDiv, FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, make_symbol
from torch.utils._sympy.value_ranges import ValueRanges

__all__ = [
    "LEAVING",
    "FakeTensor",
    "FakeTensorMode",
    "dead_draws_kept",
    "expression",
    "fake_mode",
    "fake_tensor",
    "int_oo",
    "invoke_subgraph",
    "is_symbolic",
    "new_symbol",
    "quiet",
    "storage_key",
    "sym_int",
]

#: Functions that stand in torch's symbolic sizes, by the name that they print with.
SIZE_FUNCTIONS: dict[str, Any] = {
    "FloorDiv": FloorDiv,
    "CleanDiv": CleanDiv,
    "CeilToInt": CeilToInt,
    "Mod": Mod,
    "PythonMod": PythonMod,
    "Max": Max,
    "Min": Min,
}

#: Calls that turn something on until another call turns it off, and that call, as they stand in Dynamo's graphs.
LEAVING: dict[Any, Any] = {
    autocast_mode._enter_autocast: autocast_mode._exit_autocast,
    grad_mode._enter_inference_mode: grad_mode._exit_inference_mode,
}


def shape_env(mode: FakeTensorMode) -> ShapeEnv:
    assert mode.shape_env is not None
    return mode.shape_env


def fake_mode() -> FakeTensorMode:
    """A fresh fake tensor mode with a shape environment of its own."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)


def new_symbol(mode: FakeTensorMode, index: int, low: int, high: int | None, hint: int) -> sympy.Symbol:
    """The symbol s<index> for a size in [low, high], whose example is `hint`."""
    env = shape_env(mode)
    symbol = make_symbol(SymT.SIZE, index, positive=True, integer=True)
    if hasattr(env, "add_backed_var_to_val"):
        env.add_backed_var_to_val(symbol, hint)
    else:  # torch 2.11
        env.add_var_to_val(symbol, hint)
    env.constrain_symbol_range(symbol, compiler_min=low, compiler_max=int_oo if high is None else high)
    return symbol


def sym_int(mode: FakeTensorMode, expr: sympy.Expr | int) -> int | torch.SymInt:
    """The size `expr` as torch sees it, without adding a guard."""
    if isinstance(expr, int) or expr.is_Integer:
        return int(expr)
    env = shape_env(mode)
    hint = int(expr.xreplace({s: sympy.Integer(symbol_hint(env, s)) for s in expr.free_symbols}))
    return env.create_symintnode(expr, hint=hint)


def expression(size: Any) -> int | sympy.Expr:
    """A size as an int or a sympy expression; never guards, never specialises."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = size.node.expr
        return int(expr) if isinstance(expr, sympy.Integer) else expr
    return size


def own_symbol(size: torch.SymInt) -> Any:
    """What a size was made as, whatever it was found to equal since: what compiled code calls an input that is one."""
    return size.node._expr


def is_symbolic(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def fake_tensor(mode: FakeTensorMode, shape: Any, stride: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A fake tensor with these sizes, given as ints and sympy expressions. No guard is added."""
    with quiet(mode):
        return torch.empty_strided(
            tuple(sym_int(mode, s) for s in shape),
            tuple(sym_int(mode, s) for s in stride),
            dtype=dtype,
            device=device,
        )


@contextmanager
def quiet(mode: FakeTensorMode) -> Iterator[None]:
    """Run under `mode` without gradients and without a guard being added to its shape environment.

    The Python dispatcher is what lets composite ops see symbolic sizes on torch 2.11.
    """
    with mode, torch.no_grad(), shape_env(mode).suppress_guards(), enable_python_dispatcher():
        yield


def guards(mode: FakeTensorMode) -> list[str]:
    """What has been decided by the examples of symbolic sizes."""
    env = shape_env(mode)
    return [str(g.expr) for g in env.guards] + [f"{old} = {new}" for old, new in env.replacements.items()]


def decisions(mode: FakeTensorMode) -> list[sympy.Basic]:
    """What `guards` tells, as conditions on sizes."""
    env = shape_env(mode)
    return [g.expr for g in env.guards] + [sympy.Eq(old, new) for old, new in env.replacements.items()]


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def ops_called(mode: FakeTensorMode, function: Callable[..., Any], args: Any, kwargs: Any) -> list[OpOverload]:
    """The ops that a call on fake values comes down to."""
    called = _Called()
    with quiet(mode), called:
        function(*args, **kwargs)
    return called.ops


def size_range(size: Any) -> tuple[int, int | None]:
    """The inclusive range that a size is known to be in; None if there is no upper end."""
    found = size.node.shape_env.var_to_range[size.node.expr]
    return int(found.lower), None if found.upper in (int_oo, sympy.oo) else int(found.upper)


@contextmanager
def dead_draws_kept() -> Iterator[None]:
    """While export decomposes: keep random draws that nobody uses, since later draws see the RNG state they leave."""
    import torch._inductor.config as config

    with config.patch(fallback_random=True):
        yield


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage, fake or real; valid while the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


def symbol_hint(env: ShapeEnv, symbol: sympy.Symbol) -> int:
    """The example value of a symbol that export made."""
    table = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return int(table[symbol])


def free_symbols(value: Any) -> set[sympy.Symbol]:
    """The symbols in the sizes of a (possibly nested) fake value."""
    if isinstance(value, (list, tuple)):
        return set().union(*(free_symbols(v) for v in value)) if value else set()
    if isinstance(value, torch.Tensor):
        return free_symbols(tuple(value.shape))
    expr = expression(value)
    return set(expr.free_symbols) if isinstance(expr, sympy.Basic) else set()


def is_unbacked(symbol: sympy.Symbol) -> bool:
    """Whether a symbol stands for a number that only running the model can tell."""
    return bool(symbol.name.startswith(("u", "zuf")))


def value_range(low: int, high: int | None) -> Any:
    """The inclusive range of a size, as an exported program declares it."""
    return ValueRanges(low, int_oo if high is None else high)


def sym_number(mode: FakeTensorMode, kind: type, expr: Any) -> Any:
    """The number `expr` (of Python type `kind`) as torch sees it in `mode`, without adding a guard."""
    if kind is int:
        return sym_int(mode, expr)
    if not isinstance(expr, sympy.Basic):
        return expr
    env = shape_env(mode)
    hint = kind(expr.xreplace({s: sympy.Integer(symbol_hint(env, s)) for s in expr.free_symbols}))
    return env.create_symfloatnode(expr, hint=hint) if kind is float else env.create_symboolnode(expr)


def newest_onnx_opset() -> int:
    """The newest ONNX operator set that torch's exporter is tested with."""
    from torch.onnx import _constants

    return int(_constants.ONNX_MAX_OPSET)


def oldest_onnx_opset() -> int:
    """The operator set that torch's exporter writes in; older ones are converted to, which may fail."""
    from torch.onnx._internal.exporter import _constants

    return int(_constants.TORCHLIB_OPSET)


def stored_dtypes() -> dict[int, torch.dtype]:
    """The dtypes of tensors in a .pt2, by the numbers that it has for them."""
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    return {int(number): dtype for number, dtype in _SERIALIZE_TO_TORCH_DTYPE.items()}


def read_exported(data: dict[str, Any], state: dict[str, Any], constants: dict[str, Any]) -> ExportedProgram:
    """An exported program from its graph, as the JSON of a .pt2, and its tensors. Strings in the JSON are evaluated:
    `laconic.ir.pt2_graph` sees to it that they are harmless. Raises errors of any type."""
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    graph = _dict_to_dataclass(schema.ExportedProgram, data)  # type: ignore[no-untyped-call]
    return ExportedProgramDeserializer().deserialize(graph, state, constants, None)


def exported_module(exported: ExportedProgram) -> GraphModule:
    """An exported program as a module that computes with its tensors, without guards; `eval` is as for any module."""
    module = exported.module(check_guards=False)
    for name in ("train", "eval"):  # torch makes these raise
        vars(module).pop(name, None)
    return module


def record_onnx_node(node: Any) -> None:
    """Add an onnx_ir node to what torch's exporter is recording, while it calls a translation."""
    from onnxscript import evaluator

    recorder: Any = evaluator.default()
    recorder.nodes.append(node)
