"""The columns of the support matrix: what holds for one model, each checked against something independent of it.

A check returns what it found, as plain data. What does not hold is `{"hole": reason}` in place of what was found.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import matrix_models
import onnxruntime
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import laconic
from cut_eager import EagerPieces, calls_of_steps
from laconic.codegen import reset_stats, stats
from laconic.codegen.backend.cut import Cut
from laconic.ir.metrics.differences import bit_equal, max_abs
from laconic.ir.precise import Deviation, deviation, pooled, widen

Values = dict[str, torch.Tensor]
Arguments = dict[str, Any]
Run = Callable[[Arguments], Values]
Compared = tuple[Values, Values, Values]

#: Of what is compiled, and of what is exported: batch, sequence, target.
SIZE, SIZES = (3, 7, 5), ((2, 9, 4), (5, 13, 17))
#: Draws that a tolerance is judged on; draws that tell eager's error, and how many if it does not hold with these.
DRAWS, TOLD, MORE = 3, 16, 224
#: Least share of a graph's nodes that is never compiled, and of a layer's that lies in repeats.
NEVER, COVERED = 0.6, 0.75
#: How far eager may be from float64, of the greatest value: farther, and some choice was another one.
CLOSE = 1e-3


class Hole(Exception):
    """Why something does not hold."""


def attempt(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found, or why it does not hold."""
    try:
        return what()
    except Hole as reason:
        return {"hole": str(reason)}


class Subject:
    """A model of the matrix and what is made of it. Nothing here changes `module`, which is in eval mode."""

    def __init__(self, name: str) -> None:
        self.row = matrix_models.ROWS[name]
        self.module, self.example, self.axes = matrix_models.make(name)
        parts = self.module.modules()
        self.layers = self.row.layers(next(part.config for part in parts if isinstance(part, PreTrainedModel)))

    def draw(self, seed: int, size: tuple[int, int, int] = SIZE) -> Arguments:
        return self.row.draw(self.example, size, seed)

    def mine(self, training: bool) -> nn.Module:
        """A copy in the mode in which gradients are taken, or in eval mode."""
        return copy.deepcopy(self.module).train(training and self.row.training)

    @cached_property
    def optimized(self) -> laconic.Result:
        return laconic.optimize(self.module, inputs=self.example, dynamic_shapes=self.axes)


# Running a model


def results(call: Callable[..., Any], arguments: Arguments) -> Values:
    """The tensors that a call returns, by their place."""
    leaves, _ = pytree.tree_flatten_with_path(call(**arguments))
    return {"results" + pytree.keystr(path): value for path, value in leaves if isinstance(value, torch.Tensor)}


def without_gradients(call: Callable[..., Any], arguments: Arguments) -> Values:
    with torch.no_grad():
        return results(call, arguments)


def gradients(call: Callable[..., Any], module: nn.Module, arguments: Arguments) -> Values:
    """The gradient of each parameter, all results going back at once, each with a random gradient of its own."""
    ends = [value for value in results(call, arguments).values() if value.requires_grad]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randint(-16, 17, e.shape, generator=generator).to(e.dtype) / 16 for e in ends]  # exact in any dtype
    named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(ends, list(named.values()), given, allow_unused=True)
    return {f"gradient of {name}": value for name, value in zip(named, found, strict=True) if value is not None}


