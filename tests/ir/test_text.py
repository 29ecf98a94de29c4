"""The text form: what is printed parses back; what is damaged is refused at its line and column."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from helpers import bits, own_values, parse, seeded
from laconic.ir.errors import LaconicError, ParseError
from laconic.ir.inputs import draw
from laconic.ir.parse import parse_program
from laconic.ir.program import Program
from laconic.ir.run import evaluate
from laconic.ir.verify import verify

EVERYTHING = """laconic program 1

fact model = "Toy"
fact nested = {"a": [1, 2.5, null, "x = y"]}
size batch in [1, inf] like 3
size tokens in [2, 16] like 4
parameter @block.0.weight: f32[4, 4] trainable
parameter @"odd name/with \\"quotes\\"": f32[4]
buffer @strided: f32[4, 2]{1, 4}
buffer @half: f16[2] transient
constant @c: i64[2] transient
state @s: f32[4]
alias @tied = @block.0.weight
alias @rows = @block.0.weight[1:3]
alias @gone = none

entry forward {
  input %x: f32[batch, tokens, 4] in [-1.5, 2.0]
  input %m: bool[batch, tokens] in [0, 1] named "mask.0"
  input %e: f64[batch] in [-inf, inf]
  argument x = %x
  argument mask = [%m, {"k": %e, "flag": True}, None, "text", 2.5]
  %n: int(batch) = aten.sym_size.int(%x, 0) !0
  %k: int(4*batch) = operator.mul(%n, 4) !1
  %l: f32[batch, tokens, 4] = aten.linear(%x, @block.0.weight, @"odd name/with \\"quotes\\"") !2 by dedup
  %t: f32[tokens, batch, 4]{4, 4*tokens, 1} = aten.permute(%l, [1, 0, 2]) !3
  %d: f64[batch, tokens, 4] = aten._to_copy(%l, dtype=f64) !4
  %p: (f32[batch, tokens, 2]{4*tokens, 4, 1}, f32[batch, tokens, 2]{4*tokens, 4, 1}) = aten.split.Tensor(%l, 2, -1) !5
  %g: f32[batch, tokens, 2]{4*tokens, 4, 1} = operator.getitem(%p, 1)
  %w: f32[batch, tokens, 4] = aten.masked_fill.Scalar(%l, %u, -inf)
  %v: f32[4] = aten.add.Tensor(@s, 1e-05, alpha=-2)
  update @s = %v
  update "mask.0" = %m
  return {"a": %t, "b": [%d, (%g,), None], "c": (), "d": %n, "w": %w}
}

