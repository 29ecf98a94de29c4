"""simplify: identities and constants go; what only looks like one stays."""

from __future__ import annotations

import pytest
import torch

import laconic
from helpers import bits, fires, ops, optimize, parse, stays

HEAD = """
size batch in [1, inf] like 2
parameter @w: f32[3]
buffer @b: f32[3]
buffer @mask: bool[3]
state @s: f32[3]
entry forward {
  input %x: f32[2, 3] in [-1.0, 1.0]
  input %i: i64[2, 3] in [0, 5]
  input %m: bool[2, 3] in [0, 1]
  input %d: f32[batch, 3] in [-1.0, 1.0]
  argument x = %x
  argument i = %i
  argument m = %m
  argument d = %d
"""

WEIGHTS = {"mask": torch.tensor([True, True, True])}


def body(text: str) -> str:
    return HEAD + text + "\n}"


#: text, rule in the ledger, ops left
_FIRE = {
    "reshape to the shape it has": ("%a: f32[2, 3] = aten.reshape(%x, [2, 3])", "a", "no-op view", 1),
    "a dynamic reshape to the shape it has": (
        "%n: int(batch) = aten.sym_size.int(%d, 0)\n%a: f32[batch, 3] = aten.reshape(%d, [%n, 3])",
        "a",
        "no-op view",
        2,
    ),
    "a full slice": ("%a: f32[2, 3] = aten.slice.Tensor(%x, 0, 0, 9223372036854775807)", "a", "no-op view", 1),
    "there and back": (
        "%t: f32[3, 2]{1, 3} = aten.permute(%x, [1, 0])\n%a: f32[2, 3] = aten.permute(%t, [1, 0])",
        "a",
        "no-op view",
        2,
    ),
    "expand to the shape it has": ("%a: f32[2, 3] = aten.expand(%x, [2, 3])", "a", "no-op view", 1),
    "clone": ("%a: f32[2, 3] = aten.clone(%x)", "a", "copy", 1),
    "a cast to the type it has": ("%a: f32[2, 3] = aten._to_copy(%x, dtype=f32)", "a", "copy", 1),
    "x * 1": ("%a: f32[2, 3] = aten.mul.Tensor(%x, 1)", "a", "identity", 1),
    "x * 1.0": ("%a: f32[2, 3] = aten.mul.Tensor(%x, 1.0)", "a", "identity", 1),
    "x / 1": ("%a: f32[2, 3] = aten.div.Tensor(%x, 1)", "a", "identity", 1),
    "x - 0": ("%a: f32[2, 3] = aten.sub.Tensor(%x, 0)", "a", "identity", 1),
    "x ** 1": ("%a: f32[2, 3] = aten.pow.Tensor_Scalar(%x, 1)", "a", "identity", 1),
    "integers + 0": ("%a: i64[2, 3] = aten.add.Tensor(%i, 0)", "a", "identity", 1),
    "& True": ("%a: bool[2, 3] = aten.__and__.Tensor(%m, @mask)", "a", "identity", 1),
}


@pytest.mark.parametrize(("text", "kept", "rule", "left"), _FIRE.values(), ids=_FIRE)
def test_fires_on(text: str, kept: str, rule: str, left: int) -> None:
    end = f"\n%z: {'bool' if '%m' in text else 'i64' if '%i' in text else 'f32'}"
    shape = "batch, 3" if "batch" in text else "2, 3"
    call = "bitwise_not" if "%m" in text else "neg"
    program = body(f"{text}{end}[{shape}] = aten.{call}(%{kept})\nreturn %z")
    before, after, reason = fires(program, "simplify", **WEIGHTS)
    assert rule in reason
    assert len(ops(after)) == left
    assert len(ops(before)) > left


_CONSTANTS = {
    "arithmetic on literals": """
        %a: i64[3] = aten.arange(3)
        %b: f32[3] = aten.mul.Tensor(%a, 0.5)
        %z: f32[2, 3] = aten.add.Tensor(%x, %b)""",
    "arithmetic on buffers": """
        %a: f32[3] = aten.exp(@b)
        %z: f32[2, 3] = aten.add.Tensor(%x, %a)""",
    "what reads only a type": """
        %a: f32[3] = aten.new_ones(%d, [3])
        %b: f32[3] = aten.mul.Tensor(%a, 2)
        %z: f32[2, 3] = aten.add.Tensor(%x, %b)""",
    "a strided result, strides kept": """
        %a: f32[2, 3] = aten.full([2, 3], 0.5)
        %b: f32[3, 2]{1, 3} = aten.permute(%a, [1, 0])
        %c: f32[3, 2]{1, 3} = aten.exp(%b)
        %e: f32[2, 2] = aten.matmul(%x, %c)
        %z: f32[2, 2] = aten.neg(%e)""",
}


