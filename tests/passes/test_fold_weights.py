"""fold-weights: transposes, scales, shifts and norms' weights go into the weights of products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from architectures import make
from helpers import bits, ops, optimize, parse, stays
from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError, VerificationError
from laconic.ir.inputs import cases
from laconic.ir.program import Alias, Kind, Program
from laconic.ir.run import evaluate
from laconic.ir.verify import verify
from laconic.passes.base import Contract
from laconic.passes.contracts import check_weights
from laconic.passes.fold_weights import FoldWeights
from laconic.passes.pipeline import parse_pipeline
from laconic.passes.plans import read_plan, write_plan


def folds(text: str, pipeline: str = "fold-weights", folder: Path | None = None, **given: torch.Tensor) -> Program:
    """Run the pass, which must fire, with every check on. It keeps results, adds no bytes, fires once, and replays."""
    before = parse(text, **given)
    run = optimize(before, pipeline)
    row, after = run.ledger.rows[-1], run.program
    assert row.modified, row.reason
    assert row.contract == Contract.TOLERANCE
    for case in cases(before, before.forward):
        old, new = (evaluate(p, p.forward, case.clone()).results for p in (before, after))
        for x, y in zip(old, new, strict=True):
            room = max(1e-4, 8 * torch.finfo(x.dtype).eps)
            torch.testing.assert_close(y, x, rtol=room, atol=room)
    assert after.weight_bytes() <= before.weight_bytes()
    assert not optimize(after, pipeline).ledger.rows[-1].modified
    if folder is not None:
        write_plan(run.plans[-1], folder, 0)
        again = parse_pipeline(pipeline)[0].apply(before, read_plan(folder, 0)).program
        assert str(again) == str(after)
        assert {n: bits(w.value) for n, w in again.weights.items()} == {
            n: bits(w.value) for n, w in after.weights.items()
        }
    return after


def body(rows: str, calls: str, results: str = "%y", x: str = "f32[batch, 8]") -> str:
    return f"""
    size batch in [1, inf] like 3
    {rows}
    entry forward {{
      input %x: {x} in [-1.0, 1.0]
      argument x = %x
      {calls}
      return {results}
    }}
    """


W = "parameter @w: f32[6, 8] trainable"
B = "parameter @b: f32[6] trainable"
LINEAR = "%l: f32[batch, 6] = aten.linear(%x, @w, @b)"


# Transposes


def test_a_transpose_in_the_graph_becomes_the_other_op() -> None:
    calls = "%t: f32[8, 6]{1, 8} = aten.permute(@w, [1, 0])\n%y: f32[batch, 6] = aten.matmul(%x, %t)"
    after = folds(body(W, calls))
    assert ops(after) == ["aten.linear.default"]
    assert list(after.weights) == ["w"]
    assert after.aliases == {}


@pytest.mark.parametrize(
    "calls",
    [
        "%y: f32[batch, 6] = aten.addmm(@b, %x, @w)",
        "%t: f32[6, 8]{1, 6} = aten.t(@w)\n%y: f32[batch, 6] = aten.linear(%x, %t, @b)",
        "%t: f32[6, 8]{1, 6} = aten.transpose.int(@w, -1, 0)\n%y: f32[batch, 6] = aten.linear(%x, %t, @b)",
    ],
)
def test_a_weight_that_all_products_read_the_other_way_is_stored_so(calls: str, tmp_path: Path) -> None:
    rows = f"parameter @w: f32[8, 6] trainable\n{B}\nalias @old = @w"
    value = torch.randn(8, 6)
    after = folds(body(rows, calls), folder=tmp_path, w=value)
    assert ops(after) == ["aten.linear.default"]
    assert after.aliases["w"] == after.aliases["old"] == Alias("w_transposed", transposed=True)
    assert after.weights["w_transposed"].kind is Kind.PARAMETER
    assert after.weights["w_transposed"].trainable
    assert bits(after.value_of("w")) == bits(value)
    assert next(after.forward.calls()).meta["by"] == "fold-weights"


def test_one_transposed_weight_serves_several_products() -> None:
    rows = "parameter @w: f32[8, 8]"
    calls = "%p: f32[batch, 8] = aten.mm(%x, @w)\n%y: f32[batch, 8] = aten.matmul(%p, @w)"
    after = folds(body(rows, calls))
    assert ops(after) == ["aten.linear.default"] * 2
    assert list(after.weights) == ["w_transposed"]


TABLE = """
    parameter @w: f32[16, 8]
    entry forward {{
      input %i: i64[3] in [0, 15]
      argument i = %i
      %e: f32[3, 8] = aten.embedding(@w, %i)
      {calls}
      return %y
    }}
    """


def test_a_tied_table_is_never_stored_twice() -> None:
    calls = "%t: f32[8, 16]{1, 8} = aten.t(@w)\n%y: f32[3, 16] = aten.matmul(%e, %t)"
    after = folds(TABLE.format(calls=calls))
    assert ops(after) == ["aten.embedding.default", "aten.linear.default"]
    assert list(after.weights) == ["w"]
    calls = "%s: f32[3, 8] = aten.mul.Tensor(%e, 2.0)\n%y: f32[3, 16] = aten.linear(%s, @w)"
    assert "'w' has other users" in stays(TABLE.format(calls=calls), "fold-weights")
    calls = "%r: f32[3, 16] = aten.reshape(%e, [3, 8])\n".replace("16", "8") + "%y: f32[3, 8] = aten.matmul(%r, @v)"
    both = TABLE.replace("parameter @w", "parameter @v: f32[8, 8]\n    parameter @w")
    folds(both.format(calls=calls))
    looked_up = both.format(calls=calls + "\n%z: f32[3, 8] = aten.embedding(@v, %h)").replace(
        "return %y", "return (%y, %z)"
    )
    looked_up = looked_up.replace("%e: f32", "%h: i64[3] = aten.remainder.Scalar(%i, 8)\n%e: f32")
    assert "v (not only products read it)" in stays(looked_up, "fold-weights")


def test_products_that_read_a_weight_both_ways_leave_it() -> None:
    rows = "parameter @w: f32[8, 8]"
    calls = "%p: f32[batch, 8] = aten.linear(%x, @w)\n%y: f32[batch, 8] = aten.matmul(%p, @w)"
    assert "both ways" in stays(body(rows, calls), "fold-weights")
    calls = calls.replace("%y", "%t: f32[8, 8]{1, 8} = aten.t(@w)\n%y").replace("(%p, @w)", "(%p, %t)")
    assert ops(folds(body(rows, calls))) == ["aten.linear.default"] * 2


def test_transposes_stay_when_they_are_off_are_returned_or_no_weight_is_involved() -> None:
    addmm = body(f"parameter @w: f32[8, 6]\n{B}", "%y: f32[batch, 6] = aten.addmm(@b, %x, @w)")
    stays(addmm, "fold-weights{transposes=no}")
    stays(addmm.replace("(@b, %x, @w)", "(@b, %x, @w, beta=2)"), "fold-weights")
    stays(addmm.replace("(@b, %x, @w)", "(@b, %x, @w, alpha=0.5)"), "fold-weights")
    stays(addmm.replace("return %y", "return (%y, @w)"), "fold-weights")
    stays(
        body("state @w: f32[8, 6]\n" + B, "%y: f32[batch, 6] = aten.addmm(@b, %x, @w)\nupdate @w = @w"), "fold-weights"
    )


# Scales behind a product

_BEHIND = {
    "a number": "aten.mul.Tensor(%l, 0.125)",
    "a number first": "aten.mul.Tensor(@s, %l)",
    "a vector": "aten.mul.Tensor(%l, @v)",
    "a vector with more axes": "aten.mul.Tensor(%l, @u)",
    "a division": "aten.div.Tensor(%l, @v)",
    "a division by a number": "aten.div.Scalar(%l, 3)",
    "a sum": "aten.add.Tensor(%l, @v)",
    "a difference": "aten.sub.Tensor(%l, @v)",
    "a reversed difference": "aten.sub.Tensor(@v, %l)",
    "rsub": "aten.rsub.Scalar(%l, 2.0)",
    "batch norm": "aten.batch_norm(%l, @v, @t, @m, @v, False, 0.1, 1e-05, True)",
    "batch norm without weights": "aten.batch_norm(%l, None, None, @m, @v, False, 0.1, 1e-05, True)",
}
CONSTANTS = f"""{W}
    {B}
    buffer @v: f32[6]
    parameter @t: f32[6]
    buffer @m: f32[6]
    constant @u: f32[1, 6]
    constant @s: f32[]"""
VECTOR = torch.tensor([0.5, 1.5, 0.3, 2.0, 0.7, 1.1])


@pytest.mark.parametrize("call", _BEHIND.values(), ids=_BEHIND)
def test_folds_behind_a_product(call: str, tmp_path: Path) -> None:
    after = folds(body(CONSTANTS, f"{LINEAR}\n%y: f32[batch, 6] = {call}"), folder=tmp_path, v=VECTOR)
    assert ops(after) == ["aten.linear.default"]
    assert after.aliases.get("w") in (None, Alias(None))
    moved = [w for name, w in after.weights.items() if name.startswith("folded_")]
    assert moved
    assert {w.kind for w in moved} == {Kind.CONSTANT}


def test_a_weight_that_keeps_its_bytes_keeps_its_name() -> None:
    after = folds(body(CONSTANTS, f"{LINEAR}\n%y: f32[batch, 6] = aten.add.Tensor(%l, @v)"))
    assert "w" in after.weights
    assert after.aliases["b"] == Alias(None)


def test_a_chain_is_rounded_once() -> None:
    calls = f"{LINEAR}\n%a: f32[batch, 6] = aten.mul.Tensor(%l, @v)\n%c: f32[batch, 6] = aten.add.Tensor(%a, 0.1)\n"
    calls += "%y: f32[batch, 6] = aten.div.Tensor(%c, 3.0)"
    given = {"w": torch.randn(6, 8), "b": torch.randn(6), "v": VECTOR}
    after = folds(body(CONSTANTS, calls), **given)
    assert ops(after) == ["aten.linear.default"]
    scale = given["v"].double() * (1 / torch.tensor(3.0, dtype=torch.float64))
    expected = (given["w"].double() * scale[:, None]).float()
    assert torch.allclose(after.weights["folded_w"].value, expected, rtol=0, atol=float(2**-24))
    wide = (given["b"].double() * given["v"].double() + 0.1) / 3
    assert torch.allclose(after.weights["folded_b"].value, wide.float(), rtol=0, atol=float(2**-24))


def test_adding_a_bias_to_a_product_without_one() -> None:
    rows = "parameter @w: f32[8, 6]\n" + B
    after = folds(body(rows, "%l: f32[batch, 6] = aten.matmul(%x, @w)\n%y: f32[batch, 6] = aten.add.Tensor(%l, @b)"))
    assert ops(after) == ["aten.linear.default"]
    plan = FoldWeights().plan(
        parse(body(rows, "%l: f32[batch, 6] = aten.matmul(%x, @w)\n%y: f32[batch, 6] = aten.add.Tensor(%l, @b)"))
    )
    assert [a["rule"] for a in plan.actions] == ["shift", "transpose"]


def test_sites_restrict_a_plan() -> None:
    calls = (
        f"{LINEAR} !4\n%y: f32[batch, 6] = aten.mul.Tensor(%l, 0.5) !5\n%p: f32[batch, 8] = aten.linear(%y, @k) !6\n"
    )
    calls += "%q: f32[batch, 8] = aten.mul.Tensor(%p, 0.5) !7"
    program = parse(body(f"{W}\n{B}\nparameter @k: f32[8, 6]", calls, "%q") + '\nsite 4..7 = "" ""')
    part = FoldWeights().plan(program).restricted({7})
    after = FoldWeights().apply(program, part).program
    verify(after)
    assert ops(after) == ["aten.linear.default", "aten.mul.Tensor", "aten.linear.default"]
    assert [n.meta["site"] for n in after.forward.calls()] == [4, 5, 6]


SCALED = f"{LINEAR}\n%s: f32[batch, 6] = aten.mul.Tensor(%l, @v)"
OF_INPUT = f"{LINEAR}\n%n: f32[batch, 1] = aten.mean.dim(%x, [1], True)\n%y: f32[batch, 6] = aten.mul.Tensor(%l, %n)"
TRAINING = f"{LINEAR}\n%y: f32[batch, 6] = aten.batch_norm(%l, @v, @t, None, None, True, 0.1, 1e-05, True)"
_NOT_BEHIND = {
    "the product is used elsewhere": (f"{SCALED}\n%y: f32[batch, 6] = aten.add.Tensor(%s, %l)", "more than"),
    "the scale depends on the input": (OF_INPUT, ""),
    "other dtype": (f"{LINEAR}\n%y: f64[batch, 6] = aten.mul.Tensor(%l, @d)", ""),
    "the other way round": (f"{LINEAR}\n%y: f32[batch, 6] = aten.div.Tensor(@v, %l)", ""),
    "rounding": (f'{LINEAR}\n%y: f32[batch, 6] = aten.div.Tensor_mode(%l, 2.0, rounding_mode="floor")', ""),
    "alpha": (f"{LINEAR}\n%y: f32[batch, 6] = aten.add.Tensor(%l, @v, alpha=2)", ""),
    "a zero": (f"{LINEAR}\n%y: f32[batch, 6] = aten.mul.Tensor(%l, 0.0)", "holds a zero"),
    "infinity": (f"{LINEAR}\n%y: f32[batch, 6] = aten.mul.Tensor(%l, inf)", "not finite"),
    "not a number": (f"{LINEAR}\n%y: f32[batch, 6] = aten.add.Tensor(%l, nan)", "not finite"),
    "division by zero": (f"{LINEAR}\n%y: f32[batch, 6] = aten.div.Tensor(%l, 0)", "not finite"),
    "overflow": (f"{LINEAR}\n%y: f32[batch, 6] = aten.mul.Tensor(%l, 1e+39)", "cannot hold"),
    "underflow": (f"{LINEAR}\n%y: f32[batch, 6] = aten.mul.Tensor(%l, 1e-37)", "cannot hold"),
    "batch norm in training": (TRAINING, ""),
    "a matrix": (f"{LINEAR}\n%y: f32[6, 6] = aten.mul.Tensor(%l, @g)", ""),
}  # fmt: skip


@pytest.mark.parametrize(("calls", "said"), _NOT_BEHIND.values(), ids=_NOT_BEHIND)
def test_does_not_fold_behind(calls: str, said: str) -> None:
    text = body(CONSTANTS + "\nbuffer @d: f64[6]\nbuffer @g: f32[6, 6]", calls)
    if "f32[6, 6] = aten.mul" in calls:
        text = text.replace("batch, ", "6, ").replace("size batch in [1, inf] like 3", "")
    assert said in stays(text, "fold-weights{transposes=no}", v=VECTOR)


def test_a_scale_along_another_axis_stays() -> None:
    text = body(
        "parameter @w: f32[6, 8]\nbuffer @v: f32[6, 1]",
        "%l: f32[6, 6] = aten.linear(%x, @w)\n%y: f32[6, 6] = aten.mul.Tensor(%l, @v)",
        x="f32[6, 8]",
    )
    assert "another axis" in stays(text, "fold-weights")
    folds(text.replace("f32[6, 1]", "f32[1, 6]"))


def test_what_is_shared_computed_trained_or_received_by_a_caller_stays() -> None:
    scaled = "%y: f32[batch, 6] = aten.mul.Tensor(%l, @v)"
    twice = f"{LINEAR}\n{scaled}\n%z: f32[batch, 6] = aten.linear(%x, @w)"
    assert "other users" in stays(body(CONSTANTS, twice, "(%y, %z)"), "fold-weights", v=VECTOR)
    assert "a caller receives" in stays(body(CONSTANTS, f"{LINEAR}\n{scaled}", "(%y, @b)"), "fold-weights", v=VECTOR)
    stays(body(CONSTANTS, f"{LINEAR}\n{scaled}", "(%y, @v)"), "fold-weights", v=VECTOR)
    assert "trained" in stays(body(CONSTANTS, f"{LINEAR}\n{scaled}"), "fold-weights{trainable=no}", v=VECTOR)
    frozen = CONSTANTS.replace(" trainable", "")
    folds(body(frozen, f"{LINEAR}\n{scaled}"), "fold-weights{trainable=no}", v=VECTOR)
    trained = frozen.replace("@t: f32[6]", "@t: f32[6] trainable")
    assert "trained" in stays(body(trained, f"{LINEAR}\n{scaled}".replace("@v", "@t")), "fold-weights{trainable=no}")
    stays(body(CONSTANTS, f"{LINEAR}\n{scaled}"), "fold-weights{scales=no}", v=VECTOR)
    shared = torch.randn(60)
    views = {"w": shared[:48].view(6, 8), "b": shared[48:54], "v": VECTOR}
    assert "other users" in stays(body(CONSTANTS, f"{LINEAR}\n{scaled}"), "fold-weights", **views)


def test_a_scale_that_others_read_is_folded_and_stays() -> None:
    calls = f"{LINEAR}\n%s: f32[batch, 6] = aten.mul.Tensor(%l, @v)\n%y: f32[batch, 6] = aten.tanh(%s)\n"
    calls += "%z: f32[batch, 6] = aten.sub.Tensor(%y, @v)"
    after = folds(body(CONSTANTS, calls, "%z"), v=VECTOR)
    assert "v" in after.weights
    assert ops(after) == ["aten.linear.default", "aten.tanh.default", "aten.sub.Tensor"]


def test_a_bias_that_would_cost_more_than_it_saves_is_not_made() -> None:
    text = body(W, "%l: f32[batch, 6] = aten.linear(%x, @w)\n%y: f32[batch, 6] = aten.add.Tensor(%l, 0.5)")
    assert "more bytes" in stays(text, "fold-weights")


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
def test_other_dtypes_are_rounded_to_themselves(dtype: str) -> None:
    text = body(CONSTANTS, f"{LINEAR}\n%y: f32[batch, 6] = aten.mul.Tensor(%l, @v)").replace("f32", dtype)
    kind = {"f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}[dtype]
    after = folds(text, v=VECTOR.to(kind))
    assert after.weights["folded_w"].value.dtype == kind


# Convolutions

CONV = "%c: f32[batch, 4, 5, 5] = aten.conv2d(%x, @w, {bias}, [1, 1], [1, 1], [1, 1], {groups})"
INFERENCE = "aten._native_batch_norm_legit_no_training"
NORM = f"""%n: (f32[batch, 4, 5, 5], f32[0], f32[0]) = {INFERENCE}(%c, @g, @h, @m, @v, 0.1, 1e-05)
      %y: f32[batch, 4, 5, 5] = operator.getitem(%n, 0)"""
ROWS = """parameter @w: f32[4, {columns}, 3, 3]
    parameter @b: f32[4]
    parameter @g: f32[4]
    parameter @h: f32[4]
    buffer @m: f32[4]
    buffer @v: f32[4]
    buffer @p: f32[4, 1, 1]"""
IMAGE = "f32[batch, 4, 5, 5]"
POSITIVE = torch.tensor([0.5, 1.5, 0.7, 1.2])


@pytest.mark.parametrize("bias", ["@b", "None"])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_goes_into_the_convolution(bias: str, groups: int, tmp_path: Path) -> None:
    calls = CONV.format(bias=bias, groups=groups) + "\n" + NORM
    after = folds(body(ROWS.format(columns=4 // groups), calls, x=IMAGE), folder=tmp_path, v=POSITIVE)
    assert ops(after) == ["aten.conv2d.default"]
    made = {name for name in after.weights if name.startswith("folded_")}
    assert made == {"folded_w", "folded_b" if bias == "@b" else "folded_w_bias"}
    assert after.aliases["g"] == after.aliases["m"] == Alias(None)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_scale_of_the_inputs_goes_into_a_convolution(groups: int) -> None:
    calls = "%s: f32[batch, 4, 5, 5] = aten.mul.Tensor(%x, @p)\n" + CONV.format(bias="@b", groups=groups)
    text = body(ROWS.format(columns=4 // groups), calls.replace("(%x, @w", "(%s, @w"), "%c", x=IMAGE)
    assert ops(folds(text)) == ["aten.conv2d.default"]
    assert "padding" in stays(text.replace("mul.Tensor", "add.Tensor"), "fold-weights")
    assert "another axis" in stays(text.replace("@p: f32[4, 1, 1]", "@p: f32[5]"), "fold-weights")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_its_outputs_in_the_columns(groups: int) -> None:
    rows = f"parameter @w: f32[4, {6 // groups}, 3]\nbuffer @p: f32[6, 1]\nbuffer @q: f32[4, 1]"
    calls = f"""%s: f32[batch, 4, 5] = aten.mul.Tensor(%x, @q)
      %c: f32[batch, 6, 7] = aten.conv_transpose1d(%s, @w, None, [1], [0], [0], {groups})
      %y: f32[batch, 6, 7] = aten.div.Tensor(%c, @p)"""
    after = folds(body(rows, calls, x="f32[batch, 4, 5]"), p=VECTOR.reshape(6, 1))
    assert ops(after) == ["aten.conv_transpose1d.default"]


def test_a_batch_norm_that_others_read_stays() -> None:
    calls = CONV.format(bias="None", groups=1) + "\n" + NORM + "\n%z: f32[batch, 4, 5, 5] = aten.relu(%c)"
    assert "more than" in stays(body(ROWS.format(columns=4), calls, "(%y, %z)", x=IMAGE), "fold-weights", v=POSITIVE)


# Before products

NORMED = """{norm}
      %p: f32[batch, 6] = aten.linear(%h, @w, @b)
      %q: f32[batch, 5] = aten.linear(%h, @k, @e)"""
PAIR = f"{W}\n{B}\nparameter @k: f32[5, 8]\nparameter @e: f32[5]\nparameter @g: f32[8]\nparameter @s: f32[8]"
RMS = """%p2: f32[batch, 8] = aten.pow.Tensor_Scalar(%x, 2)
      %m: f32[batch, 1] = aten.mean.dim(%p2, [-1], True)
      %a: f32[batch, 1] = aten.add.Tensor(%m, 1e-06)
      %r: f32[batch, 1] = aten.rsqrt(%a)
      %z: f32[batch, 8] = aten.mul.Tensor(%x, %r)
      """

_NORMS = {
    "layer norm": ("%h: f32[batch, 8] = aten.layer_norm(%x, [8], @g, @s)", "aten.layer_norm.default"),
    "layer norm without a shift": ("%h: f32[batch, 8] = aten.layer_norm(%x, [8], @g)", "aten.layer_norm.default"),
    "rms norm": ("%h: f32[batch, 8] = aten.rms_norm(%x, [8], @g, 1e-06)", "aten.rms_norm.default"),
    "rms norm written out": (RMS + "%h: f32[batch, 8] = aten.mul.Tensor(@g, %z)", "aten.mul.Tensor"),
    "one more than the weight": (
        RMS + "%o: f32[8] = aten.add.Tensor(@g, 1.0)\n%h: f32[batch, 8] = aten.mul.Tensor(%z, %o)",
        "aten.mul.Tensor",
    ),
    "two scales": (
        RMS + "%o: f32[batch, 8] = aten.mul.Tensor(%z, @g)\n%h: f32[batch, 8] = aten.mul.Tensor(%o, 0.5)",
        "aten.mul.Tensor",
    ),
    "batch norm": ("%h: f32[batch, 8] = aten.batch_norm(%x, @g, @s, @s, @n, False, 0.1, 1e-05, True)", ""),
}


@pytest.mark.parametrize(("norm", "left"), _NORMS.values(), ids=_NORMS)
def test_a_norms_weights_go_into_all_products_that_read_it(norm: str, left: str, tmp_path: Path) -> None:
    text = body(PAIR + "\nbuffer @n: f32[8]", NORMED.format(norm=norm), "(%p, %q)")
    after = folds(text, folder=tmp_path, n=torch.rand(8) + 0.5)
    assert ops(after)[-2:] == ["aten.linear.default"] * 2
    assert ops(after)[:-2][-1:] == ([left] if left else [])
    assert after.aliases["g"] == Alias(None)
    assert {"folded_w", "folded_k"} <= set(after.weights)


LAYER_NORM = "%h: f32[batch, 8] = aten.layer_norm(%x, [8], @g, @s)"
SCALE = "%h: f32[batch, 8] = aten.mul.Tensor(%x, @g)"
_NOT_BEFORE = {
    "a residual reads it": (f"{LAYER_NORM}\n%i: f32[batch, 8] = aten.add.Tensor(%h, %x)", "more than products"),
    "it is returned": (LAYER_NORM, "more than products"),
    "a product's weight is shared": (f"{LAYER_NORM}\n%i: f32[batch, 6] = aten.linear(%x, @w)", "other users"),
    "a product multiplies by it": (f"{SCALE}\n%i: f32[batch, batch] = aten.linear(%x, %h)", "more than products"),
    "the scale is no constant": (SCALE.replace("@g", "%i").replace("%h", "%i: f32[batch, 8] = aten.exp(%x)\n%h"), ""),
}


@pytest.mark.parametrize(("norm", "said"), _NOT_BEFORE.values(), ids=_NOT_BEFORE)
def test_does_not_fold_before(norm: str, said: str) -> None:
    results = "(%p, %q, %h)" if said.startswith("more") and "%i" not in norm else "(%p, %q, %i)"
    assert said in stays(body(PAIR, NORMED.format(norm=norm), results), "fold-weights")


def test_a_scale_between_two_products_goes_into_one_of_them() -> None:
    calls = f"{LINEAR}\n%s: f32[batch, 6] = aten.mul.Tensor(%l, @v)\n%y: f32[batch, 8] = aten.linear(%s, @k)"
    rows = CONSTANTS + "\nparameter @k: f32[8, 6]"
    assert "folded_k" not in folds(body(rows, calls), v=VECTOR).weights
    tied = calls + "\n%z: f32[batch, 6] = aten.linear(%y, @w)"
    after = folds(body(rows, tied, "(%y, %z)"), v=VECTOR)
    assert "folded_k" in after.weights
    assert "w" in after.weights


def test_both_sides_and_the_transpose_of_one_product() -> None:
    rows = "parameter @w: f32[8, 6]\nparameter @b: f32[6]\nbuffer @v: f32[6]\nbuffer @g: f32[8]"
    calls = """%s: f32[batch, 8] = aten.mul.Tensor(%x, @g)
      %l: f32[batch, 6] = aten.addmm(@b, %s, @w)
      %y: f32[batch, 6] = aten.mul.Tensor(%l, @v)"""
    given = {"w": torch.randn(8, 6), "g": torch.rand(8) + 0.5, "v": VECTOR}
    after = folds(body(rows, calls), **given)
    assert ops(after) == ["aten.linear.default"]
    assert after.aliases["w"] == Alias(None)
    wide = given["w"].double() * given["g"].double()[:, None] * given["v"].double()
    assert torch.equal(after.weights["folded_w"].value, wide.t().float().contiguous())


# Models


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "gone"),
    [("resnet", 20), ("gpt2", 0), pytest.param("vit", 0, marks=_SLOW), pytest.param("llama", 5, marks=_SLOW)],
)
def test_models_keep_their_results(name: str, gone: int) -> None:
    module, inputs, axes = make(name)
    with torch.no_grad():  # as after training: norms and biases that do something
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    program = capture_module(module, (), inputs, axes, check=False)
    run = optimize(program, "exact,fold-weights")
    folded, exact = run.ledger.rows[-1], run.ledger.rows[-2]
    assert folded.modified
    assert exact.after.nodes - folded.after.nodes == gone
    assert folded.after.weight_bytes <= exact.after.weight_bytes
    left = ops(run.program)
    assert "aten.addmm.default" not in left
    assert not any("batch_norm" in op for op in left)
    if name == "vit":
        norms = [n for n in run.program.forward.calls() if "layer_norm" in str(n.target)]
        assert [n.args[2] is None for n in norms] == [True] * 4 + [False]
    assert not optimize(run.program, "fold-weights").ledger.rows[-1].modified


# What holds the pass to its word


def test_a_wrong_fold_breaks_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    import laconic.passes.fold_weights as module

    text = body(CONSTANTS, f"{LINEAR}\n%y: f32[batch, 6] = aten.mul.Tensor(%l, @v)")
    right = module.scaled
    monkeypatch.setattr(module, "scaled", lambda *a: right(*a) * 1.0001)
    with pytest.raises(VerificationError, match="'tolerance' is broken"):
        optimize(parse(text, v=VECTOR), "fold-weights")


def test_an_alias_must_lead_to_the_same_bytes_within_a_tolerance_too() -> None:
    program = parse(body(f"parameter @w: f32[8, 6]\n{B}", "%y: f32[batch, 6] = aten.addmm(@b, %x, @w)"))
    after = optimize(program, "fold-weights").program
    check_weights(Contract.TOLERANCE, program, after)
    after.weights["w_transposed"].value[0, 0] += 1
    with pytest.raises(VerificationError, match="holds other bytes"):
        check_weights(Contract.TOLERANCE, program, after)


def test_a_constant_made_from_the_type_of_an_input_is_left_to_simplify() -> None:
    calls = f"%n: f32[6] = aten.new_ones(%x, [6])\n{LINEAR}\n%y: f32[batch, 6] = aten.mul.Tensor(%l, %n)"
    stays(body(CONSTANTS, calls), "fold-weights")


def test_a_program_that_draws_is_held_to_its_bits() -> None:
    calls = "%r: f32[batch, 8] = aten.rand_like(%x)\n%t: f32[8, 6]{1, 8} = aten.t(@w)\n"
    calls += "%l: f32[batch, 6] = aten.matmul(%r, %t)\n%y: f32[batch, 6] = aten.mul.Tensor(%l, 2.0)"
    folded = optimize(parse(body(W, calls)), "fold-weights").ledger.rows[0]
    assert (folded.modified, folded.after.max_abs) == (True, 0.0)
    with pytest.raises(UnsupportedError, match="no float64 reference"):
        optimize(parse(body(W, calls.replace("2.0", "0.3"))), "fold-weights")
