"""Faults put into the passes on purpose: each must be killed, by the manager or by a result that differs.

A fault is tried on random modules first, then on the small programs planted for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch

import laconic.passes.constants as constants
import laconic.passes.cse as cse
import laconic.passes.dce as dce
import laconic.passes.dedup as dedup
import laconic.passes.simplify as simplify
from helpers import apart, bits, own_values, parse, tensors_in
from laconic.ir import rewrite
from laconic.ir.alias import Aliasing
from laconic.ir.calibration import Calibration
from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError, VerificationError
from laconic.ir.inputs import draw
from laconic.ir.parse import parse_program
from laconic.ir.program import Kind, Program, Role
from laconic.ir.run import Runnable
from laconic.ir.traits import Traits, op_name
from laconic.passes.base import Plan
from laconic.passes.manager import PassManager
from laconic.passes.pipeline import parse_pipeline
from random_modules import random_module

Fault = Callable[[pytest.MonkeyPatch], None]
SEEDS = range(32)


@pytest.fixture(scope="module")
def captured() -> list[Program]:
    found = []
    for seed in SEEDS:
        module, inputs, dynamic = random_module(seed)
        try:
            found.append(capture_module(module, inputs, {}, dynamic, check=False))
        except UnsupportedError:
            continue
    return found


# cse


def _signature(skeleton: Callable[[Any, Any], Hashable], kwargs: bool = True) -> Callable[[Any, Any], Hashable]:
    def key(node: Any, leaf: Any) -> Hashable:
        return (op_name(node.target), skeleton(node.args, leaf), skeleton(node.kwargs, leaf) if kwargs else ())

    return key


def _by_value(argument: Any, leaf: Any) -> Hashable:
    if isinstance(argument, torch.fx.Node):
        return ("node", leaf(argument))
    if isinstance(argument, (list, tuple)):
        return tuple(_by_value(a, leaf) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _by_value(v, leaf)) for k, v in argument.items())
    return argument  # type: ignore[no-any-return]


def _nodes_only(argument: Any, leaf: Any) -> Hashable:
    found: list[Hashable] = []
    torch.fx.node.map_arg(argument, lambda n: found.append(leaf(n)))
    return tuple(found)


def cse_compares_constants_by_value(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cse, "signature", _signature(_by_value))


def cse_ignores_keywords(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cse, "signature", _signature(_by_value, kwargs=False))


def cse_ignores_constants(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cse, "signature", _signature(_nodes_only))


def cse_merges_random_draws(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cse, "traits", lambda node: Traits())


def cse_merges_two_results(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cse.Aliasing, "may_replace", lambda self, old, new: True)


def cse_merges_copies_as_if_views(patch: pytest.MonkeyPatch) -> None:
    def may_replace(self: Aliasing, old: Any, new: Any) -> bool:
        root = cse.Aliasing._root
        return old not in self._escaping or root(self, old, surely=False) is root(self, new, surely=False)

    patch.setattr(cse.Aliasing, "may_replace", may_replace)


# simplify


def simplify_removes_plus_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simplify, "_NEUTRAL", simplify._NEUTRAL_INTEGER)


def simplify_removes_returned_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simplify.Aliasing, "may_replace", lambda self, old, new: True)


def simplify_forgets_what_it_replaced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simplify.Aliasing, "replaced", lambda self, old, new: None)


def simplify_ignores_offsets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simplify, "_same_bytes", lambda a, b: True)


def simplify_ignores_strides(patch: pytest.MonkeyPatch) -> None:
    def same(a: Any, b: Any) -> bool:
        x, y = a.meta["val"], b.meta["val"]
        both = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        return both and x.dtype == y.dtype and [str(n) for n in x.shape] == [str(n) for n in y.shape]

    patch.setattr(simplify, "_identical", same)


def simplify_ignores_dtypes(patch: pytest.MonkeyPatch) -> None:
    def same(a: Any, b: Any) -> bool:
        x, y = a.meta["val"], b.meta["val"]
        both = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        return both and [str(n) for n in x.shape] == [str(n) for n in y.shape]

    patch.setattr(simplify, "_identical", same)


def simplify_folds_states(patch: pytest.MonkeyPatch) -> None:
    original = constants.Constants._is_constant

    def is_constant(self: Any, node: Any, read_weights: bool) -> bool:
        return original(self, node, read_weights) or (node.op == "placeholder" and node.meta["kind"] is Kind.STATE)

    patch.setattr(constants.Constants, "_is_constant", is_constant)


def simplify_folds_random_draws(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "traits", lambda node: Traits())


def simplify_folds_what_is_returned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants.Aliasing, "escapes", lambda self, node: False)


def simplify_folds_symbolic_sizes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "_fixed", lambda value: True)


# dce


def dce_removes_random_draws(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rewrite, "traits", lambda node: Traits())


def dce_removes_an_update(patch: pytest.MonkeyPatch) -> None:
    original = dce.Dce.rewrite

    def faulty(self: Any, program: Program, plan: Plan) -> None:
        original(self, program, plan)
        entry = program.forward
        rows = entry.weight_nodes()
        pairs = zip(entry.outputs, entry.output_values, strict=True)
        values = [rows.get(o.name, v) if o.role is Role.UPDATE else v for o, v in pairs]
        entry.output_node.args = (tuple(values),)

    patch.setattr(dce.Dce, "rewrite", faulty)


def dce_forgets_names(patch: pytest.MonkeyPatch) -> None:
    def drop(program: Program, gone: Any) -> None:
        rewrite.drop_weights(program, gone)
        for name in gone:
            del program.aliases[name]

    patch.setattr(dce, "drop_weights", drop)


class _NoState:
    STATE = None


def dce_removes_states(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dce, "Kind", _NoState)


# dedup


def dedup_compares_values(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dedup, "bit_equal", lambda a, b: a.shape == b.shape and bool((a == b).all()))
    patch.setattr(dedup, "content_key", lambda t: repr((t.detach() + 0.0).tolist()).encode())


def dedup_rounds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dedup, "bit_equal", lambda a, b: a.shape == b.shape and torch.allclose(a, b))
    patch.setattr(dedup, "content_key", lambda t: repr((t.detach().float() * 1000).round().tolist()).encode())


def dedup_ignores_who_is_trained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dedup, "_treated_alike", lambda weight: weight.value.dtype)


def dedup_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = dedup.Dedup.plan

    def plan(self: Any, program: Program, calibration: Calibration | None = None) -> Plan:
        made = original(self, program)
        moved = tuple({**a, "rows": [r + 1 for r in a["rows"]]} if "rows" in a else a for a in made.actions)
        return Plan(made.spec, moved, made.tensors, made.reason)

    patch.setattr(dedup.Dedup, "plan", plan)


def dedup_probes_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dedup, "bit_equal", lambda a, b: True)


def dedup_merges_states(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dedup, "Kind", type("Kinds", (), {"STATE": None, "PARAMETER": Kind.PARAMETER}))


def dedup_merges_returned_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dedup, "exposed", lambda program: set())


# What only a planted program shows

_TWO_CONSTANTS = """
entry forward {
  input %x: f32[2, 3] in [-1.0, 1.0]
  argument x = %x
  %i: i64[2, 3] = aten._to_copy(%x, dtype=i64)
  %a: i64[2, 3] = aten.add.Tensor(%i, 1)
  %b: f32[2, 3] = aten.add.Tensor(%i, 1.0)
  %c: f32[2, 3] = aten.div.Tensor(%b, %a)
  %p: f32[2, 3] = aten.mul.Tensor(%x, 0.0)
  %q: f32[2, 3] = aten.mul.Tensor(%x, -0.0)
  %r: f32[2, 2, 3] = aten.stack([%p, %q])
  %s: f32[2, 3] = aten.add.Tensor(%x, %c, alpha=2)
  %t: f32[2, 3] = aten.add.Tensor(%x, %c)
  %u: f32[2, 3] = aten.mul.Tensor(%s, %t)
  %v: f32[2, 3] = aten.relu(%x)
  %w: f32[2, 3] = aten.neg(%v)
  %y: f32[2, 3] = aten.add.Tensor(%w, 0)
  %z: f32[2, 2, 3] = aten.stack([%y, %u])
  return (%r, %z)
}"""
_ROWS = """
parameter @table: f32[96, 24]
parameter @part: f32[64, 24]
entry forward {
  input %x: f32[2, 24] in [-1.0, 1.0]
  argument x = %x
  %p: f32[2, 96] = aten.linear(%x, @table)
  %q: f32[2, 64] = aten.linear(%x, @part)
  return (%p, %q)
}"""
_STATES = """
state @s: f32[4]
state @t: f32[4]
state @unused: f32[4]
buffer @w: f32[2]
buffer @v: f32[2]
entry forward {
  input %x: f32[4] in [-1.0, 1.0]
  argument x = %x
  %e: f32[4] = aten.exp(@s)
  %p: f32[4] = aten.add.Tensor(%x, %e)
  %q: f32[4] = aten.add.Tensor(%x, @t)
  update @s = %p
  update @t = %q
  return (%q, @w, @v)
}"""
_VIEWS = """
entry forward {
  input %x: f32[3, 3] in [-1.0, 1.0]
  argument x = %x
  %r: f32[1, 3] = aten.slice.Tensor(%x, 0, 0, 1)
  %n: f32[1, 3] = aten.as_strided(%r, [1, 3], [3, 1], 3)
  %t: f32[3, 3]{1, 3} = aten.permute(%x, [1, 0])
  %c: f32[3, 3] = aten.clone(%t, memory_format=contiguous_format)
  %y: f32[3, 3] = aten.add.Tensor(%x, %c)
  %z: f32[3, 3] = aten.mul.Tensor(%y, %n)
  %f: f32[9] = aten.reshape(%t, [9])
  %g: f32[9] = aten.reshape(%t, [9])
  return (%z, %f, %g)
}"""
_SIZES = """
size batch in [1, inf] like 3
entry forward {
  input %x: f32[batch, 3] in [-1.0, 1.0]
  argument x = %x
  %n: int(batch) = aten.sym_size.int(%x, 0)
  %a: i64[batch] = aten.arange(%n)
  %b: i64[batch, 1] = aten.unsqueeze(%a, 1)
  %k: f32[3] = aten.full([3], 0.5)
  %l: f32[3] = aten.rand([3])
  %z: f32[batch, 3] = aten.add.Tensor(%x, %b)
  return (%z, %k, %l)
}"""


def planted() -> list[Program]:
    numbers = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
    part = numbers[16:80].clone()
    near = part.clone()
    near[33, 11] += 1e-6
    one, two = torch.ones(2), torch.ones(2)
    zero = torch.zeros(4)
    return [
        parse(_TWO_CONSTANTS),
        parse(_ROWS, table=numbers, part=part),
        parse(_ROWS, table=numbers, part=near),
        parse(_STATES, s=zero, t=zero.clone(), unused=zero.clone(), w=one, v=two),
        parse(_VIEWS),
        parse(_SIZES),
    ]


def seen(program: Program) -> Any:
    """Results on two inputs, and what a write into each result does to all others."""
    entry, found = program.forward, []
    model = Runnable(apart(program))
    for seed in range(2):
        inputs = draw(program, entry, {}, seed).inputs
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results = model(*inputs)
            found.append(bits((results, inputs, torch.get_rng_state())))
            for tensor in tensors_in(results):
                if tensor.is_floating_point() and all(s > 0 for s in tensor.stride()):
                    tensor.add_(1)
                    found.append(bits((results, inputs)))
    return found


def killed(program: Program) -> bool:
    mine = parse_program(str(program), own_values(program))
    mine.examples = program.examples
    try:
        done = PassManager(parse_pipeline("exact")).run(mine).program
    except VerificationError:
        return True
    return bool(seen(done) != seen(program))


FAULTS: list[Fault] = [
    cse_compares_constants_by_value,
    cse_ignores_keywords,
    cse_ignores_constants,
    cse_merges_random_draws,
    cse_merges_two_results,
    cse_merges_copies_as_if_views,
    simplify_removes_plus_zero,
    simplify_removes_returned_copies,
    simplify_forgets_what_it_replaced,
    simplify_ignores_offsets,
    simplify_ignores_strides,
    simplify_ignores_dtypes,
    simplify_folds_states,
    simplify_folds_random_draws,
    simplify_folds_what_is_returned,
    simplify_folds_symbolic_sizes,
    dce_removes_random_draws,
    dce_removes_an_update,
    dce_forgets_names,
    dce_removes_states,
    dedup_compares_values,
    dedup_rounds,
    dedup_ignores_who_is_trained,
    dedup_is_off_by_one,
    dedup_probes_only,
    dedup_merges_states,
    dedup_merges_returned_weights,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_kills(fault: Fault, captured: list[Program], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    position = next((k for k, p in enumerate([*captured, *planted()]) if killed(p)), None)
    assert position is not None, f"{fault.__name__} survives"


def test_no_fault_no_kill(captured: list[Program]) -> None:
    assert not [k for k, program in enumerate([*captured, *planted()]) if killed(program)]
