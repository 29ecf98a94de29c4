"""Everything private in Inductor that laconic touches, in one place. Works with torch 2.11 to 2.13."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.utils import counters
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InvalidCxxCompiler

from laconic.codegen.backend.one_unit import LARGEST, Kernel, fits, write_unit
from laconic.codegen.backend.regions import inline_regions
from laconic.codegen.backend.stats import GraphRecord
from laconic.ir.torch_private import FakeTensorMode, storage_key

__all__ = ["compile_lock"]

#: Takes a step of ours, and decides what becomes of an error.
Attempt = Callable[[Callable[[], Any]], Any]

#: What tells Dynamo to begin anew, from wherever it is raised.
RestartDynamo: type[Exception] = TensorifyScalarRestartAnalysis

_copy_ = torch.ops.aten.copy_.default
_POINTER_OF = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"


def inductor(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """Inductor's own backend, untouched."""
    return compile_fx(graph, list(examples))  # type: ignore[return-value]


def plainly(step: Callable[[], Any]) -> Any:
    """Take a step that nothing is done about if it fails."""
    return step()


def compile_graph(
    graph: fx.GraphModule,
    examples: Sequence[Any],
    options: dict[str, Any],
    record: GraphRecord | None = None,
    attempt: Attempt = plainly,
) -> Callable[..., Any]:
    """Compile a graph as Inductor's own backend does, but for its holes. Takes ownership of the graph. Steps of ours,
    now or when a backward is compiled at its first call, are taken by `attempt`, which may answer None for one that
    failed."""

    def inner(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_backward", False):
            _take_back_donated(graph)
        with one_unit(record, attempt):  # a backward's kernels make a unit too
            return compile_fx_inner(graph, *args, **kwargs)

    inline_regions(graph)
    return compile_fx(graph, list(examples), inner_compile=inner, config_patches=options or None)  # type: ignore


def has_compiler() -> bool:
    """Whether there is a C++ compiler for what runs on the CPU."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def runs_on_cpu(examples: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in examples)


def convolves_channels_last(settings: Mapping[str, Any]) -> bool:
    """Whether Inductor computes convolutions on the CPU in channels-last order."""
    chosen = settings.get("layout_optimization", config.layout_optimization)
    mkldnn: Any = torch.backends.mkldnn
    return bool(chosen and mkldnn.enabled and mkldnn.is_available())


def cache_hits() -> dict[str, int]:
    """How often Inductor has found something on disk so far, and how often not."""
    names = {"autograd_cache": "aot_autograd", "fxgraph_cache": "inductor"}
    return {
        f"{cache}_{outcome}": counters[group][f"{cache}_{outcome}"]
        for cache, group in names.items()
        for outcome in ("hit", "miss")
    }


class GraphRewrite(CustomGraphPass):
    """A rewrite of the functional graphs that Inductor makes, forward and backward; `identity` stands for what it does
    in the keys of Inductor's caches."""

    def __init__(self, rewrite: Callable[[fx.Graph], None], identity: str) -> None:
        self.rewrite, self.identity = rewrite, identity

    def __call__(self, graph: fx.Graph) -> None:
        self.rewrite(graph)

    def uuid(self) -> str:
        return self.identity

    def settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Inductor's settings with this rewrite before any other that is set."""
        name = "post_grad_custom_pre_pass"
        other = given.get(name, getattr(config, name))
        if other is None:
            return given | {name: self}
        return given | {name: [self, *(other if isinstance(other, (list, tuple)) else [other])]}


@contextmanager
def fresh_context(examples: Sequence[Any]) -> Iterator[None]:
    """A tracing context of a piece's own: the outer one knows parameters, outputs and metadata of one graph. Guards are
    shared, since they belong to the user's frame, and so is where its tensors came from."""
    outer = TracingContext.try_get()
    mode = outer.fake_mode if outer is not None else detect_fake_mode(examples)
    inner = TracingContext(mode)
    if outer is not None:
        inner.guards_context, inner.global_context = outer.guards_context, outer.global_context
        inner.tensor_to_context = outer.tensor_to_context
    counted = counters["aot_autograd"]["total"]
    try:
        with tracing(inner):
            yield
    finally:
        if getattr(outer, "fakify_first_call", False):
            # DDP's optimizer asks by this counter whether a part of its graph is one graph of AOTAutograd, which could
            # then compute with fake tensors. A driver of several is none.
            counters["aot_autograd"]["total"] = counted


@contextmanager
def own_context(mode: FakeTensorMode, devices: Iterable[str]) -> Iterator[None]:
    """Compile in here what no frame of Dynamo asked for, in a fake mode of its own and without gradients, whatever is
    on around it. Guards stay in the mode's shape environment."""
    with ExitStack() as stack:
        stack.enter_context(compile_lock)
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in devices:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def source_name(node: fx.Node) -> str:
    """Where Dynamo took a placeholder from, as Python text: L['self']._modules['head']._parameters['weight']."""
    name = node.meta["grapharg"].source.name
    return str(name() if callable(name) else name)  # a method in torch 2.11


def module_source(node: fx.Node) -> Any:
    """The source of the outermost module that Dynamo took a placeholder from, None if it is of no module."""
    source, found = node.meta["grapharg"].source, None
    while source is not None:
        if type(source).__name__.endswith("NNModuleSource"):
            found = source
        source = getattr(source, "base", None)
    return found


def is_wrapped_number(node: fx.Node) -> bool:
    """Whether a placeholder is a Python number that Dynamo hands over as a tensor."""
    argument = node.meta.get("grapharg")
    return argument is not None and bool(argument.pass_arg_as_tensor)


def hold_to_modules(nodes: Iterable[fx.Node]) -> None:
    """Let the frame that is being compiled hold for these very modules only. Dynamo takes parameters as arguments, so
    that what it compiled for a module serves others of its class."""
    for source in {module_source(node) for node in nodes}:
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def hold_to_numbers(nodes: Iterable[fx.Node]) -> None:
    """Let the frame that is being compiled hold for these values of Python numbers only, as it does of others."""
    for node in nodes:
        install_guard(node.meta["grapharg"].source.make_guard(GuardBuilder.CONSTANT_MATCH))


@contextmanager
def no_context() -> Iterator[None]:
    """What is traced in here has nothing to do with the frame of Dynamo that is being compiled."""
    with tracing(None):
        yield


def boxed(compiled: Callable[..., Any]) -> tuple[Callable[[list[Any]], Any], bool]:
    """The function behind a compiled graph that takes its operands as a list and empties it; and whether there was one.
    Without it operands live until the call returns, which costs memory only."""
    inner = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    inner = getattr(inner, "__wrapped__", inner)
    if getattr(inner, "_boxed_call", False):
        return inner, True

    def call(operands: list[Any]) -> Any:
        return compiled(*operands)

    return call, False


# A hole of torch 2.13, where Inductor computes something else without a word; another is in `regions.py`


def _take_back_donated(graph: fx.GraphModule) -> None:
    """AOTAutograd lets a backward use the memory of what the forward saved for it. What is also written back into an
    input Inductor may have written there to begin with: then the backward would overwrite a buffer of the user's."""
    context = TracingContext.try_get()
    facts: Any = context.fw_metadata if context is not None else None
    donated: list[int] | None = getattr(facts, "bw_donated_idxs", None)
    if not donated:
        return
    calls: Any = graph.graph.find_nodes(op="call_function", target=_copy_)
    memory = {storage_key(node.args[1].meta["val"]) for node in calls}
    returned: Any = graph.graph.output_node().args[0]
    saved = returned[facts.tensors_saved_for_backwards_slice]
    for number, node in enumerate(saved, start=facts.num_symints_saved_for_bw):
        if number in donated and storage_key(node.meta["val"]) in memory:
            donated.remove(number)


# One translation unit


class _Unit(CppPythonBindingsCodeCache):
    cache: dict[str, Any] = {}  # noqa: RUF012
    entry_function = "laconic_unit"


_collecting = threading.local()


@contextmanager
def one_unit(record: GraphRecord | None = None, attempt: Attempt = plainly) -> Iterator[None]:
    """Collect the C++ kernels of all that is compiled inside and compile them together at the end; one by one, as
    Inductor does, if that fails."""
    if getattr(_collecting, "kernels", None) is not None:
        yield  # part of a larger unit
        return
    kernels: dict[Any, Kernel] = {}
    _collecting.kernels = kernels
    try:
        yield
    finally:
        _collecting.kernels = None
    waiting = list(kernels.values())
    for start in range(0, len(waiting), LARGEST):
        part = waiting[start : start + LARGEST]
        if not attempt(lambda part=part: _compile_unit(part)):  # type: ignore[misc]
            _compile_apart(part)
    if record is not None:
        record.kernels += len(waiting)
        record.units += -(-len(waiting) // LARGEST)


def _compile_unit(kernels: list[Kernel]) -> bool:
    unit = _Unit.load(write_unit(kernels, _Unit.entry_function, _POINTER_OF))
    functions = [getattr(unit, f"kernel_{number}") for number in range(len(kernels))]
    for kernel, function in zip(kernels, functions, strict=True):
        kernel.give(function)
    return True


def _compile_apart(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        kernel.give(CppPythonBindingsCodeCache.load_pybinding(list(kernel.arguments), kernel.source))


_cpp_pybinding, _wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait


def _collect(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
    kernels: dict[Any, Kernel] | None = getattr(_collecting, "kernels", None)
    if kernels is None or not fits(argtypes, source_code):
        return _cpp_pybinding(self, argtypes, source_code)
    return kernels.setdefault((tuple(argtypes), source_code), Kernel(tuple(argtypes), source_code))


def _give_later(self: AsyncCompile, scope: dict[str, Any]) -> None:
    for name, value in scope.items():
        if isinstance(value, Kernel):
            value.homes.append((scope, name))
    _wait(self, scope)


AsyncCompile.cpp_pybinding, AsyncCompile.wait = _collect, _give_later  # type: ignore[method-assign]
