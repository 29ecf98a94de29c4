"""cse: what is computed twice is computed once, unless someone could tell."""

from __future__ import annotations

import pytest
import torch

import laconic
from helpers import fires, ops, stays

HEAD = """
entry forward {
  input %x: f32[2, 3] in [-1.0, 1.0]
  input %y: f32[2, 3] in [-1.0, 1.0]
  argument x = %x
  argument y = %y
"""


def body(text: str) -> str:
    return HEAD + text + "\n}"


def test_merges_equal_calls_and_then_what_is_computed_from_them() -> None:
    before, after, reason = fires(
        body(
            """
            %a: f32[2, 3] = aten.exp(%x)
            %b: f32[2, 3] = aten.exp(%x)
            %c: f32[2, 3] = aten.mul.Tensor(%a, %y)
            %d: f32[2, 3] = aten.mul.Tensor(%b, %y)
            %e: f32[2, 3] = aten.add.Tensor(%c, %d)
            return %e
            """
        ),
        "cse",
    )
    assert len(ops(before)) == 5
    assert ops(after) == ["aten.exp.default", "aten.mul.Tensor", "aten.add.Tensor"]
    assert reason == "2 common subexpression"


_FIRE = {
    "three of a kind": """
        %a: f32[2, 3] = aten.sin(%x)
        %b: f32[2, 3] = aten.sin(%x)
        %c: f32[2, 3] = aten.sin(%x)
        %d: f32[3, 2, 3] = aten.stack([%a, %b, %c])
        return %d""",
    "equal keyword arguments": """
        %a: f64[2, 3] = aten._to_copy(%x, dtype=f64)
        %b: f64[2, 3] = aten._to_copy(%x, dtype=f64)
        %c: f64[2, 3] = aten.add.Tensor(%a, %b)
        return %c""",
    "equal lists": """
        %a: f32[6] = aten.reshape(%x, [6])
        %b: f32[6] = aten.reshape(%x, [6])
        %c: f32[6] = aten.add.Tensor(%a, %b)
        return %c""",
    "constants made twice": """
        %a: f32[3] = aten.full([3], 0.5)
        %b: f32[3] = aten.full([3], 0.5)
        %c: f32[2, 3] = aten.add.Tensor(%x, %a)
        %d: f32[2, 3] = aten.mul.Tensor(%c, %b)
        return %d""",
    "only one of two is returned": """
        %a: f32[2, 3] = aten.exp(%x)
        %b: f32[2, 3] = aten.exp(%x)
        %c: f32[2, 3] = aten.neg(%a)
        return (%b, %c)""",
    "two views of an input, both returned: they share memory anyway": """
        %a: f32[3, 2]{1, 3} = aten.permute(%x, [1, 0])
        %b: f32[3, 2]{1, 3} = aten.permute(%x, [1, 0])
        return (%a, %b)""",
    "dropout that drops nothing": """
        %a: f32[2, 3] = aten.dropout(%x, 0.5, False)
        %b: f32[2, 3] = aten.dropout(%x, 0.5, False)
        %c: f32[2, 3] = aten.add.Tensor(%a, %b)
        return %c""",
}


@pytest.mark.parametrize("text", _FIRE.values(), ids=_FIRE)
def test_fires_on(text: str) -> None:
    before, after, _ = fires(body(text), "cse")
    assert len(ops(after)) < len(ops(before))


