"""Outlining and inlining: real models come back as they were, and damage to an outlined text is found where it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import laconic
from architectures import ARCHITECTURES, EIGHT, make
from helpers import bits, own_values, parse
from laconic.ir.errors import ParseError, VerificationError
from laconic.ir.outline import inline, outline
from laconic.ir.parse import parse_program
from laconic.ir.program import Program
from laconic.ir.run import Runnable
from laconic.ir.signature import fingerprint
from laconic.ir.verify import verify
from laconic.models import zoo

OUTLINED = """\
laconic program 1

size n in [1, inf] like 3
parameter @h.0.w: f32[4, 4]
parameter @h.1.w: f32[4, 4]
parameter @h.2.w: f32[4, 4]

function block_0 {
  slot %x: f32[n, 4]
  slot %h_w: f32[4, 4]
  %linear_0: f32[n, 4] = aten.linear(%x, %h_w) !0
  %relu_1: f32[n, 4] = aten.relu(%linear_0) !1
  %add_2: f32[n, 4] = aten.add.Tensor(%x, %relu_1) !2
  return (%relu_1, %add_2)
}

entry forward {
  input %x: f32[n, 4] in [-1.0, 1.0]
  argument x = %x
  %relu_1: f32[n, 4], %add_2: f32[n, 4] = call block_0(%x, @h.0.w) !+0
  %relu_4: f32[n, 4], %add_5: f32[n, 4] = call block_0(%add_2, @h.1.w) !+3
  %r: f32[n, 4], %s: f32[n, 4] = call block_0(%add_5, @h.2.w) as [%l !6, %r !9, %s]
  return (%s, %relu_1, %relu_4, %r)
}

site 0..9 = "" "net.py:1"
"""


class Blocks(nn.Module):
    """Residual blocks with dropout that stays on, so that the order of random draws counts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = torch.nn.functional.dropout(layer(x).relu(), 0.5, training=True)
            x = (x + h).tanh() * 0.5 + x.mean(-1, keepdim=True)
        return x


def reread(program: Program, tensors: Program) -> Program:
    again = parse_program(str(program), own_values(tensors))
    verify(again)
    return again


def test_an_outlined_text_is_read_as_it_was_written() -> None:
    program = parse(OUTLINED.removeprefix("laconic program 1"))
    assert str(program) == OUTLINED
    assert list(program.functions) == ["block_0"]


def test_calls_stand_for_the_nodes_of_the_function() -> None:
    flat = inline(parse(OUTLINED.removeprefix("laconic program 1")))
    verify(flat)
    assert not flat.functions
    named = [(node.name, node.meta.get("site")) for node in flat.forward.calls()]
    assert named == [
        ("linear_0", 0), ("relu_1", 1), ("add_2", 2),
        ("linear_3", 3), ("relu_4", 4), ("add_5", 5),
        ("l", 6), ("r", 9), ("s", None),
    ]  # fmt: skip
    w, x = [flat.weights[f"h.{k}.w"].value for k in range(3)], torch.randn(5, 4)
    relus, value = [], x
    for weight in w:
        relus.append((value @ weight.T).relu())
        value = value + relus[-1]
    for found, wanted in zip(Runnable(flat)(x), [value, *relus], strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_pays_becomes_a_function_and_comes_back() -> None:
    module = Blocks(5)
    program = laconic.capture(module, torch.randn(3, 4), dynamic_shapes=({0: torch.export.Dim("batch")},))
    outlined = outline(program)
    assert len(outlined.functions) == 1
    assert len(str(outlined)) < len(str(program))
    assert str(inline(outlined)) == str(program)
    again = inline(reread(outlined, program))
    assert str(again) == str(program)
    x = torch.randn(6, 4)

    def drawn(model: Any) -> Any:
        torch.manual_seed(3)
        return bits((model(x), torch.get_rng_state()))

    with torch.no_grad():
        assert drawn(Runnable(program)) == drawn(Runnable(again)) == drawn(module)


def test_a_program_that_says_nothing_twice_is_left_alone() -> None:
    program = laconic.capture(Blocks(1), torch.randn(3, 4))
    assert outline(program) is program
    assert inline(program) is program


def test_a_literal_that_differs_keeps_blocks_apart() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for k in range(6):
                x = ((x + k).relu().tanh() - x).sigmoid() * x
            return x

    program = laconic.capture(Scaled(), torch.randn(3, 4))
    flat = [n for n in program.forward.calls() if n.args[1:] and n.args[1] in range(6)]
    assert len(flat) == 6
    bodies = [n.args for f in outline(program, lambda r: True).functions.values() for n in f.calls()]
    assert not any(args[1:] and args[1] in range(6) for args in bodies)


def real(name: str) -> tuple[Program, dict[str, torch.Tensor]]:
    """A model as captured, and the tensors of its example call."""
    if name == "demo":
        source = zoo.load("minilm")
        axes, inputs = source.dynamic_shapes, source.kwargs
        return laconic.capture(source.module, *source.args, dynamic_shapes=axes, **inputs), inputs
    module, inputs, axes = make(name, EIGHT if name in EIGHT else ARCHITECTURES)
    program = laconic.capture(module, dynamic_shapes=axes, **inputs)
    return program, {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}


FAST = ["resnet"]


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(EIGHT.keys() - FAST))]
)
def test_real_models_come_back_as_they_were(name: str) -> None:
    captured, inputs = real(name)
    for program in (captured, laconic.optimize(captured).program):
        flat = reread(program, program)
        assert str(flat) == str(program)
        assert fingerprint(flat) == fingerprint(program)
        outlined = outline(program, lambda repeat: True)
        assert outlined.functions
        assert str(outlined) == str(reread(outlined, program))
        assert str(inline(outlined)) == str(program)
        again = inline(reread(outlined, program))
        expected = bits(Runnable(program)(**inputs))
        assert bits(Runnable(flat)(**inputs)) == expected
        assert bits(Runnable(again)(**inputs)) == expected


