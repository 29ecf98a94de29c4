"""Faults put into the cut on purpose: each is killed by a check that passes without it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._guards import TracingContext
from torch._inductor.exc import InductorError
from torch.nn import functional as F

import laconic.codegen.backend.ahead as ahead
import laconic.codegen.backend.backend as backend
import laconic.codegen.backend.cut as cutting
import laconic.codegen.backend.driver as driver
import laconic.codegen.backend.out_of_place as out_of_place
import laconic.ir.dynamo as dynamo
from cut_eager import EagerPieces
from helpers import bits
from laconic.codegen.backend.cut import Cut
from laconic.codegen.backend.options import Options
from laconic.ir.dynamo import Refusal

Patch = pytest.MonkeyPatch


Body = Callable[["Blocks", int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Blocks(nn.Module):
    """A block called five times on two carried values; `w` and `v` are weights of each, `m` a buffer of all."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = body
        self.w = nn.ParameterList(torch.randn(8, 8, generator=generator) * 0.5 for _ in range(6))
        self.v = nn.ParameterList(torch.randn(8, generator=generator) for _ in range(6))
        self.register_buffer("m", torch.rand(8, generator=generator))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = F.linear(x, self.w[5]), F.linear(x, self.w[5] * self.v[5])
        for k in range(5):
            x, y = self.body(self, k, x, y)
        return x, y