_KEPT = {
    "1 and 1.0": """
        %a: i64[2, 3] = aten._to_copy(%x, dtype=i64)
        %b: i64[2, 3] = aten.add.Tensor(%a, 1)
        %c: f32[2, 3] = aten.add.Tensor(%a, 1.0)
        %d: f32[2, 3] = aten.mul.Tensor(%b, %c)
        return %d""",
    "1 and True": """
        %a: bool[2, 3] = aten.gt.Scalar(%x, 0)
        %b: i64[2, 3] = aten.add.Tensor(%a, 1)
        %c: bool[2, 3] = aten.add.Tensor(%a, True)
        return (%b, %c)""",
    "1 and 1.0 as fill values": """
        %a: i64[3] = aten.full([3], 1)
        %b: f32[3] = aten.full([3], 1.0)
        %c: bool[3] = aten.full([3], True)
        %d: f32[3] = aten.mul.Tensor(%a, %b)
        %e: f32[3] = aten.mul.Tensor(%d, %c)
        return %e""",
    "0.0 and -0.0": """
        %a: f32[2, 3] = aten.mul.Tensor(%x, 0.0)
        %b: f32[2, 3] = aten.mul.Tensor(%x, -0.0)
        %c: f32[2, 2, 3] = aten.stack([%a, %b])
        return %c""",
    "an argument by name": """
        %a: f32[2, 3] = aten.add.Tensor(%x, %y, alpha=2)
        %b: f32[2, 3] = aten.add.Tensor(%x, %y, alpha=3)
        %c: f32[2, 3] = aten.add.Tensor(%x, %y)
        %d: f32[3, 2, 3] = aten.stack([%a, %b, %c])
        return %d""",
    "other order of operands": """
        %a: f32[2, 3] = aten.sub.Tensor(%x, %y)
        %b: f32[2, 3] = aten.sub.Tensor(%y, %x)
        %c: f32[2, 3] = aten.mul.Tensor(%a, %b)
        return %c""",
    "two random draws": """
        %a: f32[2, 3] = aten.rand_like(%x)
        %b: f32[2, 3] = aten.rand_like(%x)
        %c: f32[2, 3] = aten.sub.Tensor(%a, %b)
        return %c""",
    "two dropouts": """
        %a: f32[2, 3] = aten.dropout(%x, 0.5, True)
        %b: f32[2, 3] = aten.dropout(%x, 0.5, True)
        %c: f32[2, 3] = aten.sub.Tensor(%a, %b)
        return %c""",
    "functions of two random draws": """
        %a: f32[2, 3] = aten.rand_like(%x)
        %b: f32[2, 3] = aten.exp(%a)
        %c: f32[2, 3] = aten.rand_like(%x)
        %d: f32[2, 3] = aten.exp(%c)
        %e: f32[2, 3] = aten.sub.Tensor(%b, %d)
        return %e""",
    "two pieces of unset memory": """
        %a: f32[2, 3] = aten.empty_like(%x)
        %b: f32[2, 3] = aten.empty_like(%x)
        %c: f32[2, 3] = aten.fill.Scalar(%a, 1)
        %d: f32[2, 3] = aten.fill.Scalar(%b, 2)
        %e: f32[2, 3] = aten.add.Tensor(%c, %d)
        return %e""",
    "two equal results, both returned": """
        %a: f32[2, 3] = aten.exp(%x)
        %b: f32[2, 3] = aten.exp(%x)
        return (%a, %b)""",
    "two copies that a reshape makes, both returned": """
        %t: f32[3, 2]{1, 3} = aten.permute(%x, [1, 0])
        %a: f32[6] = aten.reshape(%t, [6])
        %b: f32[6] = aten.reshape(%t, [6])
        return (%a, %b)""",
    "a result and a part of its equal": """
        %a: f32[2, 3] = aten.exp(%x)
        %b: f32[2, 3] = aten.exp(%x)
        %s: (f32[2, 2]{3, 1}, f32[2, 1]{3, 1}) = aten.split.Tensor(%a, 2, -1)
        %c: f32[2, 2]{3, 1} = operator.getitem(%s, 0)
        return (%b, %c)""",
    "an update of an input and an equal result": """
        %a: f32[2, 3] = aten.exp(%y)
        %b: f32[2, 3] = aten.exp(%y)
        update "x" = %a
        return %b""",
}


@pytest.mark.parametrize("text", _KEPT.values(), ids=_KEPT)
def test_does_not_fire_on(text: str) -> None:
    assert stays(body(text), "cse") == "no two calls compute the same"


def test_states_with_equal_updates_stay_two() -> None:
    stays(
        """
        state @s: f32[3]
        state @t: f32[3]
        entry forward {
          input %x: f32[3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[3] = aten.exp(%x)
          %b: f32[3] = aten.exp(%x)
          update @s = %a
          update @t = %b
          return {}
        }
        """,
        "cse",
    )


def test_entries_are_apart() -> None:
    stays(
        """
        entry forward {
          input %x: f32[3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[3] = aten.exp(%x)
          return %a
        }
        entry decode {
          input %x: f32[3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[3] = aten.exp(%x)
          return %a
        }
        """,
        "cse",
    )


def test_recurrent_layers_without_dropout_draw_nothing() -> None:
    """Their ops are tagged as random; in eval mode they are merged and removed like any other."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cell(x + 1)
            return self.cell(x)[0] + self.cell(x)[0]

    torch.manual_seed(0)
    result = laconic.optimize(Twice(), inputs=(torch.randn(2, 3, 4),))
    assert sum("lstm" in str(n.target) for n in result.program.forward.calls()) == 1


def test_calls_whose_equal_elements_callers_receive_apart_stay_two() -> None:
    text = body(
        """
        %a: (f32[2, 3], i64[2, 3]) = aten.sort(%x)
        %p: i64[2, 3] = operator.getitem(%a, 1)
        %b: (f32[2, 3], i64[2, 3]) = aten.sort(%x)
        %q: i64[2, 3] = operator.getitem(%b, 1)
        return (%p, %q)
        """
    )
    stays(text, "cse")
    fires(text.replace("return (%p, %q)", "%r: i64[2, 3] = aten.add.Tensor(%p, %q)\nreturn (%p, %r)"), "cse")


def test_what_is_merged_moves_up_to_its_operands_and_equal_layers_stay_equal() -> None:
    _, after, _ = fires(
        """
        size n in [1, inf] like 3
        parameter @a: f32[4, 4]
        parameter @b: f32[4, 4]
        entry forward {
          input %x: f32[n, 4] in [-1.0, 1.0]
          input %t: f32[n, 1] in [-1.0, 1.0]
          argument x = %x
          argument t = %t
          %p: f32[n, 4] = aten.linear(%x, @a)
          %c: f32[n, 1] = aten.cos(%t)
          %u: f32[n, 1] = aten.neg(%c)
          %q: f32[n, 4] = aten.mul.Tensor(%p, %u)
          %r: f32[n, 4] = aten.linear(%q, @b)
          %d: f32[n, 1] = aten.cos(%t)
          %v: f32[n, 1] = aten.neg(%d)
          %s: f32[n, 4] = aten.mul.Tensor(%r, %v)
          return %s
        }
        """,
        "cse",
    )
    assert [node.name for node in after.forward.calls()] == ["c", "u", "p", "q", "r", "s"]