class _Widened(TorchFunctionMode):
    """Where a model asks for float32, it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args, kwargs = pytree.tree_map(
            lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, dict(kwargs or {}))
        )
        return func(*args, **kwargs)


@contextmanager
def widened() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_double(module: Any, run: Callable[[nn.Module, Arguments], Values]) -> Run:
    """A way to run a model in float64, eagerly: all weights, inputs and whatever it makes on the way."""
    module = module.double()
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.set_experts_implementation("eager")  # the grouped product takes no float64

    def call(arguments: Arguments) -> Values:
        with widened():
            return run(module, {name: widen(value) for name, value in arguments.items()})

    return call


# The rule


def drawn(arguments: Iterable[Arguments], run: Run, wide: Run) -> Iterator[tuple[Arguments, Values, Values]]:
    """Arguments with what eager and float64 make of them. Left out is where rounding made eager choose otherwise (an
    expert, a side of a kink): there float64 is no reference. Raises if that is not the exception."""
    taken = left = 0
    for given in arguments:
        eager, reference = run(given), wide(given)
        greatest = max(float(value.abs().max()) for value in reference.values())
        if all(max_abs(value, reference[name]) <= CLOSE * greatest for name, value in eager.items()):
            taken += 1
            yield given, eager, reference
        else:
            left += 1
        if left > max(taken, DRAWS):
            raise Hole("eager itself is far from float64")


def hold(draws: Iterator[tuple[Arguments, Values, Values]], judged: Run, few: int = DRAWS) -> dict[str, Any]:
    """Hold tensors to the contract `tolerance` on a few draws.

    The contract pools eager's error over all draws. A model has a hundred gradients, and on a few draws the greatest
    error of one of them is small by luck: many more draws tell what eager's error is, even more if it does not hold.
    """
    cases: list[Compared] = [(eager, judged(given), wide) for given, eager, wide in islice(draws, few)]
    _lively([wide for _, _, wide in cases])
    for told in (TOLD, MORE):
        cases += [(eager, eager, wide) for _, eager, wide in islice(draws, told)]
        rows = _rows(cases)
        if all(row.ok for row in rows):
            break
    worst = max(rows, key=lambda row: row.found / row.allowed if row.allowed else row.found)
    if not worst.ok:
        raise Hole(f"{worst.name}: error {worst.found:.3g} against float64, allowed {worst.allowed:.3g}")
    share = worst.found / worst.allowed if worst.allowed else 0.0
    return {"worst": round(share, 3), "of": worst.name, "tensors": len(cases[0][0]), "told_by": len(cases)}


def _rows(cases: list[Compared]) -> list[Deviation]:
    """A row for each tensor of each case; of cases in which eager is compared with itself, only its error counts."""
    families: dict[str, list[Deviation]] = {}
    for eager, found, wide in cases:
        if not eager.keys() == found.keys() == wide.keys():
            raise Hole(f"not the same tensors: {sorted(eager.keys() ^ found.keys() or eager.keys() ^ wide.keys())}")
        for name, value in eager.items():
            families.setdefault(name, []).append(deviation(name, value, found[name], wide[name]))
    judged = sum(eager is not found for eager, found, _ in cases)
    return [row for family in families.values() for row in pooled(family)[:judged]]


def _lively(references: list[Values]) -> None:
    """Raise for results that tell nothing: not finite, or the same on every draw."""
    for name, value in references[0].items():
        if not all(torch.isfinite(other[name]).all() for other in references):
            raise Hole(f"{name} is not finite")
        others = [other[name] for other in references[1:] if other[name].shape == value.shape]
        if name.startswith("results") and others and all(torch.equal(value, other) for other in others):
            raise Hole(f"{name} does not depend on the inputs")


def same_bits(wanted: Values, found: Values) -> None:
    if wanted.keys() != found.keys():
        raise Hole(f"not the same tensors: {sorted(wanted.keys() ^ found.keys())}")
    other = [name for name, value in wanted.items() if not bit_equal(value, found[name])]
    if other:
        raise Hole(f"other bits: {', '.join(other[:3])}" + (f" and {len(other) - 3} more" if len(other) > 3 else ""))


# The columns


def compiled(module: nn.Module) -> Callable[..., Any]:
    torch._dynamo.reset()
    reset_stats()
    call: Callable[..., Any] = torch.compile(module, backend="laconic", fullgraph=True, options={"strict": True})
    return call


def inference(subject: Subject) -> dict[str, Any]:
    """Compiled, as one graph, strictly; its results within the tolerance; how much was compiled."""
    call = compiled(subject.mine(False))
    draws = drawn(
        map(subject.draw, count()),
        partial(without_gradients, subject.module),
        in_double(subject.mine(False), without_gradients),
    )
    error = attempt(lambda: hold(draws, partial(without_gradients, call)))
    return {"error": error, "counts": attempt(lambda: counted(subject))}


def training(subject: Subject) -> dict[str, Any]:
    """Gradients of each parameter, compiled, within the tolerance."""
    module, eager = subject.mine(True), subject.mine(True)
    call = compiled(module)
    draws = drawn(
        map(subject.draw, count()),
        partial(gradients, eager, eager),
        in_double(subject.mine(True), lambda mine, given: gradients(mine, mine, given)),
    )
    error = attempt(lambda: hold(draws, partial(gradients, call, module)))
    mode = "training" if module.training else "evaluation"
    return {"error": error, "counts": attempt(lambda: counted(subject)), "mode": mode}


def counted(subject: Subject) -> dict[str, Any]:
    """What the backend says it compiled. Raises if it did not cut the graph, or compiled nearly all of it."""
    done = stats()
    if (done["graphs"], done["rolled"], done["fallbacks"]) != (1, 1, {}):
        raise Hole(f"{done['graphs']} graphs, {done['rolled']} of them cut, fallbacks {done['fallbacks']}")
    (each,) = done["each"]
    expected = sum(expectation(subject).values())
    never = 1 - done["compiled"] / done["nodes"]
    if done["pieces"] >= expected:
        raise Hole(f"{done['pieces']} pieces are not fewer than {expected} repeats")
    if never < NEVER:
        raise Hole(f"only {never:.0%} of the nodes are never compiled")
    return {
        **{name: done[name] for name in ("pieces", "steps", "nodes", "compiled")},
        "never": round(never, 3),
        "repeats": [[count, period] for period, count, _, _ in each["repeats"]],
    }


def expectation(subject: Subject) -> Counter[str]:
    """The layers that stand more than once, by kind, as the configuration says."""
    kinds = Counter(subject.layers.values())
    return Counter({kind: count for kind, count in kinds.items() if count > 1})


def cut(subject: Subject) -> dict[str, Any]:
    """The cut run without any compiler: the bits of the graph that was not cut, with gradients and without; and the
    repeats, against the layers of the configuration."""
    graphs: dict[str, Cut] = {}
    module: dict[str, bool] = {}

    def bits() -> dict[str, Any]:
        for mode in (False, True):
            pieces, whole = EagerPieces(), _Whole()
            modules = [subject.mine(mode) for _ in range(3)]
            calls = [_dynamo(modules[0], pieces), _dynamo(modules[1], whole), modules[2]]
            arguments = subject.draw(0)
            found, wanted, eager = (
                gradients(c, m, arguments) if mode else without_gradients(c, arguments)
                for c, m in zip(calls, modules, strict=True)
            )
            name = "training" if mode else "inference"
            if len(pieces.cuts) != 1:
                raise Hole(f"not cut in {name}: {', '.join(map(str, pieces.refusals))}")
            graphs[name] = pieces.cuts[0]
            same_bits(wanted | dict(modules[1].named_buffers()), found | dict(modules[0].named_buffers()))
            module[name] = _same(eager, found)
        return {"bits": True, "of the module": all(module.values())}

    result = attempt(bits)
    return {"pieces": result, "repeats": attempt(lambda: repeats_found(subject, graphs))}


def repeats_found(subject: Subject, graphs: dict[str, Cut]) -> dict[str, Any]:
    """Layers that are repeats, in the graph of every mode, and those that the configuration promises."""
    wanted = expectation(subject)
    said = {name: layers_said(graph, subject) for name, graph in graphs.items()}
    found = {kind: min(one[kind] for one in said.values()) if said else 0 for kind in wanted}
    missing = [f"{kind}: {found[kind]} of {count}" for kind, count in wanted.items() if found[kind] < count]
    if missing:
        raise Hole("; ".join(missing))
    return {"found": sum(found.values()), "expected": sum(wanted.values()), "layers": len(subject.layers)}


class _Whole:
    """A Dynamo backend that runs a graph as it is."""

    def __call__(self, graph: fx.GraphModule, examples: Any) -> Callable[..., Any]:
        return graph.forward


def _dynamo(module: nn.Module, backend: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    call: Callable[..., Any] = torch.compile(module, backend=backend, fullgraph=True)
    return call


def _same(wanted: Values, found: Values) -> bool:
    return all(bit_equal(value, found[name]) for name, value in wanted.items())


def layers_said(found: Cut, subject: Subject) -> dict[str, int]:
    """How many layers of each kind the repeats say, of those that stand more than once: nearly all nodes of the layer,
    by the modules that Dynamo names, lie in repeats."""
    nodes = [node for step in calls_of_steps(found) for node in step]
    inside = {nodes[p] for repeat in found.repeats for k in range(repeat.count) for p in repeat.positions(k)}
    own: dict[str, list[fx.Node]] = {}
    for node in nodes:
        layer = layer_of(node, subject.layers)
        if layer is not None:
            own.setdefault(layer, []).append(node)
    said: Counter[str] = Counter()
    for kind in expectation(subject):
        members = [mine for layer, mine in own.items() if subject.layers[layer] == kind]
        least = COVERED * min(map(len, members), default=0)  # some layers make what others are given
        said[kind] = sum(sum(node in inside for node in mine) >= least for mine in members)
    return dict(said)


def layer_of(node: fx.Node, layers: Mapping[str, str]) -> str | None:
    """The layer in which a call was made. A layer that is called several times stands there with each call."""
    for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
        path = path.removeprefix("L['self'].")
        for name in (path, f"{path}.{str(key).partition('@')[2] or 0}"):
            if name in layers:
                return name
    return None


def exact(subject: Subject) -> dict[str, Any]:
    """The preset `exact`: the module's bits at two sizes."""
    result = subject.optimized
    if not result.report.verified:
        raise Hole("the result is not verified")
    for seed, size in enumerate(SIZES):
        arguments = subject.draw(seed, size)
        wanted = without_gradients(subject.module, arguments)
        found = without_gradients(result.model, arguments)
        same_bits(dict(enumerate(wanted.values())), dict(enumerate(found.values())))  # type: ignore[arg-type]
    return {"nodes": [result.report.before.nodes, result.report.after.nodes]}


def onnx(subject: Subject) -> dict[str, Any]:
    """The same in ONNX Runtime, at two sizes, within the tolerance."""
    with tempfile.TemporaryDirectory() as folder:
        report = laconic.export_onnx(subject.optimized.program, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    eager = partial(without_gradients, subject.module)

    def judged(arguments: Arguments) -> Values:
        found = session.run(None, {name: arguments[name].numpy() for name in names})
        return {n: torch.from_numpy(value) for n, value in zip(eager(arguments), found, strict=True)}

    arguments = (subject.draw(seed, SIZES[seed % len(SIZES)]) for seed in count())
    draws = drawn(arguments, eager, in_double(subject.mine(False), without_gradients))
    error = attempt(lambda: hold(draws, judged, few=2 * len(SIZES)))
    return {"nodes": report.nodes, "opset": report.opset, "error": error}


CHECKS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "cut": cut,
    "inference": inference,
    "training": training,
    "exact": exact,
    "onnx": onnx,
}
