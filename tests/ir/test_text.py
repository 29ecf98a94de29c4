"""The text form: what is printed parses back; what is damaged is refused at its line and column."""

from __future__ import annotations

import random
import time
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

#: More of them find rarer slips: 3000 take minutes.
MUTATIONS = 300

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
  %f: float(?) = operator.truediv(%n, 2)
  %q: bool(?) = operator.gt(%n, 2)
  %l: f32[batch, tokens, 4] = aten.linear(%x, @block.0.weight, @"odd name/with \\"quotes\\"") !2 by dedup
  %t: f32[tokens, batch, 4]{4, 4*tokens, 1} = aten.permute(%l, [1, 0, 2]) !3
  %d: f64[batch, tokens, 4] = aten._to_copy(%l, dtype=f64) !4
  %p: (f32[batch, tokens, 2]{4*tokens, 4, 1}, f32[batch, tokens, 2]{4*tokens, 4, 1}) = aten.split.Tensor(%l, 2, -1) !5
  %g: f32[batch, tokens, 2]{4*tokens, 4, 1} = operator.getitem(%p, 1)
  %w: f32[batch, tokens, 4] = aten.masked_fill.Scalar(%l, %u, -inf)
  %v: f32[4] = aten.add.Tensor(@s, 1e-05, alpha=-2)
  update @s = %v
  update "mask.0" = %m
  return {"a": %t, "b": [%d, (%g,), None], "c": (), "d": %n, "w": %w, "f": (%f, %q)}
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
        *("result " + path for path in ("a", "b.0", "b.1.0", "d", "w", "f.0", "f.1")),
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


#: Added to SMALL in place of its line 4, and refused there: (line, message).
_REFUSED_LINES = {
    "fact deep = " + "[" * 100 + "]" * 100: "64 levels deep",
    "fact deep = " + "[" * 100_000: "not a JSON value",
    "fact a = 1\nfact a = 2": "given twice",
    f"size n in [1, {'9' * 5000}] like 2": "at most 20 digits",
    f"size n in [1, {2**63}] like 2": "less than 2**62",
    "alias @zz = @w[5:900]": "no rows 5 to 900",
    "alias @w = none": "declared twice",
    "alias @zz = @w\nalias @zz = none": "declared twice",
    "alias @zz = @w\nbuffer @zz: f32[2]": "declared twice",
    "buffer @b: f32[2]@cuda:99": "device",
    "buffer @b: f32[2]@nowhere": "no device",
    "buffer @b: f32[2]{batch}": "fixed sizes",
    "buffer @b: f32[8//0]": "makes no size",
    "buffer @b: f32[Mod(1)]": "makes no size",
    "buffer @b: f32[9**999999999]": "an exponent of a size",
    "buffer @b: f32[((9**16)**16)**16]": "out of all proportion",
    "buffer @b: f32[99999999999999999999]": "2**62",
    "buffer @b: f32[" + "(" * 100 + "1" + ")" * 100 + "]": "levels deep",
    "buffer @b: f32[" + "-" * 100 + "1]": "levels deep",
    "buffer @b: " + "(" * 100: "levels deep",
    'site 0..99999999 = "" ""': "range of sites",
}


@pytest.mark.parametrize("line", _REFUSED_LINES, ids=lambda line: line[:30])
def test_declarations_that_no_program_has_are_refused(line: str) -> None:
    own = own_values(parse_program(SMALL, seeded(), "small"))
    with pytest.raises(ParseError) as caught:
        parse_program(SMALL.replace("entry", line + "\nentry"), lambda name, kind: own(name.replace("b", "w"), kind))
    assert _REFUSED_LINES[line] in caught.value.what
    assert caught.value.line >= 5


#: In place of the lines of SMALL's entry that start so: what is refused, and the message.
_REFUSED_IN_ENTRY = [
    ("%c", "%c: f32[2] = aten.relu_(@s)", "writes into an operand"),
    ("%c", '%c: none = aten._print("hello")', "returns no value"),
    ("%c", '%c: f32[2] = aten.from_file("x", False, 2)', "takes no tensor"),
    ("%c", "%c: int(9) = operator.pow(9, 99999999)", "plain numbers only"),
    ("%c", '%c: int(9) = operator.getitem("a", 0)', "takes several values"),
    ("%c", "%c: f32[2] = operator.mul(@s, 3)", "takes numbers only"),
    ("%c", "%n: int(batch) = aten.sym_size.int(%x, 0)\n%c: int(batch) = operator.pow(%n, 9999999)", "plain number"),
    ("%c", "%n: int(batch) = aten.sym_size.int(%x, 0)\n%c: int(batch) = operator.pow(%n, 60)", "2**62"),
    ("%c", "%c: f32[2] = aten.add.Tensor(@s, " + "[" * 100, "levels deep"),
    ("%c", "%c: f32[2] = aten.add.Tensor(@s, " + "-" * 100 + "1)", "levels deep"),
    ("%c", f"%c: f32[2] = aten.add.Tensor(@s, {'9' * 5000})", "at most 20 digits"),
    ("%c", '%c: f32[2] = aten.add.Tensor(@s, complex("a", 1))', "two parts"),
    ("%c", "%c: f32[2] = aten.add.Tensor(@s, 1) !" + "9" * 5000, "at most 20 digits"),
    ("%c", "%c: f32[2] = aten._to_copy(@s, dtype=64)", "takes a dtype as 'dtype'"),
    ("%c", "%c: f32[2] = aten._to_copy(@s, memory_format=9)", "takes a memory_format"),
    ("%c", "%c: f32[2] = aten.to_sparse(@s)", "no value of a program"),
    ("update", "update @w = %c", "is no state"),
    ("update", "update @nope = %c", "is no state"),
    ("update", 'update "nope" = %c', "is no input"),
    ("update", "update @s = %a", "becomes"),
    ("update", "update @s = 1", "becomes"),
    ("update", "update @s = %c\nupdate @s = %c", "twice"),
    ("update", 'update @s = %c seen "nope"', "seen in nope"),
    ("input", 'input %x: f32[batch, 2] in ["a", "b"]', "two numbers"),
    ("input", "input %x: f32[batch, 2] in [1.0, -1.0]", "two numbers"),
    ("input", "input %x: i64[batch, 2] in [0, inf]", "whole numbers"),
    ("input", "input %x: f32[batch - 9, 2] in [0, 1]", "no tensor has this type"),
    ("input", "input %x: f32[batch, 4611686018427387903] in [0, 1]", ""),
    ("input", "input %x: f32[batch, 2]@cuda:99 in [0, 1]", "device"),
    ("input", "input %x: f32[((batch**16)**16)**16] in [0, 1]", "out of all proportion"),
    ("argument", "argument x = %x\nargument x = 1", "declared twice"),
    ("argument", "argument x = " + '{"a": ' * 100, "levels deep"),
    ("entry", "entry other {", "no entry 'forward'"),
]


