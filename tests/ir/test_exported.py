"""Programs as ExportedPrograms: the same bits, the caller's names, nothing shared that a call writes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.exported import flat_names, to_exported
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.precise import deviation, evaluate_precise
from laconic.ir.program import Program
from laconic.ir.run import evaluate


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(6)
        self.norm.weight.requires_grad = False
        self.register_buffer("shift", torch.ones(6), persistent=False)
        self.table = torch.arange(6.0)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        x = self.norm(self.embed(ids)) + self.shift + self.table * scale
        if mask is not None:
            x = x * mask[..., None]
        return {"logits": self.head(x), "flag": None, "parts": (x, 3)}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        x.mul_(2)
        return x + self.count


def tied() -> Program:
    torch.manual_seed(0)
    batch, tokens = Dim("batch"), Dim("tokens")
    shapes = {"ids": {0: batch, 1: tokens}, "mask": {0: batch, 1: tokens}, "scale": None}
    return capture_module(
        Tied(), (), {"ids": torch.randint(0, 11, (3, 5)), "mask": torch.ones(3, 5), "scale": 2.0}, shapes
    )


def test_called_by_keyword_at_other_sizes_it_gives_the_bits() -> None:
    program = tied()
    module = to_exported(program).module()
    for batch, tokens in ((1, 1), (3, 5), (4, 9)):
        ids, mask = torch.randint(0, 11, (batch, tokens)), torch.rand(batch, tokens)
        with torch.no_grad():
            found = module(ids=ids, mask=mask)
        wanted = evaluate(program, program.forward, [ids, mask]).results
        assert found["flag"] is None
        assert found["parts"][1] == 3
        assert bit_equal(found["logits"], wanted[0])
        assert bit_equal(found["parts"][0], wanted[1])


def test_recorded_positional_arguments_are_positional() -> None:
    program = tied()
    program.facts["positional"] = 1
    module = to_exported(program).module()
    ids, mask = torch.randint(0, 11, (2, 4)), torch.rand(2, 4)
    with torch.no_grad():
        found = module(ids, mask=mask)["logits"]
    assert bit_equal(found, evaluate(program, program.forward, [ids, mask]).results[0])


def test_without_recorded_positions_all_is_by_keyword() -> None:
    program = tied()
    program.facts.clear()
    ids, mask = torch.randint(0, 11, (2, 4)), torch.rand(2, 4)
    with torch.no_grad():
        found = to_exported(program).module()(mask=mask, ids=ids)["logits"]
    assert bit_equal(found, evaluate(program, program.forward, [ids, mask]).results[0])


def test_a_weight_among_the_results_survives_torchs_decomposition() -> None:
    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.w, self.w * 1

    program = capture_module(Weight(), (torch.ones(4),), {})
    found = to_exported(program).run_decompositions().module()(torch.ones(4))
    assert all(torch.equal(value, program.weights["w"].value) for value in found)


def test_weights_are_stored_once_with_their_kinds() -> None:
    program = tied()
    exported = to_exported(program)
    stored = exported.state_dict
    assert len([n for n in stored if n in ("embed.weight", "head.weight")]) == 1
    assert all(isinstance(value, nn.Parameter) for value in stored.values())
    assert not stored["norm.weight"].requires_grad
    assert stored["norm.bias"].requires_grad
    assert stored["norm.bias"].data_ptr() == program.weights["norm.bias"].value.data_ptr()
    assert "shift" in exported.constants
    assert list(exported.graph_signature.non_persistent_buffers) == ["shift"]
    assert exported.example_inputs is None


def test_torch_working_on_it_leaves_the_program_alone() -> None:
    program = tied()
    before = str(program), len(program.mode.shape_env.guards)
    exported = to_exported(program)
    exported.run_decompositions()
    exported.module()
    assert (str(program), len(program.mode.shape_env.guards)) == before


def test_sizes_out_of_range_are_refused() -> None:
    program = capture_module(nn.Linear(4, 2), (torch.randn(3, 4),), {}, ({0: Dim("batch", min=2, max=6)},))
    module = to_exported(program).module()
    with pytest.raises(Exception, match="6"):
        module(torch.randn(9, 4))


def test_states_are_copied_and_updated() -> None:
    program = capture_module(Counter(), (torch.ones(3),), {})
    module = to_exported(program).module()
    given = torch.ones(3)
    module(given)
    found = module(torch.ones(3))
    assert found.tolist() == [4.0, 4.0, 4.0]
    assert given.tolist() == [2.0, 2.0, 2.0]
    assert program.weights["count"].value.tolist() == [0.0, 0.0, 0.0]


def test_explicit_states_are_arguments_and_results() -> None:
    program = capture_module(Counter(), (torch.ones(3),), {})
    inputs, outputs = flat_names(program)
    assert inputs == ["x", "state.count"]
    assert outputs == ["output", "state.count.next", "x.next"]
    exported = to_exported(program, explicit_states=True)
    assert not exported.graph_signature.buffers_to_mutate
    assert not exported.graph_signature.user_inputs_to_mutate
    given = torch.ones(3)
    result, written = exported.module()(given, state={"count": torch.full((3,), 4.0)})
    assert result.tolist() == [7.0] * 3
    assert written["state.count.next"].tolist() == [5.0] * 3
    assert written["x.next"].tolist() == [2.0] * 3
    assert given.tolist() == [1.0] * 3


def test_an_unknown_entry_is_refused() -> None:
    with pytest.raises(UsageError, match="decode"):
        to_exported(tied(), "decode")


def test_precise_is_closer_than_the_program_and_float64() -> None:
    program = tied()
    ids, mask = torch.randint(0, 11, (2, 4)), torch.rand(2, 4)
    wide = evaluate_precise(program, program.forward, [ids, mask]).results
    found = evaluate(program, program.forward, [ids, mask]).results
    with torch.no_grad():
        module = Tied().double()
        module.load_state_dict(
            {n: w.value for n, w in program.weights.items() if n in module.state_dict()}, strict=False
        )
        module.head.weight = module.embed.weight
        reference = module(ids, mask.double(), 2.0)
    assert wide[0].dtype == torch.float64
    assert float((wide[0] - reference["logits"]).abs().max()) < 1e-14
    row = deviation("logits", found[0], found[0], wide[0])
    assert row.ok
    assert 0 < row.found < 1e-5
    assert not deviation("logits", found[0], found[0] + 1e-3, wide[0]).ok


class Awkward(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid = torch.linspace(0, 1, 3) / 3
        half = x.to(torch.float16).float()
        return x.view(torch.int32) & 255, grid * x, half


def test_precise_widens_dtypes_but_reads_the_bits_that_were() -> None:
    program = capture_module(Awkward(), (torch.rand(3),), {})
    x = torch.rand(3)
    bits, scaled, half = evaluate_precise(program, program.forward, [x]).results
    assert torch.equal(bits, x.view(torch.int32) & 255)
    exact = torch.linspace(0, 1, 3, dtype=torch.float64) / 3 * x.double()
    assert float((scaled - exact).abs().max()) < 1e-16
    assert torch.equal(half, x.double())


def test_there_is_no_reference_for_random_numbers() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    program = capture_module(Noise(), (torch.ones(2),), {})
    with pytest.raises(UnsupportedError, match="rand_like"):
        evaluate_precise(program, program.forward, [torch.ones(2)])


@pytest.mark.parametrize(
    ("original", "found", "ok"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0]), False),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -float("inf")]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 4e-7]), True),
        (torch.tensor([1.0]), torch.tensor([1.0 + 6e-7]), False),
    ],
)
def test_the_rule(original: torch.Tensor, found: torch.Tensor, ok: bool) -> None:
    reference = original.double() if original.is_floating_point() else original
    assert deviation("y", original, found, reference).ok is ok
