"""dedup: weights with the same bytes are stored once, unless someone could tell them apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers import fires, ops, optimize, parse, stays
from laconic.ir.program import Alias

TWO = """
{first} @a: f32[8, 8]{marks}
{second} @b: f32[8, 8]{marks2}
entry forward {{
  input %x: f32[2, 8] in [-1.0, 1.0]
  argument x = %x
  %p: f32[2, 8] = aten.linear(%x, @a)
  %q: f32[2, 8] = aten.linear(%p, @b)
  return %q
}}
"""


def two(first: str = "parameter", second: str = "parameter", marks: str = "", marks2: str = "") -> str:
    return TWO.format(first=first, second=second, marks=marks, marks2=marks2)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_merges_equal_weights_and_notes_the_alias() -> None:
    value = numbers(8, 8)
    before, after, reason = fires(two(), "dedup", a=value, b=value.clone())
    assert list(after.weights) == ["a"]
    assert after.aliases == {"b": Alias("a")}
    assert before.weight_bytes() == 2 * after.weight_bytes()
    assert reason == "1 same bytes"


def test_nan_bytes_equal_themselves() -> None:
    value = numbers(8, 8)
    value[0, 0] = float("nan")
    fires(two(), "dedup", a=value, b=value.clone())


def _with(change: Callable[[torch.Tensor], None], base: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    first = numbers(8, 8) if base is None else base
    second = first.clone()
    change(second)
    return {"a": first, "b": second}


def _one_ulp(value: torch.Tensor) -> None:
    value[3, 3] = torch.nextafter(value[3, 3], torch.tensor(9.0))


def _other_nan(value: torch.Tensor) -> None:
    value.view(torch.int32)[0, 0] = 0x7FC00001


_NAN = numbers(8, 8)
_NAN[0, 0] = float("nan")

_KEPT = {
    "weights one ULP apart": (two(), _with(_one_ulp)),
    "0.0 and -0.0": (two(), _with(lambda v: v.neg_(), torch.zeros(8, 8))),
    "two NaNs with other payloads": (two(), _with(_other_nan, _NAN)),
    "a parameter and a buffer": (two("parameter", "buffer"), _with(lambda v: None)),
    "a trained and a frozen parameter": (two(marks=" trainable"), _with(lambda v: None)),
    "other strides": (two(marks2="{1, 8}"), {"a": torch.ones(8, 8), "b": torch.ones(8, 8).t()}),
    "another alignment": (two(), {"a": torch.ones(8, 8), "b": torch.ones(65)[1:].view(8, 8)}),
}


@pytest.mark.parametrize(("text", "weights"), _KEPT.values(), ids=_KEPT)
def test_does_not_merge(text: str, weights: dict[str, torch.Tensor]) -> None:
    assert stays(text, "dedup", **weights) == "no two weights hold the same bytes"


def test_other_dtypes_and_shapes_with_equal_bytes_stay() -> None:
    stays(
        """
        buffer @a: f32[4]
        buffer @b: i32[4]
        buffer @c: f32[2, 2]
        entry forward {
          input %x: f32[4] in [-1.0, 1.0]
          argument x = %x
          %p: f32[4] = aten.add.Tensor(%x, @a)
          %q: f32[4] = aten.add.Tensor(%p, @b)
          %r: f32[2, 2] = aten.reshape(%q, [2, 2])
          %s: f32[2, 2] = aten.add.Tensor(%r, @c)
          return %s
        }
        """,
        "dedup",
        a=torch.zeros(4),
        b=torch.zeros(4, dtype=torch.int32),
        c=torch.zeros(2, 2),
    )


@pytest.mark.parametrize("returned", ["@b", "%v"])
def test_a_weight_that_the_caller_receives_stays(returned: str) -> None:
    text = two().replace("return %q", f"%v: f32[8] = aten.select.int(@b, 0, 0)\n  return (%q, {returned})")
    stays(text, "dedup", a=torch.ones(8, 8), b=torch.ones(8, 8))


def test_states_stay_even_when_equal_to_each_other_and_to_a_buffer() -> None:
    stays(
        """
        state @s: f32[4]
        state @t: f32[4]
        buffer @b: f32[4]
        entry forward {
          input %x: f32[4] in [-1.0, 1.0]
          argument x = %x
          %p: f32[4] = aten.add.Tensor(%x, @s)
          %q: f32[4] = aten.add.Tensor(%p, @t)
          %r: f32[4] = aten.add.Tensor(%q, @b)
          update @s = %p
          update @t = %q
          return %r
        }
        """,
        "dedup",
        s=torch.zeros(4),
        t=torch.zeros(4),
        b=torch.zeros(4),
    )


def test_trained_parameters_stay_when_asked() -> None:
    same = {"a": torch.ones(8, 8), "b": torch.ones(8, 8)}
    marked = two(marks=" trainable", marks2=" trainable")
    fires(marked, "dedup", **same)
    stays(marked, "dedup{trainable=no}", **same)
    fires(two(), "dedup{trainable=no}", **same)


PARTS = """
parameter @table: f32[96, 24]{marks}
parameter @part: f32[64, 24]{marks}
entry forward {{
  input %x: f32[2, 24] in [-1.0, 1.0]
  argument x = %x
  %p: f32[2, 96] = aten.linear(%x, @table)
  %q: f32[2, 64] = aten.linear(%x, @part)
  return (%p, %q)
}}
"""


def parts(start: int) -> dict[str, torch.Tensor]:
    table = numbers(96, 24)
    return {"table": table, "part": table[start : start + 64].clone()}


@pytest.mark.parametrize("start", [0, 2, 16, 32])
def test_aligned_rows_of_another_become_a_slice(start: int) -> None:
    before, after, reason = fires(PARTS.format(marks=""), "dedup", **parts(start))
    assert list(after.weights) == ["table"]
    assert after.aliases == {"part": Alias("table", (start, start + 64))}
    assert ops(after) == ["aten.slice.Tensor", *ops(before)]
    assert after.weight_bytes() == 96 * 24 * 4
    assert reason == "1 rows of another"


@pytest.mark.parametrize("start", [1, 3, 31])
def test_misaligned_rows_stay_and_the_reason_names_them(start: int) -> None:
    reason = stays(PARTS.format(marks=""), "dedup", **parts(start))
    assert "part in table" in reason
    assert "boundary" in reason


def test_rows_that_differ_in_one_ulp_stay() -> None:
    given = parts(16)
    given["part"][5, 7] = torch.nextafter(given["part"][5, 7], torch.tensor(9.0))
    stays(PARTS.format(marks=""), "dedup", **given)


def test_rows_stay_when_slices_are_off_or_too_small() -> None:
    stays(PARTS.format(marks=""), "dedup{slices=no}", **parts(16))
    stays(PARTS.format(marks=""), "dedup{min-slice-bytes=6145}", **parts(16))
    fires(PARTS.format(marks=""), "dedup{min-slice-bytes=6144}", **parts(16))


def test_rows_of_a_trained_weight_stay_where_a_product_asks_for_gradients() -> None:
    text = """
        parameter @table: f32[96, 24] trainable
        parameter @part: f32[64, 24] trainable
        entry forward {
          input %x: f32[2, 3, 24] in [-1.0, 1.0]
          argument x = %x
          %t: f32[3, 2, 24]{24, 72, 1} = aten.transpose.int(%x, 0, 1)
          %p: f32[2, 3, 96] = aten.linear(%x, @table)
          %q: f32[3, 2, 64] = aten.linear(%t, @part)
          return (%p, %q)
        }
        """
    assert "requires gradients" in stays(text, "dedup", **parts(16))
    dense = "%c: f32[3, 2, 24] = aten.clone(%t, memory_format=contiguous_format)\n%p:"
    fires(text.replace("(%t, @part)", "(%c, @part)").replace("%p:", dense), "dedup", **parts(16))


def test_aliases_of_a_merged_weight_follow_it() -> None:
    table = numbers(96, 24)
    program = parse(
        PARTS.format(marks="").replace("entry forward", "alias @old = @part\nalias @rows = @part[4:8]\nentry forward"),
        table=table,
        part=table[16:80].clone(),
    )
    aliases = optimize(program, "dedup").program.aliases
    assert aliases["old"] == Alias("table", (16, 80))
    assert aliases["rows"] == Alias("table", (20, 24))