@pytest.mark.parametrize("text", _CONSTANTS.values(), ids=_CONSTANTS)
def test_folds(text: str) -> None:
    before, after, reason = fires(body(f"{text}\nreturn %z"), "simplify", **WEIGHTS)
    assert "1 constant" in reason
    assert len(ops(after)) < len(ops(before))
    new = [w for name, w in after.weights.items() if name not in before.weights]
    assert [w.kind for w in new] == ["constant"]


_KEPT = {
    "x + 0 for floats: -0.0 + 0 is 0.0": "%z: f32[2, 3] = aten.add.Tensor(%x, 0)\nreturn %z",
    "x + 0.0 for floats": "%z: f32[2, 3] = aten.add.Tensor(%x, 0.0)\nreturn %z",
    "x - -0.0 is no neutral": "%z: f32[2, 3] = aten.rsub.Scalar(%x, 0)\nreturn %z",
    "x * -1": "%z: f32[2, 3] = aten.mul.Tensor(%x, -1)\nreturn %z",
    "x * 1 promotes a dtype": "%a: f32[2, 3] = aten.mul.Tensor(%i, 1.0)\n%z: f32[2, 3] = aten.neg(%a)\nreturn %z",
    "integers / 1 are floats": "%a: f32[2, 3] = aten.div.Tensor(%i, 1)\n%z: f32[2, 3] = aten.neg(%a)\nreturn %z",
    "x / 1 rounded": '%a: f32[2, 3] = aten.div.Tensor_mode(%x, 1, rounding_mode="floor")\n'
    "%z: f32[2, 3] = aten.neg(%a)\nreturn %z",
    "bools + 0 are integers": "%a: i64[2, 3] = aten.add.Tensor(%m, 0)\n%z: i64[2, 3] = aten.neg(%a)\nreturn %z",
    "x - 0 with a factor": "%a: f32[2, 3] = aten.sub.Tensor(%x, 0, alpha=2)\nreturn (%a, %a)",
    "a clone that is returned": "%z: f32[2, 3] = aten.clone(%x)\nreturn %z",
    "a clone of a clone: one copy is due": "%a: f32[2, 3] = aten.exp(%x)\n"
    "%z: f32[2, 3] = aten.clone(%a)\nreturn (%a, %z)",
    "a product that is returned": "%z: f32[2, 3] = aten.mul.Tensor(%x, 1)\nreturn %z",
    "a part of a clone that is returned": "%a: f32[2, 3] = aten.clone(%x)\n"
    "%z: f32[3] = aten.select.int(%a, 0, 0)\nreturn %z",
    "a clone of a state: the caller changes it": "%z: f32[3] = aten.clone(@s)\n"
    "%n: f32[3] = aten.add.Tensor(@s, 1)\nupdate @s = %n\nreturn %z",
    "a clone of a weight that is returned": "%z: f32[3] = aten.clone(@w)\nreturn %z",
    "a clone with other strides": "%t: f32[3, 2]{1, 3} = aten.permute(%x, [1, 0])\n"
    "%a: f32[3, 2] = aten.clone(%t, memory_format=contiguous_format)\n%z: f32[3, 2] = aten.neg(%a)\nreturn %z",
    "a clone of what is expanded": "%a: f32[4, 2, 3]{0, 3, 1} = aten.expand(%x, [4, 2, 3])\n"
    "%c: f32[4, 2, 3] = aten.clone(%a, memory_format=contiguous_format)\n%z: f32[4, 2, 3] = aten.neg(%c)\nreturn %z",
    "a cast that changes the dtype": "%a: f64[2, 3] = aten._to_copy(%x, dtype=f64)\n"
    "%z: f64[2, 3] = aten.neg(%a)\nreturn %z",
    "a cast there and back: it rounds": "%a: f16[2, 3] = aten._to_copy(%x, dtype=f16)\n"
    "%z: f32[2, 3] = aten._to_copy(%a, dtype=f32)\nreturn %z",
    "a reshape of transposed: it copies": "%t: f32[3, 2]{1, 3} = aten.permute(%x, [1, 0])\n"
    "%z: f32[2, 3] = aten.reshape(%t, [2, 3])\nreturn %z",
    "a transpose there and another back": "%t: f32[3, 2]{1, 3} = aten.permute(%x, [1, 0])\n"
    "%a: f32[2, 3] = aten.reshape(%t, [2, 3])\n%z: f32[2, 3] = aten.neg(%a)\nreturn %z",
    "a slice with a step": "%a: f32[1, 3]{6, 1} = aten.slice.Tensor(%x, 0, 0, 9223372036854775807, 2)\nreturn %a",
    "a slice of equal size elsewhere": "%a: f32[1, 3] = aten.slice.Tensor(%x, 0, 0, 1)\n"
    "%c: f32[1, 3] = aten.slice.Tensor(%x, 0, 1, 2)\n%z: f32[1, 3] = aten.sub.Tensor(%a, %c)\nreturn %z",
    "a diagonal: other strides": "%t: f32[2, 3]{1, 1} = aten.as_strided(%x, [2, 3], [1, 1])\nreturn %t",
    "the same sizes and strides at another offset": "%t: f32[1, 3] = aten.slice.Tensor(%x, 0, 0, 1)\n"
    "%a: f32[1, 3] = aten.as_strided(%t, [1, 3], [3, 1], 3)\n%z: f32[1, 3] = aten.neg(%a)\nreturn %z",
    "& True where it is not all true": "%n: bool[2, 3] = aten.__and__.Tensor(%m, %m)\nreturn %n",
    "| True": "%a: bool[2, 3] = aten.bitwise_or.Tensor(%m, @mask)\n%z: bool[2, 3] = aten.bitwise_not(%a)\nreturn %z",
    "a call on parameters alone: it is trained": "%a: f32[3] = aten.exp(@w)\n"
    "%z: f32[2, 3] = aten.add.Tensor(%x, %a)\nreturn %z",
    "a call on a state alone: it changes": "%a: f32[3] = aten.exp(@s)\n%z: f32[2, 3] = aten.add.Tensor(%x, %a)\n"
    "update @s = %a\nreturn %z",
    "arithmetic on a buffer that callers receive: they may write into it": "%a: f32[3] = aten.exp(@b)\n"
    "%z: f32[2, 3] = aten.add.Tensor(%x, %a)\nreturn (%z, @b)",
    "a copy of a constant that is returned": "%a: f32[3] = aten.exp(@w)\n%k: f32[3] = aten.clone(%a)\nreturn (%k, %a)",
    "a constant that is returned": "%a: f32[3] = aten.full([3], 0.5)\nreturn %a",
    "a part of a constant that is returned": "%a: f32[3] = aten.full([3], 0.5)\n"
    "%z: f32[2] = aten.slice.Tensor(%a, 0, 0, 2)\nreturn %z",
    "a view of a buffer: nothing would be gained": "%a: f32[2]{1} = aten.slice.Tensor(@b, 0, 1, 3)\n"
    "%y: f32[2, 2]{3, 1} = aten.slice.Tensor(%x, 1, 0, 2)\n%z: f32[2, 2] = aten.add.Tensor(%y, %a)\nreturn %z",
    "a symbolic size": "%n: int(batch) = aten.sym_size.int(%d, 0)\n%a: i64[batch] = aten.arange(%n)\nreturn (%a, %a)",
    "an arange of a symbolic size": "%n: int(batch) = aten.sym_size.int(%d, 0)\n%a: i64[batch] = aten.arange(%n)\n"
    "%c: i64[batch, 1] = aten.unsqueeze(%a, 1)\n%z: f32[batch, 3] = aten.add.Tensor(%d, %c)\nreturn %z",
    "& all True on whole numbers": "%z: i64[2, 3] = aten.bitwise_and.Tensor(%i, @mask)\nreturn %z",
    "x - (-0.0)": "%z: f32[2, 3] = aten.sub.Tensor(%x, -0.0)\n%y: f32[2, 3] = aten.exp(%z)\nreturn %y",
    "a copy of a view that no schema declares": '%e: f32[3, 2]{1, 3} = aten.einsum("ij->ji", [%x])\n'
    "%z: f32[3, 2]{1, 3} = aten.clone(%e)\nreturn %z",
    "random numbers": "%a: f32[3] = aten.rand([3])\n%z: f32[2, 3] = aten.add.Tensor(%x, %a)\nreturn %z",
}