site 0..3 = "block.0" "toy.py:7"
site 4..5 = "" ""
""".replace("%w: f32", "%u: bool[batch, tokens, 1] = aten.unsqueeze(%m, -1)\n  %w: f32")


def example() -> Program:
    program = parse_program(EVERYTHING, seeded(strided=torch.randn(2, 4).t()), "toy")
    verify(program)
    return program


def test_all_that_the_text_can_say_prints_as_it_was_read() -> None:
    program = example()
    text = str(program)
    assert text == EVERYTHING
    again = parse_program(text, own_values(program))
    assert str(again) == text
    case = draw(program, program.forward, {"batch": 2, "tokens": 5}, 0)
    first = evaluate(program, program.forward, case.clone()).tensors()
    assert bits(evaluate(again, again.forward, case.clone()).tensors()) == bits(first)


def test_what_was_read_is_what_was_said() -> None:
    program = example()
    assert program.facts == {"model": "Toy", "nested": {"a": [1, 2.5, None, "x = y"]}}
    assert [(s.name, s.low, s.high, s.hint) for s in program.symbols.values()] == [
        ("batch", 1, None, 3), ("tokens", 2, 16, 4)]  # fmt: skip
    assert program.weights["block.0.weight"].trainable
    assert not program.weights["half"].persistent
    assert program.aliases["rows"].rows == (1, 3)
    assert program.aliases["gone"].target is None
    assert [i.name for i in program.forward.inputs] == ["x", "mask.0", "e"]
    assert [str(o) for o in program.forward.outputs] == [
        "update s",
        "input update mask.0",
        *("result " + path for path in ("a", "b.0", "b.1.0", "d", "w")),
    ]
    by = {n.name: n.meta.get("by") for n in program.forward.calls()}
    assert by["l"] == "dedup"
    assert by["n"] is None


SMALL = """laconic program 1
size batch in [1, 9] like 3
parameter @w: f32[4, 2] trainable
state @s: f32[2]
entry forward {
  input %x: f32[batch, 2] in [-1.0, 1.0]
  argument x = %x
  %a: f32[batch, 4] = aten.linear(%x, @w)
  %b: f32[batch, 2]{4, 1} = aten.slice.Tensor(%a, 1, 0, 2)
  %c: f32[2] = aten.add.Tensor(@s, 1.5)
  update @s = %c
  return (%b, 2)
}
"""


def try_parsing(text: str) -> Program | None:
    """The program, or None for a ParseError inside the text. Anything else raises."""
    refused: ParseError | None = None
    try:
        return parse_program(text, seeded(), "damaged")
    except ParseError as problem:
        refused = problem
    lines = text.split("\n")
    assert 1 <= refused.line <= len(lines), refused
    assert 1 <= refused.column <= len(lines[refused.line - 1]) + 1, refused
    assert refused.where == f"damaged:{refused.line}:{refused.column}"
    return None


def check_damage(text: str) -> None:
    """Damaged text is refused with a place, or says a program: one that prints, parses and verifies or is refused."""
    program = try_parsing(text)
    if program is None:
        return
    printed = str(program)
    assert str(parse_program(printed, own_values(program))) == printed, text
    with suppress(LaconicError):  # anything else fails the test
        verify(program)


@pytest.mark.parametrize("line", range(SMALL.count("\n")))
def test_no_single_deletion_crashes(line: int) -> None:
    start = sum(len(piece) + 1 for piece in SMALL.split("\n")[:line])
    for at in range(start, start + len(SMALL.split("\n")[line]) + 1):
        check_damage(SMALL[:at] + SMALL[at + 1 :])


@pytest.mark.parametrize("letter", list('0-.,:=%@"({]} \nz!é'))
def test_no_single_replacement_crashes(letter: str) -> None:
    for at in range(len(SMALL)):
        check_damage(SMALL[:at] + letter + SMALL[at + 1 :])


def test_no_truncation_crashes() -> None:
    for at in range(len(SMALL)):
        check_damage(SMALL[:at])


#: (text to replace, by what, line, column, message)
_WRONG = [
    ("program 1", "program 2", 1, 17, "version 2"),
    ("like 3", "like 30", 2, 6, "outside its range"),
    ("f32[4, 2] trainable", "f99[4, 2]", 3, 15, "'f99' is no dtype"),
    ("state @s: f32[2]", "state @w: f32[2]", 4, 7, "'w' is declared twice"),
    ("%a: f32[batch, 4]", "%a: f32[batch, 5]", 8, 3, "computes f32[batch, 4]"),
    ("%a: f32[batch, 4]", "%x: f32[batch, 4]", 8, 3, "%x"),
    ("aten.linear", "aten.linea", 8, 23, "no loaded library registers the op 'aten.linea'"),
    ("linear(%x, @w)", "linear(%x, @v)", 8, 39, "'v' is not declared"),
    ("linear(%x, @w)", "linear(%y, @w)", 8, 35, "%y is not defined above"),
    ("linear(%x, @w)", "linear(@w, %x)", 8, 3, "computes f32[4, batch]"),
    ("{4, 1}", "{2, 1}", 9, 3, "computes f32[batch, 2]{4, 1}"),
    ("Tensor(@s, 1.5)", "Tensor(@s, 1.5", 10, 39, "expected ')'"),
    ("return (%b, 2)", "return (%b, batch)", 12, 15, "'batch' is no value"),
]


@pytest.mark.parametrize(("old", "new", "line", "column", "message"), _WRONG, ids=[w[1] for w in _WRONG])
def test_what_is_wrong_is_refused_where_it_stands(old: str, new: str, line: int, column: int, message: str) -> None:
    assert SMALL.count(old) == 1
    with pytest.raises(ParseError) as caught:
        parse_program(SMALL.replace(old, new), seeded(), "wrong")
    assert message in caught.value.what
    assert (caught.value.line, caught.value.column) == (line, column)


def test_values_of_another_type_than_declared_are_refused() -> None:
    with pytest.raises(ParseError, match=r"declared f32\[4, 2\] but its values are f64\[4, 2\]"):
        parse_program(SMALL, seeded(w=torch.zeros(4, 2, dtype=torch.float64)), "wrong")


def test_missing_values_are_named() -> None:
    def nothing(name: str, kind: object) -> torch.Tensor:
        raise KeyError(name)

    with pytest.raises(ParseError, match="there are no values for 'w'"):
        parse_program(SMALL, nothing, "wrong")


@pytest.mark.parametrize(
    "number", ["0", "-1", "1.5", "-0.0", "0.0", "1e-05", "1e+16", "inf", "-inf", "nan", "True", "False", "3.0"]
)
def test_numbers_keep_type_and_sign(number: str) -> None:
    text = f"""
        entry forward {{
          input %x: f32[2] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2] = aten.mul.Tensor(%x, {number})
          return (%a, {number})
        }}
        """
    program = parse(text)
    assert f"aten.mul.Tensor(%x, {number})" in str(program)
    assert str(parse_program(str(program), own_values(program))) == str(program)