@pytest.mark.parametrize(("start", "line", "message"), _REFUSED_IN_ENTRY, ids=[c[1][:40] for c in _REFUSED_IN_ENTRY])
def test_lines_that_no_entry_has_are_refused(
    start: str, line: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    own = own_values(parse_program(SMALL, seeded(), "small"))
    lines = [line if old.strip().startswith(start) else old for old in SMALL.split("\n")]
    assert line in lines
    before = time.process_time()
    with pytest.raises(ParseError) as caught:
        parse_program("\n".join(lines), own)
    assert message in caught.value.what
    assert time.process_time() - before < 5
    assert "hello" not in capfd.readouterr().out, "nothing is called before it is known to be harmless"


def test_results_that_are_a_written_state_are_remembered() -> None:
    text = SMALL.replace("= %c\n", '= %c seen "0"\n').replace("(%b, 2)", "(%c, 2)")
    program = parse_program(text, seeded())
    assert program.forward.outputs[0].seen == ("0",)
    assert str(parse_program(str(program), own_values(program))) == str(program)


def test_any_name_prints_and_parses() -> None:
    """Names from users: of arguments, sizes, facts, inputs."""
    text = SMALL.replace("batch", '"gr\\u00f6\\u00dfe"').replace("argument x", 'argument "ma\\u00df 2"')
    text = text.replace("in [-1.0, 1.0]", 'in [-1.0, 1.0] named "\\u03b1"').replace("size", 'fact "a b" = 1\nsize', 1)
    program = parse_program(text.replace("entry forward {", "entry forward {"), seeded())
    assert [s.name for s in program.symbols.values()] == ["größe"]
    assert list(program.forward.arguments) == ["maß 2"]
    assert [i.name for i in program.forward.inputs] == ["α"]
    assert program.facts == {"a b": 1}
    printed = str(program)
    assert printed.isascii()
    assert str(parse_program(printed, own_values(program))) == printed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float(?)", "float(1.5)"),
        ("float(?)", "bool(?)"),
        ("bool(?)", "bool(True)"),
        ("float(?)", "int(?)"),
        ("int(4*batch)", "int(?)"),
    ],
)
def test_a_symbolic_number_is_compared_by_its_kind(old: str, new: str) -> None:
    with pytest.raises(ParseError):
        parse_program(EVERYTHING.replace(old, new), seeded(strided=torch.randn(2, 4).t()))


def test_a_constant_number_is_compared_exactly() -> None:
    text = """laconic program 1
        entry forward {{
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %n: int(3) = aten.sym_size.int(%x, 1)
          %f: float({}) = operator.truediv(%n, 2)
          return %f
        }}
        """
    assert "%f: float(1.5)" in str(parse_program(text.format("1.5"), seeded()))
    for wrong in ("1.25", "?"):
        with pytest.raises(ParseError, match="computes float"):
            parse_program(text.format(wrong), seeded())


_INSERTED = [*'0-.,:=%@"({[]})* \n?!é/', "9" * 12, "**", "//", "None", "True", "inf", "batch", "f32", "@s", "%x", "((("]


def mutated(text: str, chance: random.Random) -> str:
    """`text` with a stretch deleted, doubled, replaced, or a token swapped with another of its tokens."""
    at = chance.randrange(len(text))
    end = min(len(text), at + chance.choice([1, 1, 2, 5, 20]))
    kind = chance.randrange(4)
    if kind == 3:
        words = text.split(" ")
        a, b = chance.randrange(len(words)), chance.randrange(len(words))
        words[a] = words[b]
        return " ".join(words)
    put = ["", text[at:end] * 2, chance.choice(_INSERTED)][kind]
    return text[:at] + put + text[at if kind == 2 and chance.random() < 0.5 else end :]


def test_mutations_raise_nothing_but_errors_of_ours() -> None:
    """What loads is a verified program; what does not is refused for a reason, and at once."""
    program = example()
    chance = random.Random(0)
    own = own_values(program)
    for number in range(MUTATIONS):
        text = mutated(EVERYTHING, chance)
        if number % 2:
            text = mutated(text, chance)
        before = time.process_time()
        with suppress(LaconicError):
            verify(parse_program(text, own))
        assert time.process_time() - before < 10, text  # a hang, not a collection of garbage