_DAMAGE: dict[str, tuple[str, str, str]] = {
    "function": ("call block_0(%x", "call block_1(%x", "no function of this name"),
    "operands": ("(%x, @h.0.w)", "(%x)", "takes 2 values"),
    "type": ("(%x, @h.0.w)", "(@h.0.w, @h.0.w)", "slot %x is f32[n, 4], not f32[4, 4]"),
    "results": ("%relu_4: f32[n, 4], %add_5: f32[n, 4] = call", "%relu_4: f32[n, 4] = call", "gives 2 values, not 1"),
    "result type": ("%relu_4: f32[n, 4], %add_5", "%relu_4: f32[4, n], %add_5", "declared f32[4, n]"),
    "result name": ("%relu_4: f32[n, 4], %add_5", "%relu_7: f32[n, 4], %add_5", "are called %relu_4, %add_5"),
    "shift": ("!+3", "!+0", "are called %relu_1, %add_2"),
    "hidden name": ("[%l !6", "[%linear_0 !6", "stands for two nodes"),
    "too few names": ("[%l !6, %r !9, %s]", "[%r !9, %s]", "the function has 3 nodes, not 2"),
    "bad name": ("[%l !6", "[%is !6", "may not be used as a name"),
    "several of an op": ("%relu_1: f32[n, 4] = aten", "%relu_1: f32[n, 4], %q: f32[n, 4] = aten", "expected '='"),
    "slot": ("slot %h_w: f32[4, 4]", "slot %h_w: (f32[4, 4], f32[4])", "a slot is a tensor or a whole number"),
    "row inside": ("aten.linear(%x, %h_w)", "aten.linear(%x, @h.0.w)", "'h.0.w' is not declared"),
    "returns a slot": ("return (%relu_1, %add_2)", "return (%relu_1, %x)", "a tuple of what it computes"),
    "returns twice": ("return (%relu_1, %add_2)", "return (%relu_1, %relu_1)", "each once"),
    "call inside": ("aten.relu(%linear_0) !1", "call block_0(%linear_0, %h_w) !+0", "no loaded library"),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_damage_is_named_at_its_line(damage: str) -> None:
    old, new, said = _DAMAGE[damage]
    assert OUTLINED.count(old) == 1
    text = OUTLINED.replace(old, new)
    with pytest.raises(ParseError) as caught:
        parse_program(text, own_values(parse(OUTLINED.removeprefix("laconic program 1"))), "here")
    assert said in str(caught.value)
    line = OUTLINED[: OUTLINED.index(old)].count("\n") + 1
    assert abs(caught.value.line - line) <= (1 if damage == "slot" else 0), str(caught.value)


def test_one_character_of_damage_is_refused_with_line_and_column_or_harmless() -> None:
    """Each replacement of one character is refused at a place, or gives a program whose text says just that."""
    values = own_values(parse(OUTLINED.removeprefix("laconic program 1")))
    draw = random.Random(5)
    refused: list[ParseError] = []
    for at in range(OUTLINED.index("function"), len(OUTLINED) - 1, 2):
        text = OUTLINED[:at] + draw.choice("x%@!7(,{ =") + OUTLINED[at + 1 :]
        try:
            program = parse_program(text, values, "here")
        except ParseError as problem:
            refused.append(problem)
        else:
            again = parse_program(str(program), values)
            assert str(again) == str(program), text
    assert len(refused) > 250
    assert all(problem.line >= 1 and problem.column >= 1 for problem in refused)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p, call: setattr(call, "args", call.args[:1]), "has 1 values for 2"),
        (lambda p, call: setattr(call, "args", (call.args[1], call.args[1])), "is given another type"),
        (lambda p, call: call.meta.update(labels=call.meta["labels"][:1]), "names 1 nodes"),
        (lambda p, call: p.functions.clear(), "there is no function 'block_0'"),
        (
            lambda p, call: next(n for n in p.functions["block_0"].calls()).meta.update(val=p.fake(_F64)),
            "is recorded as",
        ),
    ],
)
def test_the_verifier_holds_calls_to_their_function(damage: Callable[[Program, Any], Any], said: str) -> None:
    program = parse(OUTLINED.removeprefix("laconic program 1"))
    call = next(n for n in program.forward.graph.nodes if n.op == "call_module")
    damage(program, call)
    with pytest.raises(VerificationError, match=said):
        verify(program)


_F64 = laconic.ir.types.TensorType(torch.float64, (2,), (1,))
