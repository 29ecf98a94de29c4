"""Ways to compile a module, and what each costs: seconds to the first result, and whether its gradients are right.

Costs are measured in a process of their own (`cost` in a child, `costs` spawns them), with a cache folder of its own:
what another compilation has imported, precompiled or cached would count for nothing.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from laconic.codegen import stats
from laconic.codegen.backend.backend import laconic
from laconic.codegen.backend.inductor import inductor
from laconic.ir.errors import UsageError

#: Gradients are wrong beyond this, relative to the largest of their parameter. Rounding stays far below.
WRONG = 1e-3

Compiled = Callable[..., Any]


@dataclass
class Timed:
    """A backend of torch.compile that adds up the CPU seconds spent in it."""

    backend: Callable[..., Compiled]
    seconds: float = 0.0

    def __call__(self, graph: Any, examples: Any) -> Compiled:
        start = cpu_seconds()
        try:
            return self.backend(graph, examples)
        finally:
            self.seconds += cpu_seconds() - start


def compile_laconic(module: nn.Module) -> tuple[Compiled, Timed]:
    return _timed(module, partial(laconic, options={"strict": True}))


def compile_without_passes(module: nn.Module) -> tuple[Compiled, Timed]:
    return _timed(module, partial(laconic, options={"strict": True, "pipeline": ""}))


def compile_inductor(module: nn.Module) -> tuple[Compiled, Timed]:
    return _timed(module, inductor)


def compile_deduplicated(module: nn.Module) -> tuple[Compiled, Timed]:
    """Inductor with Dynamo's own deduplication of graph regions."""
    torch._dynamo.config.use_graph_deduplication = True
    return _timed(module, inductor)


def compile_regional(module: nn.Module) -> tuple[Compiled, Timed]:
    """Each layer compiled by itself, marked by hand; what is around them stays eager."""
    backend = Timed(inductor)
    for layer in layers(module):
        layer.compile(backend=backend)
    return module, backend


def compile_nested(module: nn.Module) -> tuple[Compiled, Timed]:
    """Inductor, the forward of each class of layers marked by hand as a nested region.

    On the class, as people write it: marked on instances, torch 2.13 takes the weights of the first for all.
    """
    marked: dict[type, type] = {}
    for layer in layers(module):
        kind = type(layer)
        if kind not in marked:
            region = torch.compiler.nested_compile_region(_region(kind.forward))
            marked[kind] = type(kind.__name__, (kind,), {"forward": region})
        layer.__class__ = marked[kind]
    return _timed(module, inductor)


def _region(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, since marking one marks it everywhere."""

    def region(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return region


def _timed(module: nn.Module, backend: Callable[..., Compiled]) -> tuple[Compiled, Timed]:
    timed = Timed(backend)
    return torch.compile(module, backend=timed), timed


#: By the names that `laconic bench --against` takes.
WAYS: dict[str, Callable[[nn.Module], tuple[Compiled, Timed]]] = {
    "compiled": compile_laconic,
    "compiled-without-passes": compile_without_passes,
    "inductor": compile_inductor,
    "inductor-deduplicated": compile_deduplicated,
    "regional": compile_regional,
    "nested-region": compile_nested,
}


def layers(module: nn.Module) -> list[nn.Module]:
    """The layers that one would mark by hand: the elements of lists of modules of one class. Raises UsageError if there
    are none."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    found = [layer for each in lists if len({type(layer) for layer in each}) == 1 for layer in each]
    inside = {id(child) for layer in found for child in layer.modules() if child is not layer}
    outer = [layer for layer in found if id(layer) not in inside]
    if not outer:
        raise UsageError("the model has no list of layers to mark by hand")
    return outer


def cpu_seconds() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def cost(module: nn.Module, call: Callable[[Compiled], Any], way: str, training: bool) -> dict[str, Any]:
    """What compiling costs up to the first result, in this process, once: CPU and wall seconds, those inside the
    backend (in training the backward is compiled outside of it), and in training the largest error of a parameter's
    gradient, relative to the parameter's largest gradient.

    `call` calls a model on its inputs. One eager step and a trivial compilation go before, so that imports and
    precompiled headers do not count.
    """
    with torch.set_grad_enabled(training):
        expected = call(module)
        wanted = _gradients(module, expected) if training else {}
        torch.compile(lambda a: (a * 2).relu().sum(-1))(torch.randn(4, 4))
        cpu, wall = cpu_seconds(), time.perf_counter()
        compiled, backend = WAYS[way](module)
        found = call(compiled)
        gradients = _gradients(module, found) if training else {}
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    result: dict[str, Any] = {"cpu_seconds": cpu, "wall_seconds": wall, "backend_cpu_seconds": backend.seconds}
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    result["output_error"] = max((_error(a, b) for a, b in pairs), default=0.0)
    if wanted:
        worst = max(wanted, key=lambda name: _error(gradients.get(name), wanted[name]))
        result["gradient_error"] = _error(gradients.get(worst), wanted[worst])
        result["gradient_error_at"] = worst
        result["gradients_right"] = result["gradient_error"] < WRONG
    if way.startswith("compiled"):
        result["stats"] = {k: v for k, v in stats().items() if k != "each"}
    return result


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _gradients(module: nn.Module, result: Any) -> dict[str, torch.Tensor]:
    """The gradients of the mean square of all results; those of the parameters are cleared again."""
    losses = [value.float().square().mean() for value in _tensors(result) if value.requires_grad]
    if not losses:
        raise UsageError("no result of the model requires gradients", hint="measure it in inference")
    torch.autograd.backward(torch.stack(losses).sum())
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def _error(found: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value that is wanted."""
    if found is None or not bool(torch.isfinite(found).all()):
        return float("inf")
    largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    different = float((found.detach() - wanted.detach()).abs().max()) if wanted.numel() else 0.0
    return different / largest if largest else different


def spawn(command: list[str], *, cache: str | None = None, caching: bool = False, threads: int = 1) -> dict[str, Any]:
    """Run a command that prints a JSON object as its last line, in an empty cache folder or in `cache`; with
    Inductor's caches off unless `caching`. Raises RuntimeError with what it wrote if it fails."""
    with tempfile.TemporaryDirectory(prefix="laconic-compile-") as empty:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache or empty,
            "TORCHINDUCTOR_FX_GRAPH_CACHE": str(int(caching)),
            "TORCHINDUCTOR_AUTOGRAD_CACHE": str(int(caching)),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def costs(model: str, way: str, threads: int = 1) -> dict[str, Any]:
    """What compiling a MODEL of the command line in one way costs: `inference` and `training`, each a `cost` from a
    process of its own, or {"problem": why there is none}."""
    found: dict[str, Any] = {}
    for mode in ("inference", "training"):
        try:
            found[mode] = spawn([sys.executable, "-W", "ignore", "-m", __name__, model, way, mode], threads=threads)
        except RuntimeError as problem:
            found[mode] = {"problem": str(problem).strip().splitlines()[-1]}
    return found


def child(model: str, way: str, mode: str) -> None:
    from laconic.ir.source_model import Source
    from laconic.sources import resolve

    source = resolve(model)
    assert isinstance(source, Source)
    module, call = source.module.eval(), partial(_call, source)
    print(json.dumps(cost(module, call, way, mode == "training")))


def _call(source: Any, module: Compiled) -> Any:
    return module(*source.args, **source.kwargs)


if __name__ == "__main__":
    child(*sys.argv[1:])
