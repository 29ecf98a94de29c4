"""share-rows: equal rows of embedding tables are stored once, and no bit of a result changes."""

from __future__ import annotations

import pytest
import torch

import laconic
from helpers import fires, ops, stays
from laconic.ir.capture import capture_module

ONE = """
parameter @t: f32[{rows}, 8]
entry forward {{
  input %ids: i64[b, s] in [0, {last}]
  argument ids = %ids
  %e: f32[b, s, 8] = aten.embedding(@t, %ids)
  {more}return %e
}}
"""
TWO = """
parameter @t: f32[40, 8]
parameter @u: f32[30, 8]
entry forward {
  input %ids: i64[2, 3] in [0, 29]
  argument ids = %ids
  %e: f32[2, 3, 8] = aten.embedding(@t, %ids)
  %f: f32[2, 3, 8] = aten.embedding(@u, %ids)
  %g: f32[2, 3, 8] = aten.add.Tensor(%e, %f)
  return %g
}
"""


def table(rows: int, alike: int, seed: int = 0) -> torch.Tensor:
    """Rows of which the last `alike` are all zeros."""
    value = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    value[rows - alike :] = 0.0
    return value


def one(rows: int, more: str = "") -> str:
    return ONE.format(rows=rows, last=rows - 1, more=more).replace("[b, s", "[2, 3")


def test_equal_rows_are_stored_once() -> None:
    value = table(500, 400)
    before, after, reason = fires(one(500), "share-rows", t=value)
    assert reason == "399 rows of 1 tables stored once"
    assert ops(after) == ["aten.embedding.default", "aten.squeeze.dim", "aten.embedding.default"]
    assert before.weight_bytes() - after.weight_bytes() == 399 * 32 - 500 * 4
    rows = next(w.value for name, w in after.weights.items() if name.endswith("_rows"))
    assert torch.equal(rows, value[:101])


def test_bytes_are_compared() -> None:
    """-0.0 is another row than 0.0, and a NaN equals itself."""
    value = table(1000, 900)
    value[500:600] = -0.0
    value[600:700] = torch.nan
    _, after, _ = fires(one(1000), "share-rows", t=value)
    rows = next(w.value for name, w in after.weights.items() if name.endswith("_rows"))
    assert len(rows) == 103


def test_tables_with_rows_in_common_become_one() -> None:
    t = table(40, 20)
    u = torch.cat([t[:25], table(5, 0, seed=3)])
    _, after, _ = fires(TWO, "share-rows{min-bytes=0}", t=t, u=u)
    assert [len(w.value) for name, w in after.weights.items() if name.endswith("_rows")] == [26]
    assert sum(name.endswith("_places") for name in after.weights) == 2
    _, apart, _ = fires(TWO, "share-rows{merge=no,min-bytes=0}", t=t, u=u)
    assert [len(w.value) for name, w in apart.weights.items() if name.endswith("_rows")] == [21, 26]


@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        (one(500), table(500, 0), "no two rows"),
        (one(500), table(500, 40), "39 rows of t would save -752 bytes"),
        (one(500), table(500, 150), "149 rows of t would save 2768 bytes"),
    ],
)
def test_what_is_not_worth_it_stays(text: str, value: torch.Tensor, said: str) -> None:
    assert said in stays(text, "share-rows", t=value)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(300, 8)
        with torch.no_grad():
            self.table.weight[10:] = 0.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids) @ self.table.weight.T


class Lookup(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(300, 8, padding_idx=0)
        with torch.no_grad():
            self.table.weight[10:] = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_a_tied_table_stays() -> None:
    result = laconic.optimize(Tied().eval(), "share-rows", inputs=(torch.tensor([[1, 2, 299]]),))
    assert not result.report.rows[0].modified
    assert "table.weight is read by other calls too" in result.report.rows[0].reason


def test_ids_beyond_the_table_are_refused_as_before() -> None:
    result = laconic.optimize(Lookup().eval(), "share-rows", inputs=(torch.tensor([[1, 2, 299]]),))
    assert result.report.rows[0].modified
    for wrong in (300, -1):
        with pytest.raises(IndexError):
            result.model(torch.tensor([[1, 2, wrong]]))


def test_a_second_run_finds_nothing() -> None:
    program = capture_module(Lookup().eval(), (torch.tensor([[1, 2, 299]]),), {}, None)
    result = laconic.optimize(program, "share-rows,share-rows")
    assert [row.modified for row in result.report.rows] == [True, False]