@pytest.mark.parametrize("text", _KEPT.values(), ids=_KEPT)
def test_does_not_fire_on(text: str) -> None:
    assert stays(body(text), "simplify", **WEIGHTS) == "no call is an identity or a constant"


def test_unset_memory_is_no_constant() -> None:
    stays(
        body("%a: f32[3] = aten.empty.memory_format([3])\n%c: f32[3] = aten.sub.Tensor(%a, %a)\nreturn %x"),
        "simplify",
        **WEIGHTS,
    )


def test_constants_larger_than_the_bound_are_computed_again() -> None:
    text = body(
        """
        %a: f32[2, 3] = aten.full([2, 3], 0.5)
        %b: f32[2, 3] = aten.exp(%a)
        %z: f32[2, 3] = aten.mul.Tensor(%x, %b)
        return %z
        """
    )
    stays(text, "simplify{max-bytes=23}", **WEIGHTS)
    fires(text, "simplify{max-bytes=24}", **WEIGHTS)


def test_values_of_buffers_are_left_alone_when_asked() -> None:
    text = body("%a: f32[3] = aten.exp(@b)\n%z: f32[2, 3] = aten.add.Tensor(%x, %a)\nreturn %z")
    stays(text, "simplify{values=no}", **WEIGHTS)


def test_a_value_that_is_too_large_leaves_its_operands_to_fold() -> None:
    text = body(
        """
        %a: i64[3] = aten.arange(3)
        %b: f32[3] = aten.mul.Tensor(%a, 0.5)
        %c: f32[2, 3]{0, 1} = aten.expand(%b, [2, 3])
        %z: f32[2, 3] = aten.add.Tensor(%x, %c)
        return %z
        """
    )
    _, after, _ = fires(text, "simplify", **WEIGHTS)
    assert ops(after) == ["aten.arange.default", "aten.expand.default", "aten.add.Tensor"]


