"""Costs: FLOPs by hand, against torch's own counter, and as expressions; peak memory by hand and by running."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from architectures import EIGHT, make
from helpers import parse
from laconic.auditing import audit
from laconic.ir.capture import capture_module
from laconic.ir.cost import _RULES, Cost, _is_uncounted, cost_at, flops_at, symbolic_cost
from laconic.ir.errors import UsageError
from laconic.ir.inputs import cases
from laconic.ir.liveness import peak_activation
from laconic.ir.program import Entry, Program
from laconic.ir.types import size_text
from laconic.passes.ledger import measure


def entry(body: str, inputs: str, weights: str = "") -> str:
    """A program on `inputs` and `weights`, each a list of `name: type` with semicolons between."""
    names = [line.partition(":")[0].strip() for line in inputs.split(";")]
    declared = "\n".join(f"input %{line.strip()} in [-1, 1]" for line in inputs.split(";"))
    named = "\n".join(f"argument {name} = %{name}" for name in names)
    table = "\n".join(f"parameter @{line.strip()} trainable" for line in weights.split(";") if line.strip())
    return f"size n in [1, inf] like 4\n{table}\n\nentry forward {{\n{declared}\n{named}\n{body}\n}}"


#: op -> (body, inputs, weights, FLOPs with n = 4, as an expression)
BY_HAND = {
    "linear": ("%y: f32[n, 5] = aten.linear(%x, @w, @b)", "x: f32[n, 3]", "w: f32[5, 3]; b: f32[5]", 120, "30*n"),
    "addmm": ("%y: f32[n, 5] = aten.addmm(@b, %x, @w)", "x: f32[n, 3]", "w: f32[3, 5]; b: f32[5]", 120, "30*n"),
    "bmm": ("%y: f32[2, n, n] = aten.bmm(%x, %z)", "x: f32[2, n, 3]; z: f32[2, 3, n]", "", 192, "12*n**2"),
    "matmul": ("%y: f32[7, n, 5] = aten.matmul(%x, @w)", "x: f32[7, n, 3]", "w: f32[3, 5]", 840, "210*n"),
    "vectors": ("%y: f32[] = aten.matmul(%x, %z)", "x: f32[3]; z: f32[3]", "", 6, "6"),
    "grouped convolution": (
        "%y: f32[n, 6, 8] = aten.conv1d(%x, @w, None, [1], [1], [1], 2)",
        "x: f32[n, 4, 8]",
        "w: f32[6, 2, 3]",
        2 * (4 * 6 * 8) * (2 * 3),
        "576*n",
    ),
    "transposed convolution": (
        "%y: f32[n, 6, 16] = aten.conv_transpose1d(%x, @w, None, [2])",
        "x: f32[n, 4, 8]",
        "w: f32[4, 6, 2]",
        2 * (4 * 4 * 8) * (6 * 2),
        "768*n",
    ),
    "attention": (
        "%y: f32[2, 3, n, 6] = aten.scaled_dot_product_attention(%q, %k, %v)",
        "q: f32[2, 3, n, 5]; k: f32[2, 3, 7, 5]; v: f32[2, 3, 7, 6]",
        "",
        2 * 6 * 4 * 7 * (5 + 6),
        "924*n",
    ),
    "einsum": (
        '%y: f32[n, 2, 7]{7, 7*n, 1} = aten.einsum("bhq,hqd->bhd", [%x, @w])',
        "x: f32[n, 2, 3]",
        "w: f32[2, 3, 7]",
        2 * 4 * 2 * 3 * 7,
        "84*n",
    ),
    "outer product": ('%y: f32[n, 3] = aten.einsum("b,q->bq", [%x, %z])', "x: f32[n]; z: f32[3]", "", 0, "0"),
    "three operands": (
        '%y: f32[n, 7] = aten.einsum("bi,ij,jk->bk", [%x, @w, @v])',
        "x: f32[n, 3]",
        "w: f32[3, 5]; v: f32[5, 7]",
        2 * 4 * (3 * 5 + 5 * 7),
        "100*n",
    ),
    "pointwise": ("%y: f32[n, 3] = aten.exp(%x)", "x: f32[n, 3]", "", 0, "0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND.values(), ids=list(BY_HAND))
def test_flops_by_hand(case: tuple[str, str, str, int, str]) -> None:
    body, inputs, weights, flops, expression = case
    program = parse(entry(f"{body}\nreturn %y", inputs, weights))
    assert flops_at(program) == flops
    assert size_text(symbolic_cost(program.forward).flops, program.names) == expression
    assert flops_at(program, {"n": 8}) == int(eval(expression, {"n": 8}))


def test_costs_of_nodes_pointwise_elements_and_what_is_not_counted() -> None:
    program = parse(
        entry(
            "%a: f32[n, 3] = aten.exp(%x)\n%b: f32[n, 5] = aten.linear(%a, @w)\n%c: f32[5, n]{1, 5} = aten.t(%b)\n"
            "%y: f32[5, n]{1, 5} = aten.relu(%c)\nreturn %y",
            "x: f32[n, 3]",
            "w: f32[5, 3]",
        )
    )
    cost = cost_at(program, program.forward, {"n": 2})
    assert [(n.node.name, n.flops, n.pointwise) for n in cost.nodes] == [("a", 0, 6), ("b", 60, 0), ("y", 0, 10)]
    assert (cost.flops, cost.pointwise, cost.uncounted) == (60, 16, ())
    with pytest.raises(UsageError, match="no dynamic size 'm'"):
        flops_at(program, {"m": 2})
    recurrent = parse(
        entry(
            "%s: f32[1, 2, 3] = aten.zeros([1, 2, 3])\n"
            "%t: (f32[4, 2, 3], f32[1, 2, 3]) = aten.gru.input(%x, %s, [@a, @b], False, 1, 0.0, False, False, False)\n"
            "%y: f32[4, 2, 3] = operator.getitem(%t, 0)\nreturn %y",
            "x: f32[4, 2, 3]",
            "a: f32[9, 3]; b: f32[9, 3]",
        )
    )
    assert symbolic_cost(recurrent.forward).uncounted == ("aten.gru.input",)


def test_sizes_out_of_their_range_are_refused() -> None:
    text = entry("%y: f32[n, 3] = aten.exp(%x)\nreturn %y", "x: f32[n, 3]")
    program = parse(text)
    with pytest.raises(UsageError, match="n=0 is out of range") as refused:
        cost_at(program, program.forward, {"n": 0})
    assert "[1, inf]" in str(refused.value)
    bounded = parse(text.replace("[1, inf]", "[2, 8]"))
    assert cost_at(bounded, bounded.forward, {"n": 8}).pointwise == 24
    for size in (1, 9):
        with pytest.raises(UsageError, match=f"n={size} is out of range"):
            flops_at(bounded, {"n": size})
        with pytest.raises(UsageError, match=r"\[2, 8\]"):
            audit(bounded, sizes={"n": size})


COUNTED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "einsum of matrices": lambda x, y: torch.einsum("...qd,...kd->...qk", x, y),
    "einsum with implied result": lambda x, y: torch.einsum("...ij,...kj", x, y),
    "einsum with dots on one side": lambda x, y: torch.einsum("...qd,kd->...qk", x, y[0]),
    "einsum with unlike dots": lambda x, y: torch.einsum("...qd,...kd->...qk", x, y[0]),
    "inner": lambda x, y: torch.inner(x, y[0]),
    "linalg.matmul": lambda x, y: torch.linalg.matmul(x, y.mT),
    "baddbmm": lambda x, y: torch.baddbmm(x @ x.mT, x, y.mT),
}
#: What torch counts some FLOPs for, or what is made of products without being counted there either.
NOT_COUNTED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "matrix_power": lambda x, y: torch.matrix_power(x @ y.mT, 3),
    "cdist": lambda x, y: torch.cdist(x, y),
    "kron": lambda x, y: torch.kron(x[0], y[0]),
    "chain_matmul": lambda x, y: torch.linalg.multi_dot([x[0], y[0].mT, x[0]]),
    "linalg.solve": lambda x, y: torch.linalg.solve(x @ x.mT + torch.eye(5), y),
    "linalg.inv": lambda x, y: torch.linalg.inv(x @ x.mT + torch.eye(5)),
    "matrix_exp": lambda x, y: torch.linalg.matrix_exp(x @ y.mT),
}


class Each(nn.Module):
    """Functions of the same two inputs, beside each other."""

    def __init__(self, functions: Iterable[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]) -> None:
        super().__init__()
        self.functions = list(functions)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(function(x, y) for function in self.functions)


def costs_beside_torch(functions: Iterable[Callable[..., torch.Tensor]]) -> tuple[Cost, int]:
    module, inputs = Each(functions), (torch.randn(3, 5, 4), torch.randn(3, 5, 4))
    program = capture_module(module, inputs, {}, check=False)
    return cost_at(program, program.forward), counted(module, *inputs)


@pytest.mark.parametrize("name", COUNTED)
def test_products_of_every_spelling_are_those_that_torch_counts(name: str) -> None:
    cost, torchs = costs_beside_torch([COUNTED[name]])
    assert (cost.flops, cost.uncounted) == (torchs, ())
    assert cost.flops > 0


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_what_holds_products_and_is_not_counted_is_named(name: str) -> None:
    cost, torchs = costs_beside_torch([NOT_COUNTED[name]])
    assert cost.flops <= torchs
    assert len(cost.uncounted) == 1


def test_no_op_that_torch_counts_is_silently_free() -> None:
    silent = [name for name in map(str, flop_registry) if name not in _RULES and not _is_uncounted(name)]
    assert silent == []
    assert not any(map(_is_uncounted, ("aten.add.Tensor", "aten.linalg_vector_norm", "aten.softmax.int", "aten.mm")))
    assert all(map(_is_uncounted, ("aten.baddbmm.dtype", "aten._linalg_svd", "aten.gru.data", "aten.lstm_cell")))


class Mixed(nn.Module):
    """Products of every kind that torch's counter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, 2, 1, groups=2)
        self.back = nn.ConvTranspose2d(8, 4, 2, 2)
        self.into, self.out = nn.Linear(16, 3 * 16), nn.Linear(16, 16, bias=False)

    def forward(self, image: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.into(x).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        scores = torch.baddbmm(x @ x.mT, seen, x.mT)
        return self.back(self.conv(image)), self.out(scores @ x)


def counted(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """What torch counts; it knows the products in an attention, but no fused kernel of the CPU."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts() -> None:
    module, batch = Mixed().eval(), Dim("batch")
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    program = capture_module(module, inputs, {}, ({0: batch}, {0: batch}), check=False)
    assert flops_at(program) == counted(module, *inputs) > 0
    larger = torch.randn(7, 4, 8, 8), torch.randn(7, 5, 16)
    assert flops_at(program, {"batch": 7}) == counted(module, *larger)
    sizes = measure(program, None, {})
    assert sizes.flops == flops_at(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EIGHT))
def test_flops_of_architectures_are_those_that_torch_counts(name: str) -> None:
    module, inputs, axes = make(name, EIGHT)
    program = capture_module(module, (), inputs, axes, check=False)
    config = module.config
    grouped = 0  # torch's counter does not see the grouped products: 3 matrices a routed row, gate, up and down
    if name == "qwen3_moe":
        rows = inputs["input_ids"].numel() * config.num_experts_per_tok
        grouped = config.num_hidden_layers * rows * 3 * 2 * config.hidden_size * config.moe_intermediate_size
    assert flops_at(program) == counted(module, **inputs) + grouped


# Memory


def test_peak_by_hand() -> None:
    program = parse(
        entry(
            "%a: f32[n, 8] = aten.exp(%x)\n"  # x a: 256
            "%b: f32[n, 2, 4] = aten.reshape(%a, [4, 2, 4])\n"  # a view of a
            "%c: f32[n, 8] = aten.linear(%x, @w)\n"  # x a c: 384
            "%d: f32[n, 2, 1] = aten.mean.dim(%b, [-1], True)\n"  # x a c d: 416, the peak; b keeps a
            "%y: f32[n, 8] = aten.relu(%c)\n"
            "return (%y, %d)",
            "x: f32[n, 8]",
            "w: f32[8, 8]",
        ).replace("[4, 2, 4])", "[-1, 2, 4])")
    )
    peak = peak_activation(program, program.forward)
    assert (peak.bytes, peak.node.name if peak.node else None) == (3 * 128 + 32, "d")
    assert [(node.name, size) for node, size in peak.live] == [("x", 128), ("a", 128), ("c", 128), ("d", 32)]
    assert peak_activation(program, program.forward, {"n": 8}).bytes == 2 * peak.bytes


def test_a_reshape_that_copies_takes_memory_and_one_that_does_not_takes_none() -> None:
    def peak(reshaped: str) -> int:
        body = f"%t: f32[8, n]{{1, 8}} = aten.t(%x)\n{reshaped}\n%z: f32[] = aten.sum(%y)\nreturn %z"
        program = parse(entry(body, "x: f32[n, 8]"))
        return peak_activation(program, program.forward).bytes

    assert peak("%y: f32[8*n] = aten.reshape(%t, [-1])") == 128 + 128 + 4
    assert peak("%y: f32[2, 4, n]{4, 1, 8} = aten.reshape(%t, [2, 4, -1])") == 128 + 4


def test_results_live_to_the_end_and_weights_do_not_count() -> None:
    program = parse(
        entry(
            "%v: f32[8, 8]{1, 8} = aten.t(@w)\n%a: f32[n, 8] = aten.matmul(%x, %v)\n%b: f32[n, 8] = aten.exp(%a)\n"
            "%c: f32[n, 8] = aten.exp(%b)\nreturn (%a, %c)",
            "x: f32[n, 8]",
            "w: f32[8, 8]",
        )
    )
    assert peak_activation(program, program.forward).bytes == 4 * 128


def simulated(program: Program, entry: Entry, inputs: list[torch.Tensor]) -> int:
    """The most bytes alive while the entry runs, by the storages of real tensors."""
    weights = {w.value.untyped_storage().data_ptr() for w in program.weights.values()}
    held: dict[fx.Node, Any] = dict(zip(entry.input_nodes(), inputs, strict=True))
    held |= {node: program.weights[name].value for name, node in entry.weight_nodes().items()}
    kept = {v for v in entry.output_values if isinstance(v, fx.Node)} | set(held)
    order = list(entry.calls())
    last = {operand: k for k, node in enumerate(order) for operand in (node, *node.all_input_nodes)}
    most = 0
    for k, node in enumerate(order):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
        with torch.no_grad():
            held[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        alive: dict[int, int] = {}
        for value in held.values():
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in weights:
                    alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        most = max(most, sum(alive.values()))
        for gone in [n for n in held if n not in kept and last.get(n, -1) <= k]:
            del held[gone]
    return most


class Tangled(nn.Module):
    """Views of views, parts, broadcasts and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.into(x).split(16, -1)
        a = q.unflatten(-1, (4, 4)).transpose(1, 2)
        b = k.unflatten(-1, (4, 4)).transpose(1, 2).contiguous()
        c = (a @ b.mT).softmax(-1) @ v.unflatten(-1, (4, 4)).transpose(1, 2)
        top, places = c.transpose(1, 2).flatten(2).topk(3, -1)
        wide = x[:, :1].expand(-1, 64, -1).exp()
        return self.out(c.transpose(1, 2).flatten(2)) + top.sum(-1, keepdim=True), places + wide.sum().long()


def test_peak_is_what_a_run_holds() -> None:
    program = capture_module(Tangled().eval(), (torch.randn(3, 5, 16),), {}, ({0: Dim("batch")},), check=False)
    for case in cases(program, program.forward):
        found = peak_activation(program, program.forward, case.sizes).bytes
        assert found == simulated(program, program.forward, case.clone())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EIGHT))
def test_peak_of_architectures_is_what_a_run_holds(name: str) -> None:
    module, inputs, axes = make(name, EIGHT)
    program = capture_module(module, (), inputs, axes, check=False)
    for case in cases(program, program.forward):
        found = peak_activation(program, program.forward, case.sizes).bytes
        assert found == simulated(program, program.forward, case.clone()), str(case)
