"""What the backend says it did, what it finds on disk, and what it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled import WIDTH, Stack, check, compiled, drawn, made, python, rolled, said, same
from laconic.codegen import reset_stats, stats


def test_counts() -> None:
    """A block is a norm, two matrices, an activation and a sum; in training the first one's input needs no gradient."""
    model = made(lambda: Stack(count=6))
    call = compiled(model, fullgraph=True)
    with torch.no_grad():
        same(call(drawn()), model(drawn()), 1e-5)
    call(drawn()).sum().backward()
    inference, training = stats()["each"]
    assert [inference[n] for n in ("nodes", "pieces", "steps", "compiled")] == [31, 2, 7, 6]
    assert [training[n] for n in ("nodes", "pieces", "steps", "compiled")] == [31, 3, 7, 11]
    assert inference["repeats"] == [(5, 6, 7, 1)], "calls, times, slots (a stream and six weights), outputs"
    assert training["repeats"] == [(5, 5, 7, 1)]
    done = stats()
    assert (done["graphs"], done["rolled"], done["nodes"], done["compiled"]) == (2, 2, 62, 17)
    assert done["each"][0]["units"] == 1
    reset_stats()
    assert stats()["graphs"] == 0


def test_a_graph_without_repeats() -> None:
    model = made(lambda: Stack(count=1))
    same(compiled(model)(drawn()), model(drawn()), 1e-5)
    done = stats()
    assert done["refused"] == {"no repeated run": 1}
    assert done["rolled"] == 0


class Scaled(Stack):
    def forward(self, x: torch.Tensor, scale: float = 1.0, times: int = 1) -> Any:
        for block in self.blocks:
            x = block(x) * scale + times
        return self.head(x)


@pytest.mark.slow
def test_numbers_among_the_inputs() -> None:
    """They are compiled in at first, and inputs once they change; a float by way of a tensor."""
    model = made(Scaled)
    call = compiled(model)
    for scale, times in ((0.5, 2), (0.5, 3), (0.5, 5), (0.25, 7), (0.75, 7), (0.1, 2)):
        with torch.no_grad():
            same(call(drawn(), scale, times), model(drawn(), scale, times), 1e-5)
    rolled(5, graphs=3)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [True, False])
def test_everything_is_dynamic(grad: bool) -> None:
    """Then the small number that a norm adds is an input too, one for each."""
    check(made(Stack), drawn(), grad=grad, calls=2, dynamic=True)


_CACHED = """
import json, sys
import torch
from compiled import Stack, compiled, drawn, made
from laconic.codegen import stats
count, training = int(sys.argv[1]), sys.argv[2] == "True"
model = made(lambda: Stack(count=count))
with torch.set_grad_enabled(training):
    result = compiled(model)(drawn())
if training:
    result.sum().backward()
print(json.dumps(stats()["each"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_what_is_found_on_disk(training: bool, tmp_path: Path) -> None:
    """A second process finds everything; and so does a model of another depth: its blocks are the same."""

    def each(count: int) -> dict[str, Any]:
        text = said(python("-c", _CACHED, str(count), str(training), TORCHINDUCTOR_CACHE_DIR=str(tmp_path)))
        (found,) = json.loads(text.splitlines()[-1])
        assert found["rolled"]
        return dict(found)

    first, second, deeper = each(5), each(5), each(9)
    pieces = 3 if training else 2
    assert [found["pieces"] for found in (first, second, deeper)] == [pieces] * 3
    assert first["cache_hits"]["autograd_cache_miss"] == pieces
    assert first["cache_hits"]["fxgraph_cache_miss"] >= pieces
    for found in (second, deeper):
        assert found["cache_hits"]["autograd_cache_hit"] == pieces, found["cache_hits"]
        assert found["cache_hits"]["autograd_cache_miss"] == found["cache_hits"]["fxgraph_cache_miss"] == 0


@pytest.mark.parametrize("pipeline", ["cse,dce", pytest.param("", marks=pytest.mark.slow)])
def test_with_fewer_passes_and_a_mode(pipeline: str) -> None:
    check(made(Stack), drawn(7, WIDTH), pipeline=pipeline, inductor={"epilogue_fusion": False})
    assert not stats()["each"][0]["rewritten"].get("simplify")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stict": True}, "did you mean 'strict'"),
        ({"strict": 1}, "'strict' is True or False"),
        ({"inductor": True}, "'inductor' is a dict"),
        ({"pipeline": "simplify"}, "looks at the values of weights"),
        ({"pipeline": "nonsense"}, "nonsense"),
        ({"pipeline": ["cse"]}, "'pipeline' is text"),
        ({"plan": 3}, "'plan' is the path"),
        ({"inductor": {"frezing": True}}, "did you mean 'freezing'"),
    ],
)
def test_options_that_are_none(given: dict[str, Any], said: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=said):
        torch.compile(made(Stack), backend="laconic", options=given)(drawn())
    assert stats()["graphs"] == 0


@pytest.mark.slow
def test_modes() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="there is no mode 'max'"):
        torch.compile(made(Stack), backend="laconic", mode="max")(drawn())
    torch._dynamo.reset()
    model = made(Stack)
    same(torch.compile(model, backend="laconic", mode="default")(drawn()), model(drawn()), 1e-5)
    rolled(4)
