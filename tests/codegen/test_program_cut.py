"""A Program cut as its text is: run without a compiler, it has the bits of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import laconic
from architectures import ARCHITECTURES, make
from block_programs import BLOCKS, FLAT, operands
from helpers import bits, parse
from laconic.codegen.backend.driver import drive
from laconic.codegen.backend.program_cut import ProgramCut, cut_program
from laconic.ir.dynamo import Refusal
from laconic.ir.inputs import cases
from laconic.ir.outline import outline
from laconic.ir.program import Program


def piecewise(program: Program) -> tuple[ProgramCut, Callable[..., tuple[Any, ...]]]:
    """The cut of `forward`, and its pieces called as they are by the driver."""
    found = cut_program(program, "forward")
    assert isinstance(found, ProgramCut), found

    def eager(graph: torch.fx.GraphModule) -> Any:
        return lambda operands: graph(*operands)

    return found, drive(found, [eager(piece.graph) for piece in found.pieces])


def test_a_flat_and_an_outlined_program_are_cut_alike_to_the_same_bits() -> None:
    flat = parse(FLAT)
    x = torch.randn(5, 8)
    for program in (flat, outline(flat)):
        found, run = piecewise(program)
        (period, count) = (found.repeats[0].period, found.repeats[0].count)
        assert (period * count, found.nodes, len(found.pieces), len(found.steps)) == (12, 13, 2, 4)
        wanted = laconic.ir.run.evaluate(flat, flat.forward, [x])
        assert bits(list(run(*operands(flat, {"x": x}), *[5] * len(found.sizes)))) == bits(wanted.results)


def test_blocks_that_differ_are_not_shared() -> None:
    flat = parse(FLAT.replace("sin(%r1)", "cos(%r1)"))
    found, run = piecewise(flat)
    x = torch.randn(2, 8)
    wanted = laconic.ir.run.evaluate(flat, flat.forward, [x])
    assert bits(list(run(*operands(flat, {"x": x}), 2))) == bits(wanted.results)
    assert (len(found.pieces), found.compiled) == (1, 13)  # too little is repeated


def test_a_number_that_is_not_whole_is_computed_where_it_is_used() -> None:
    """It does not cross between pieces; one of fixed value is written as such."""
    body = [
        "%n0: int(n) = aten.sym_size.int(%x, 0)",
        "%k0: int(8) = aten.sym_size.int(%x, 1)",
        "%f0: float(?) = torch.sym_float(%n0)",
        "%h0: float(?) = operator.truediv(2.0, %f0)",
        "%b0: f32[n, 8] = aten.mul.Tensor(%x, %h0)",
    ]
    last = "%b0"
    for k in range(3):
        body += [
            f"%l{k}: f32[n, 8] = aten.linear({last}, @w{k})",
            f"%r{k}: f32[n, 8] = aten.relu(%l{k})",
            f"%s{k}: f32[n, 8] = aten.sin(%r{k})",
            f"%t{k}: f32[n, 8] = aten.tanh(%s{k})",
            f"%v{k}: f32[n, 8] = aten.reshape(%t{k}, [%n0, %k0])",
        ]
        last = f"%v{k}"
    body += ["%e: f32[n, 8] = aten.mul.Tensor(%v2, %h0)", "return (%e, %n0)"]
    lines = "\n".join(body)
    text = BLOCKS.format(body=f"entry forward {{\ninput %x: f32[n, 8] in [-2.0, 2.0]\nargument x = %x\n{lines}\n}}")
    program = parse(text)
    found, run = piecewise(program)
    assert found.repeats[0].count == 3
    for size in (1, 3):
        x = torch.randn(size, 8)
        wanted = laconic.ir.run.evaluate(program, program.forward, [x])
        given = operands(program, {"x": x}) + [size] * len(found.sizes)
        assert bits(list(run(*given))) == bits(wanted.results)


def test_a_result_that_cannot_be_made_is_refused() -> None:
    text = FLAT.replace(
        "return (%t2", "%n: int(n) = aten.sym_size.int(%x, 0)\n%f: float(?) = torch.sym_float(%n)\nreturn (%f"
    )
    found = cut_program(parse(text), "forward")
    assert isinstance(found, Refusal)
    assert "neither" in found.reason


def test_lazily_conjugated_values_cross_no_cut() -> None:
    """What a piece is given then is no plain memory; one piece sees where it comes from."""
    block = [
        "%p{k}: c64[4] = aten.mul.Tensor({last}, @w)",
        "%q{k}: c64[4] = aten.sin(%p{k})",
        "%c{k}: c64[4] = aten._conj(%q{k})",
    ]
    lines, last = [], "%x"
    for k in range(5):
        lines += [line.format(k=k, last=last) for line in block]
        last = f"%c{k}"
    body = "\n".join(lines)
    text = f"parameter @w: c64[4]\nentry forward {{\ninput %x: c64[4] in [-1.0, 1.0]\nargument x = %x\n{body}\n"
    text += f"return {last}\n}}"
    program = parse(text, w=torch.randn(4, dtype=torch.complex64))
    found, _run = piecewise(program)
    assert len(found.pieces) == 1
    assert not found.repeats


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_cut_to_the_same_bits(name: str) -> None:
    module, inputs, axes = make(name)
    program = laconic.optimize(module, inputs=inputs, dynamic_shapes=axes).program
    found, run = piecewise(outline(program))
    assert found.nodes >= sum(1 for _ in program.forward.calls())
    for case in cases(program, program.forward):
        sizes = {symbol.name: case.sizes[symbol.name] for symbol in program.symbols.values()}
        named = {declared.name: value for declared, value in zip(program.forward.inputs, case.inputs, strict=True)}
        more = [sizes[program.symbols[str(size)].name] for size in found.sizes]
        with torch.no_grad():
            results = list(run(*operands(program, named), *more))
        assert bits(results) == bits(laconic.ir.run.evaluate(program, program.forward, case.inputs).results)