def plain(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = F.linear(x, s.w[k]).sin()
    return x + h * s.v[k], y * 0.5 + h


# Checks


def called(model: nn.Module, run: Callable[..., Any], grad: bool, sizes: Sequence[int]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for size in sizes:
        torch.manual_seed(size)
        with torch.set_grad_enabled(grad):
            results = run(torch.linspace(-1, 1, size * 8).view(size, 8))
        if grad:
            sum(r.square().sum() for r in results).backward()
        found += [r.detach() for r in results]
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def cut_of(body: Body, grad: bool = True, sizes: Sequence[int] = (3,)) -> tuple[Cut, bool]:
    """The cut of a model, and whether its pieces compute what the model does, bit by bit."""
    torch._dynamo.reset()
    pieces = EagerPieces()
    ours, other = Blocks(body), Blocks(body)
    run = torch.compile(ours, backend=pieces, dynamic=len(sizes) > 1)
    same = bits(called(ours, run, grad, sizes)) == bits(called(other, other, grad, sizes))
    assert pieces.cuts, pieces.refusals
    return pieces.cuts[0], same


def keeps(*bodies: Body, grad: bool = True) -> Callable[[], bool]:
    return lambda: all(cut_of(body, grad)[1] for body in bodies)


def tells_apart(body: Body, pieces: int, prepare: Callable[[Blocks], None] = lambda model: None) -> Callable[[], bool]:
    """Of five blocks the last two differ from the others: there must be as many pieces, and no less."""

    def check() -> bool:
        torch._dynamo.reset()
        eager = EagerPieces()
        model = Blocks(body)
        prepare(model)
        torch.compile(model, backend=eager)(torch.ones(3, 8))
        return len(eager.cuts[0].pieces) == pieces

    return check


def frees_activations() -> bool:
    """An activation of the first block is dead by the third."""
    found, _ = cut_of(plain, grad=False)
    assert len(found.steps) >= 5
    seen: list[weakref.ref[torch.Tensor]] = []
    dead: list[bool] = []

    def watched(piece: Any) -> Callable[[list[Any]], Any]:
        def call(operands: list[Any]) -> Any:
            dead.append(bool(seen) and seen[0]() is None)
            values = tuple(operands)
            operands.clear()
            results = piece.graph(*values)
            seen.append(weakref.ref(results[0]))
            return results

        return call

    inputs = [node for node in found.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        driver.drive(found, [watched(piece) for piece in found.pieces])(
            *(torch.ones(tuple(node.meta["example_value"].shape)) for node in inputs)
        )
    return dead[3]


def compiles(body: Body, grad: bool = True, sizes: Sequence[int] = (3,)) -> Callable[[], bool]:
    """Compiled, a model computes what it does in eager, but for rounding."""

    def check() -> bool:
        torch._dynamo.reset()
        ours, other = Blocks(body), Blocks(body)
        run = torch.compile(ours, backend="laconic", options={"strict": True}, dynamic=len(set(sizes)) > 1)
        found, wanted = called(ours, run, grad, sizes), called(other, other, grad, sizes)
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, wanted, strict=True))

    return check


def compiles_each_in_a_context_of_its_own() -> bool:
    """What AOTAutograd and Inductor note of one graph they do not find when they are given the next; guards go to the
    user's frame."""
    contexts: list[TracingContext] = []

    def noted(graph: fx.GraphModule, *args: Any) -> Callable[..., Any]:
        contexts.append(TracingContext.get())
        return graph.forward

    def dynamo_backend(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        contexts.append(TracingContext.get())
        return backend.compile_dynamo(graph, examples, Options(strict=True))

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "compile_graph", noted)
        torch.compile(Blocks(plain), backend=dynamo_backend)(torch.ones(3, 8))
    guards = {id(context.guards_context) for context in contexts}
    return len(contexts) == 3 and len({id(context) for context in contexts}) == 3 and len(guards) == 1


# Models that faults show on


def _scoped(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=k != 0):
        return plain(s, k, x, y)


@torch.library.custom_op("laconic_test::product", mutates_args=())
def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Rounds under autocast, though its type does not tell."""
    return torch.mm(x, w).float()


@_product.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _scoped_late(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=k > 2):
        h = torch.ops.laconic_test.product(x, s.w[k])
    return x + h * s.v[k], y * 0.5 + h


def _dropped(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = plain(s, k, x, y)
    return F.dropout(x, 0.5), y


def _writing(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = plain(s, k, x * s.m.sin(), y)
    s.m.add_(0.5)
    return x, y


def _made_in_the_first(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = F.linear(x, s.w[k]).sin() + s.m.add_(0.25)
    if k == 0:
        s.made = s.m * 2.0
    return x + h * s.v[k] + s.made, y * 0.5 + h.cos()


def _unrecorded(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = F.linear(x, s.w[k]) * 1.0
    with torch.no_grad():
        h.mul_(0.5)
    return x + h, y * 0.5 + h.sin()


def _viewed(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = F.linear(x, s.w[k]) * 1.0
    first = h[0]
    h.add_(0.5)
    return x + h, y * 0.5 + first


def _strided(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.cat([F.linear(x + y, s.w[k])] * 2, -1)[:, ::2]
    h.add_(0.5)
    return x + h.sin(), h


def _flattened(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = x.reshape(-1, 4), y.reshape(-1, 4)
    h = torch.matmul(x, s.w[k][:4, :4]).relu()
    return x + h, y + h.cos()


def _constant(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return plain(s, k, x * (0.5 if k < 3 else 0.25), y)


def _kind_of_constant(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return plain(s, k, x + (1 if k < 3 else 1.0), y)


def _negative_zero(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return plain(s, k, torch.copysign(x, x.abs() * (0.0 if k < 3 else -0.0)), y)


def _list_or_tuple(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = plain(s, k, x, y)
    x = x * 1.0
    x[[0, 1] if k < 3 else (0, 1)] = 0.25  # type: ignore[index]
    return x, y


def _strides_differ(model: Blocks) -> None:
    for k in (3, 4):
        model.w[k] = nn.Parameter(model.w[k].detach().t().contiguous().t())


def _frozen(model: Blocks) -> None:
    for k in (3, 4):
        model.w[k].requires_grad_(False)


def _doubles(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = F.linear(x * s.v[k].to(x.dtype), s.w[k]).sin()
    return x + h, y * 0.5 + h


def _wide(model: Blocks) -> None:
    for k in range(5):
        model.v[k] = nn.Parameter(model.v[k].detach().to(torch.float64 if k < 3 else torch.bfloat16))


def _two_rows(s: Blocks, k: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return plain(s, k, torch.addcmul(s.v[k], x, s.w[k][0]), y)


def _one_memory(model: Blocks) -> None:
    for k in (3, 4):
        both = torch.rand(72)
        model.w[k] = nn.Parameter(both[:64].view(8, 8))
        model.v[k] = nn.Parameter(both[64:])


# Faults


def _after_cutting(patch: Patch, spoil: Callable[[Cut, list[int]], None]) -> None:
    """Spoil a cut, given the numbers of the steps that repeat a piece."""
    original = backend.cut

    def faulty(*args: Any) -> Cut | Refusal:
        found = original(*args)
        assert isinstance(found, Cut), found
        times = [step.piece for step in found.steps]
        spoil(found, [k for k, piece in enumerate(times) if times.count(piece) > 2])
        return found

    patch.setattr(backend, "cut", faulty)


def _weights(found: Cut, step: int) -> list[int]:
    return [k for k, node in enumerate(found.steps[step].operands) if node.op == "placeholder"]


def _rebound(found: Cut, step: int, slot: int, node: fx.Node) -> None:
    operands = list(found.steps[step].operands)
    operands[slot] = node
    found.steps[step] = replace(found.steps[step], operands=tuple(operands))


def slots_of_two_repeats_swapped(patch: Patch) -> None:
    def spoil(found: Cut, repeats: list[int]) -> None:
        a, b = repeats[:2]
        slot = _weights(found, a)[0]
        first, second = found.steps[a].operands[slot], found.steps[b].operands[slot]
        _rebound(found, a, slot, second)
        _rebound(found, b, slot, first)

    _after_cutting(patch, spoil)


def weight_of_another_repeat(patch: Patch) -> None:
    def spoil(found: Cut, repeats: list[int]) -> None:
        slot = _weights(found, repeats[0])[-1]
        _rebound(found, repeats[1], slot, found.steps[repeats[0]].operands[slot])

    _after_cutting(patch, spoil)


def last_repeat_skipped(patch: Patch) -> None:
    def spoil(found: Cut, repeats: list[int]) -> None:
        last, before = found.steps.pop(repeats[-1]), found.steps[repeats[-2]]
        used = tuple(b if b is not None else a for a, b in zip(last.results, before.results, strict=True))
        instead = {a: b for a, b in zip(last.results, used, strict=True) if a is not None}
        found.steps[repeats[-2]] = replace(before, results=used)
        for k, step in enumerate(found.steps):
            found.steps[k] = replace(step, operands=tuple(instead.get(n, n) for n in step.operands))
        output = found.graph.output_node()
        output.args = fx.node.map_arg(output.args, lambda n: instead.get(n) or n)

    _after_cutting(patch, spoil)


def outputs_swapped(patch: Patch) -> None:
    def spoil(found: Cut, repeats: list[int]) -> None:
        step = found.steps[repeats[1]]
        assert len(step.results) > 1
        found.steps[repeats[1]] = replace(step, results=step.results[::-1])

    _after_cutting(patch, spoil)


def driver_keeps_activations(patch: Patch) -> None:
    patch.setattr(driver, "_last_uses", lambda cut: {n: len(cut.steps) for step in cut.steps for n in step.operands})


def _skeleton(constant: Callable[[Any], Hashable]) -> Callable[[Any, Any], Hashable]:
    def skeleton(argument: Any, leaf: Callable[[fx.Node], Hashable]) -> Hashable:
        if isinstance(argument, fx.Node):
            return leaf(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(skeleton(a, leaf) for a in argument)
        if isinstance(argument, dict):
            return tuple((k, skeleton(a, leaf)) for k, a in argument.items())
        return constant(argument)

    return skeleton


def constants_left_out(patch: Patch) -> None:
    patch.setattr(dynamo, "skeleton", _skeleton(lambda value: None))


def constants_compared_by_value(patch: Patch) -> None:
    patch.setattr(dynamo, "skeleton", _skeleton(lambda value: repr(value) if isinstance(value, slice) else value))


def lists_taken_for_tuples(patch: Patch) -> None:
    patch.setattr(dynamo, "_lists", lambda index: None)


def _layout_without(patch: Patch, what: slice) -> None:
    original = dynamo.layout

    def layout(value: Any) -> Hashable:
        found = original(value)
        if not isinstance(value, torch.Tensor):
            return found
        assert isinstance(found, tuple)
        return tuple(part for k, part in enumerate(found) if k not in range(*what.indices(len(found))))

    patch.setattr(dynamo, "layout", layout)


def strides_left_out(patch: Patch) -> None:
    original = dynamo.layout
    patch.setattr(
        dynamo, "layout", lambda v: original(v)[: 2 + v.dim()] if isinstance(v, torch.Tensor) else original(v)
    )  # type: ignore[index]


def dtypes_left_out(patch: Patch) -> None:
    _layout_without(patch, slice(0, 1))


def requires_grad_left_out(patch: Patch) -> None:
    original = dynamo.seen
    patch.setattr(dynamo, "seen", lambda value, grad: original(value, False))


def sharing_left_out(patch: Patch) -> None:
    patch.setattr(dynamo, "sharing", lambda values: ())


def scopes_not_entered(patch: Patch) -> None:
    patch.setattr(cutting._Scopes, "change", lambda self, wanted: None)


def scopes_left_out(patch: Patch) -> None:
    patch.setattr(dynamo.Scope, "__hash__", lambda self: 0)
    patch.setattr(dynamo.Scope, "__eq__", lambda self, other: True)


def outer_context_reused(patch: Patch) -> None:
    patch.setattr(backend, "fresh_context", lambda examples: contextlib.nullcontext())


def one_seed_for_all_repeats(patch: Patch) -> None:
    original = driver.write_driver

    def write(cut: Cut) -> tuple[str, dict[str, Any]]:
        source, constants = original(cut)
        return source.replace("    a = [", "    manual_seed(1)\n    a = ["), constants | {
            "manual_seed": torch.manual_seed
        }

    patch.setattr(driver, "write_driver", write)


def write_moved_past_a_read(patch: Patch) -> None:
    original = backend.parts_beside_their_tuple

    def faulty(graph: fx.Graph) -> None:
        original(graph)
        write = next(node for node in graph.nodes if node.target == "add_")
        read = next(node for node in graph.nodes if node > write and write.args[0] in node.all_input_nodes)
        read.append(write)

    patch.setattr(backend, "parts_beside_their_tuple", faulty)


def calls_moved_ahead_of_a_write(patch: Patch) -> None:
    patch.setattr(ahead, "written", lambda node: [])


def written_where_nothing_is_recorded(patch: Patch) -> None:
    patch.setattr(out_of_place, "scope_behind", lambda node, now: now)


def views_of_what_is_written_forgotten(patch: Patch) -> None:
    patch.setattr(out_of_place, "_unseen", lambda *args: True)


def strides_of_what_is_written_forgotten(patch: Patch) -> None:
    patch.setattr(out_of_place, "layout", lambda value: tuple(value.shape))


def buffers_read_as_they_are(patch: Patch) -> None:
    patch.setattr(backend, "read_through_copies", lambda graph: 0)


def sizes_left_unnamed(patch: Patch) -> None:
    patch.setattr(cutting, "_unnamed", lambda slots, calls: [])


def killed(check: Callable[[], bool]) -> bool:
    """A check that fails kills, and so does what is in its way: an assertion, here or in what Inductor writes, and
    autograd's word on what was written. Any other error says that the fault is none."""
    try:
        return not check()
    except (AssertionError, InductorError):
        return True
    except RuntimeError as problem:
        if "modified by an inplace operation" not in str(problem):
            raise
        return True


CHECKS: dict[Callable[[Patch], None], Callable[[], bool]] = {
    slots_of_two_repeats_swapped: keeps(plain),
    weight_of_another_repeat: keeps(plain),
    last_repeat_skipped: keeps(plain),
    outputs_swapped: keeps(plain),
    driver_keeps_activations: frees_activations,
    constants_left_out: keeps(_constant),
    constants_compared_by_value: tells_apart(_kind_of_constant, 3),
    lists_taken_for_tuples: keeps(_list_or_tuple),
    strides_left_out: tells_apart(plain, 3, _strides_differ),
    dtypes_left_out: tells_apart(_doubles, 3, _wide),
    requires_grad_left_out: tells_apart(plain, 3, _frozen),
    sharing_left_out: tells_apart(_two_rows, 3, _one_memory),
    scopes_not_entered: keeps(_scoped),
    scopes_left_out: keeps(_scoped_late, grad=False),
    outer_context_reused: compiles_each_in_a_context_of_its_own,
    one_seed_for_all_repeats: keeps(_dropped),
    write_moved_past_a_read: keeps(_writing, grad=False),
    calls_moved_ahead_of_a_write: keeps(_made_in_the_first, grad=False),
    written_where_nothing_is_recorded: keeps(_unrecorded),
    views_of_what_is_written_forgotten: keeps(_viewed),
    strides_of_what_is_written_forgotten: keeps(_strided),
    buffers_read_as_they_are: compiles(_writing),
    sizes_left_unnamed: compiles(_flattened, sizes=(4, 6)),
}


@pytest.mark.parametrize("fault", CHECKS, ids=lambda f: f.__name__)
def test_kills(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    assert killed(CHECKS[fault]), f"{fault.__name__} survives"


@pytest.mark.parametrize("fault", CHECKS, ids=lambda f: f.__name__)
def test_no_fault_no_kill(fault: Callable[[Patch], None]) -> None:
    assert CHECKS[fault]()