@pytest.mark.parametrize("middle", ["%b: f32[2, 3] = aten.clone(%a)", "%b: f32[2, 3] = aten.mul.Tensor(%a, 1)"])
def test_of_two_copies_of_an_input_one_stays(middle: str) -> None:
    text = body(f"%a: f32[2, 3] = aten.clone(%x)\n{middle}\nreturn %b")
    before, after, _ = fires(text, "simplify", **WEIGHTS)
    assert len(ops(after)) == len(ops(before)) - 1


def test_of_two_copies_with_a_view_between_one_stays() -> None:
    text = body(
        """
        %a: f32[2, 3] = aten.clone(%x)
        %t: f32[3, 2]{1, 3} = aten.permute(%a, [1, 0])
        %b: f32[3, 2]{1, 3} = aten.clone(%t)
        return %b
        """
    )
    _, after, _ = fires(text, "simplify", **WEIGHTS)
    assert sorted(ops(after)) == ["aten.clone.default", "aten.permute.default"]


def test_a_trained_matrix_does_not_stand_for_its_copy_in_a_product_that_asks_for_gradients() -> None:
    stays(
        """
        parameter @w: f32[6, 6] trainable
        entry forward {
          input %x: f32[3, 4, 6] in [-1.0, 1.0]
          argument x = %x
          %t: f32[4, 3, 6]{6, 24, 1} = aten.transpose.int(%x, 0, 1)
          %c: f32[6, 6] = aten.clone(@w)
          %z: f32[4, 3, 6] = aten.linear(%t, %c)
          return %z
        }
        """,
        "simplify",
    )


def test_a_copy_of_a_constant_stays_the_callers_own() -> None:
    text = body("%a: f32[3] = aten.exp(@b)\n%k: f32[3] = aten.clone(%a)\nreturn %k")
    _, after, _ = fires(text, "simplify", **WEIGHTS)
    assert ops(after) == ["aten.clone.default"]


def test_entries_with_calls_of_one_name_fold_apart() -> None:
    program = parse(
        """
        entry forward {
          input %x: f32[3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[3] = aten.full([3], 1.0)
          %z: f32[3] = aten.add.Tensor(%x, %a)
          return %z
        }
        entry decode {
          input %x: f32[3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[3] = aten.full([3], 2.0)
          %z: f32[3] = aten.add.Tensor(%x, %a)
          return %z
        }
        """
    )
    folded = optimize(program, "simplify").program.weights
    assert sorted(float(w.value[0]) for w in folded.values()) == [1.0, 2.0]


def test_a_copy_of_an_input_before_a_matrix_product_stays_and_says_why() -> None:
    """The input may start anywhere in memory, its copy starts on a boundary, and the product rounds by that."""
    text = """
        parameter @w: f32[4, 3]
        entry forward {{
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          {0}
          %c: f32[2, 3] = aten.clone(%e)
          %z: f32[2, 4] = aten.linear(%c, @w)
          return %z
        }}
        """
    copied, computed = "%e: f32[2, 3] = aten.reshape(%x, [2, 3])", "%e: f32[2, 3] = aten.exp(%x)"
    assert "%c" in stays(text.format(computed).replace("%e)", "%x)"), "simplify")
    fires(text.format(computed), "simplify")
    program = parse(text.format(copied))
    assert "aten.clone.default" in ops(optimize(program, "simplify").program)


def test_bits_stay_where_inputs_start_off_a_boundary() -> None:
    class Copying(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(33, 65)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x.clone()) + (x.clone() * 2).sum()

    torch.manual_seed(0)
    module = Copying()
    result = laconic.optimize(module, inputs=(torch.randn(1, 33),))
    room = torch.randn(100)
    for start in range(16):
        x = room[start : start + 33].view(1, 33)
        assert bits(result.model(x)) == bits(module(x).detach()), start
