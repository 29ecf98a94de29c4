"""dedup{transposed=yes}: a weight that is another one transposed is stored once, if products alone read it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch

from helpers import bits, ops, optimize, own_values, parse, stays
from laconic.ir.errors import ParseError, UsageError
from laconic.ir.parse import parse_program
from laconic.ir.program import Alias, Program
from laconic.ir.run import evaluate
from laconic.ir.signature import content_key, raw_bytes
from laconic.passes.base import Contract
from laconic.passes.dedup import Dedup
from laconic.passes.pipeline import parse_pipeline
from laconic.passes.plans import read_plan, write_plan
from laconic.passes.registry import PRESETS

SPEC = "dedup{transposed=yes}"


def text(calls: str, rows: str = "", results: str = "(%p, %y)", first: str = "", second: str = "") -> str:
    return f"""
    parameter @a: f32[6, 8]{first}
    parameter @b: f32[8, 6]{second}
    parameter @c: f32[8]
    {rows}
    entry forward {{
      input %x: f32[3, 8] in [-1.0, 1.0]
      input %z: f32[3, 6] in [-1.0, 1.0]
      argument x = %x
      argument z = %z
      %p: f32[3, 6] = aten.linear(%x, @a)
      {calls}
      return {results}
    }}
    """


def pair() -> dict[str, torch.Tensor]:
    value = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return {"a": value, "b": value.t().contiguous()}


def turns(source: str, **given: torch.Tensor) -> Program:
    """Run the pass, which must fire, with every check on; it fires once, and what it made reads back."""
    before = parse(source, **given)
    run = optimize(before, SPEC)
    row, after = run.ledger.rows[-1], run.program
    assert row.modified, row.reason
    assert (row.contract, row.spec) == (Contract.TOLERANCE, SPEC)
    assert after.weight_bytes() < before.weight_bytes()
    for name in before.weights:
        assert bits(after.value_of(name)) == bits(before.value_of(name))
    inputs = [torch.randn(3, 8), torch.randn(3, 6)]
    if before.forward.inputs[0].name == "x":
        old, new = (evaluate(p, p.forward, inputs).results for p in (before, after))
        torch.testing.assert_close(new, old)
    again = parse_program(str(after), own_values(after))
    assert (str(again), again.aliases) == (str(after), after.aliases)
    assert not optimize(after, SPEC).ledger.rows[-1].modified
    return after


_PLAINEST = {
    "linear": ("%y: f32[3, 8] = aten.linear(%z, @b)", ["aten.matmul.default"]),
    "linear with a bias": ("%y: f32[3, 8] = aten.linear(%z, @b, @c)", ["aten.addmm.default"]),
    "matmul": ("%y: f32[3, 6] = aten.matmul(%x, @b)", ["aten.linear.default"]),
    "mm": ("%y: f32[3, 6] = aten.mm(%x, @b)", ["aten.linear.default"]),
    "a transpose of it": (
        "%t: f32[6, 8]{1, 6} = aten.t(@b)\n%y: f32[3, 6] = aten.linear(%x, %t)",
        ["aten.linear.default"],
    ),
    "linear of three axes with a bias": (
        "%r: f32[1, 3, 6] = aten.unsqueeze(%z, 0)\n%y: f32[1, 3, 8] = aten.linear(%r, @b, @c)",
        ["aten.unsqueeze.default", "aten.permute.default", "aten.linear.default"],
    ),
}


@pytest.mark.parametrize(("calls", "left"), _PLAINEST.values(), ids=_PLAINEST)
def test_the_product_is_said_the_other_way(calls: str, left: list[str]) -> None:
    after = turns(text(calls), **pair())
    assert ops(after)[1:] == left
    assert after.aliases == {"b": Alias("a", transposed=True)}
    assert "alias @b = transpose @a" in str(after)
    assert next(reversed(list(after.forward.calls()))).meta["by"] == "dedup"


def test_a_table_that_is_looked_up_stays_and_the_head_goes() -> None:
    source = """
    parameter @head: f32[8, 16]
    parameter @table: f32[16, 8]
    entry forward {
      input %i: i64[3] in [0, 15]
      argument i = %i
      %e: f32[3, 8] = aten.embedding(@table, %i)
      %y: f32[3, 16] = aten.matmul(%e, @head)
      return %y
    }
    """
    table = torch.randn(16, 8)
    after = turns(source, table=table, head=table.t().contiguous())
    assert list(after.weights) == ["table"]
    assert ops(after) == ["aten.embedding.default", "aten.linear.default"]


def test_square_weights_and_aliases_that_followed() -> None:
    source = """
    parameter @a: f32[8, 8]
    parameter @b: f32[8, 8]
    alias @part = @b[2:4]
    alias @all = @b
    entry forward {
      input %x: f32[3, 8] in [-1.0, 1.0]
      input %z: f32[3, 6] in [-1.0, 1.0]
      argument x = %x
      argument z = %z
      %p: f32[3, 8] = aten.linear(%x, @a)
      %y: f32[3, 8] = aten.linear(%p, @b)
      return %y
    }
    """
    value = torch.randn(8, 8)
    after = turns(source, a=value, b=value.t().contiguous())
    assert after.aliases["all"] == Alias("a", transposed=True)
    assert after.aliases["part"] == Alias("a", columns=(2, 4), transposed=True)
    assert "alias @part = transpose @a[:, 2:4]" in str(after)
    assert bits(after.value_of("part")) == bits(value.t()[2:4])


LINEAR = "%y: f32[3, 8] = aten.linear(%z, @b)"


def test_stays_without_the_option_and_is_exact_then() -> None:
    assert Dedup().contract is Contract.EXACT
    assert Dedup(transposed=True).contract is Contract.TOLERANCE
    stays(text(LINEAR), "dedup", **pair())


def test_an_exact_preset_takes_no_pass_that_is_configured_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "exact", "cse,dedup{transposed=yes}")
    with pytest.raises(UsageError, match="holds only exact passes"):
        parse_pipeline("exact")


_BROKEN = {
    "alias @b = transpose @c": "'c' is no matrix",
    "alias @b = @c[0:2, 0:2]": "'c' has no columns",
    "alias @b = @a[:, 3:9]": "no columns 3 to 9",
    "alias @b = transpose @a[7:8]": "no rows 7 to 8",
    "alias @b = transpose none": "expected a weight",
    "alias @b = transposed @a": "expected a weight",
    "alias @b = @a[0:1, 0:1, 0:1]": "expected ']'",
}


@pytest.mark.parametrize("line", _BROKEN)
def test_a_damaged_alias_is_an_error_at_its_place(line: str) -> None:
    source = text("%y: f32[3, 6] = aten.linear(%x, @a)").replace("parameter @b: f32[8, 6]", "")
    with pytest.raises(ParseError, match=re.escape(_BROKEN[line])) as caught:
        parse(source.replace("entry forward", line + "\nentry forward"))
    assert caught.value.column > 1


def test_views_of_views() -> None:
    value = torch.arange(48).reshape(6, 8)
    for outer in (Alias("a"), Alias("a", (1, 5)), Alias("a", (1, 5), (2, 7)), Alias("a", (1, 6), None, True)):
        for inner in (Alias("b", (1, 3)), Alias("b", (0, 3), (1, 3), True), Alias("b", transposed=True)):
            assert torch.equal(inner.through(outer).of(value), inner.of(outer.of(value)))
    assert Alias("b", (1, 3)).through(Alias(None)) == Alias(None)


def _one_bit(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    given["b"].view(torch.int32)[1, 1] ^= 1
    return given


def _minus_zero(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    given["a"][0, 1], given["b"][1, 0] = 0.0, -0.0
    return given


BETA = text("%y: f32[3, 6] = aten.addmm(%z, %x, @b, beta=0.5)\n%o: f32[6, 8] = aten.exp(@a)", results="(%p, %y, %o)")
_STAYS = {
    "one bit differs": (text(LINEAR), _one_bit(pair())),
    "0.0 and -0.0": (text(LINEAR), _minus_zero(pair())),
    "trained and frozen": (text(LINEAR, first=" trainable"), pair()),
    "a parameter and a buffer": (text(LINEAR).replace("parameter @b", "buffer @b"), pair()),
    "received by a caller": (text(LINEAR, results="(%p, %y, @b)"), pair()),
    "a view of it is received": (
        text(LINEAR + "\n%v: f32[8]{6} = aten.select.int(@b, 1, 0)", results="(%p, %y, %v)"),
        pair(),
    ),
    "states": (text(LINEAR + "\nupdate @b = @b").replace("parameter @b", "state @b"), pair()),
    "equal as they lie, not transposed": (text(LINEAR), {"a": pair()["a"], "b": pair()["a"].reshape(8, 6)}),
    "addmm that weighs its parts": (BETA, pair()),
}


@pytest.mark.parametrize(("source", "weights"), _STAYS.values(), ids=_STAYS)
def test_does_not_merge(source: str, weights: dict[str, torch.Tensor]) -> None:
    stays(source, SPEC, **weights)


def test_what_other_calls_read_stays_and_the_reason_says_so() -> None:
    both = LINEAR + "\n%q: f32[8, 6] = aten.exp(@b)\n%r: f32[6, 8] = aten.exp(@a)"
    reason = stays(text(both, results="(%p, %y, %q, %r)"), SPEC, **pair())
    assert "not only products read them" in reason
    one = LINEAR + "\n%q: f32[8, 6] = aten.exp(@b)"
    assert list(turns(text(one, results="(%p, %y, %q)"), **pair()).weights) == ["b", "c"]


def test_a_row_of_the_state_dict_stays_one() -> None:
    assert list(turns(text(LINEAR, second=" transient"), **pair()).weights) == ["a", "c"]
    assert list(turns(text(LINEAR, first=" transient"), **pair()).weights) == ["b", "c"]


def test_trained_ones_merge_unless_told_not_to() -> None:
    source = text(LINEAR, first=" trainable", second=" trainable")
    turns(source, **pair())
    stays(source, "dedup{trainable=no,transposed=yes}", **pair())


def test_the_plan_replays(tmp_path: Path) -> None:
    program = parse(text(LINEAR), **pair())
    item = Dedup(transposed=True)
    plan = item.plan(program)
    write_plan(plan, tmp_path, 0)
    assert str(item.apply(program, read_plan(tmp_path, 0)).program) == str(item.apply(program, plan).program)


@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (2048, 1500), (3, 1 << 21)])
def test_a_content_key_is_that_of_the_bytes_in_row_major_order(shape: tuple[int, ...]) -> None:
    value = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape)
    assert content_key(value.t()) == content_key(value.t().contiguous())
    assert content_key(value.t()) != content_key(value) or 1 in shape
    assert bytes(raw_bytes(value.t()))[:64] == value.t().contiguous().numpy().tobytes()[:64]


@pytest.mark.slow
def test_large_weights_are_compared_without_copies() -> None:
    """Peak memory of planning stays far below one of the two matrices."""
    value = torch.randn(8192, 8200)
    source = text(LINEAR).replace("[6, 8]", "[8192, 8200]").replace("[8, 6]", "[8200, 8192]").replace("[8]", "[8200]")
    source = source.replace("[3, 8]", "[3, 8200]").replace("[3, 6]", "[3, 8192]")
    program = parse(source, a=value, b=value.t().contiguous(), c=torch.zeros(8200))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(Dedup(transposed=True).plan(program).actions) == 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
    assert grown < 0.3 * value.numel() * 4
