"""dce: what nobody uses goes; effects, random draws and states stay."""

from __future__ import annotations

import pytest
import torch

from helpers import fires, ops, parse, stays
from laconic.ir.program import Alias
from laconic.ir.rewrite import dead_nodes
from laconic.ir.traits import traits


def test_removes_a_dead_chain_but_not_what_its_start_also_feeds() -> None:
    before, after, reason = fires(
        """
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2, 3] = aten.exp(%x) !4
          %b: f32[2, 3] = aten.neg(%a) !5
          %c: f32[2, 3] = aten.sin(%b)
          %d: f32[2, 3] = aten.cos(%a)
          return %d
        }
        """,
        "dce",
    )
    assert ops(before) == ["aten.exp.default", "aten.neg.default", "aten.sin.default", "aten.cos.default"]
    assert ops(after) == ["aten.exp.default", "aten.cos.default"]
    assert reason == "2 dead call"


def test_removes_unused_weights_and_notes_where_they_went() -> None:
    _, after, reason = fires(
        """
        parameter @used: f32[3] trainable
        parameter @left: f32[3] trainable
        buffer @dead: f32[3]
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2, 3] = aten.add.Tensor(%x, @used)
          %b: f32[2, 3] = aten.mul.Tensor(%x, @dead)
          return %a
        }
        """,
        "dce",
    )
    assert list(after.weights) == ["used"]
    assert after.aliases == {"left": Alias(None), "dead": Alias(None)}
    assert reason == "2 unused weight, 1 dead call"


def test_removes_dead_elements_of_a_tuple_but_keeps_the_call_that_a_live_one_needs() -> None:
    _, after, _ = fires(
        """
        entry forward {
          input %x: f32[2, 4] in [-1.0, 1.0]
          argument x = %x
          %s: (f32[2, 2]{4, 1}, f32[2, 2]{4, 1}) = aten.split.Tensor(%x, 2, -1)
          %a: f32[2, 2]{4, 1} = operator.getitem(%s, 0)
          %b: f32[2, 2]{4, 1} = operator.getitem(%s, 1)
          %c: f32[2, 2] = aten.exp(%a)
          return %c
        }
        """,
        "dce",
    )
    assert len(ops(after)) == 3


_RANDOM = {
    "rand_like": "%d: f32[2, 3] = aten.rand_like(%x)",
    "bernoulli": "%d: f32[2, 3] = aten.bernoulli(%x)",
    "dropout while training": "%d: f32[2, 3] = aten.dropout(%x, 0.5, True)",
    "rand of a fixed size": "%d: f32[3] = aten.rand([3])",
    "multinomial": "%d: i64[2, 1] = aten.multinomial(%x, 1)",
    "attention with dropout": "%q: f32[1, 2, 3] = aten.unsqueeze(%x, 0)\n"
    "%d: f32[1, 2, 3] = aten.scaled_dot_product_attention(%q, %q, %q, None, 0.5)",
}


@pytest.mark.parametrize("draw", _RANDOM.values(), ids=_RANDOM)
def test_a_dead_random_draw_stays_since_later_draws_see_the_state_it_leaves(draw: str) -> None:
    reason = stays(
        f"""
        entry forward {{
          input %x: f32[2, 3] in [0.25, 0.75]
          argument x = %x
          {draw}
          %e: f32[2, 3] = aten.rand_like(%x)
          return %e
        }}
        """,
        "dce",
    )
    assert reason == "every call and weight is used"


def test_a_dead_draw_that_draws_nothing_goes() -> None:
    fires(
        """
        entry forward {
          input %x: f32[2, 3] in [0.25, 0.75]
          argument x = %x
          %d: f32[2, 3] = aten.dropout(%x, 0.5, False)
          %e: f32[2, 3] = aten.rand_like(%x)
          return %e
        }
        """,
        "dce",
    )


_KEPT = {
    "a state that nobody reads": """
        state @s: f32[3]
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2, 3] = aten.exp(%x)
          return %a
        }""",
    "what only a state's update needs": """
        state @s: f32[3]
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[3] = aten.sum.dim_IntList(%x, [0])
          %b: f32[3] = aten.add.Tensor(@s, %a)
          update @s = %b
          return %x
        }""",
    "what only an input's update needs": """
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2, 3] = aten.add.Tensor(%x, 1)
          update "x" = %a
          return 3
        }""",
    "an assertion": """
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[] = aten.sum(%x)
          %b: bool[] = aten.lt.Scalar(%a, 1000)
          %c: none = aten._assert_async(%b)
          return %x
        }""",
    "a weight that is returned as it is": """
        parameter @w: f32[3]
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          return (%x, @w)
        }""",
    "a weight that another entry uses": """
        parameter @w: f32[3]
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          return %x
        }
        entry decode {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2, 3] = aten.add.Tensor(%x, @w)
          return %a
        }""",
    "a value that is returned twice": """
        entry forward {
          input %x: f32[2, 3] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2, 3] = aten.exp(%x)
          return (%a, %a)
        }""",
}


@pytest.mark.parametrize("text", _KEPT.values(), ids=_KEPT)
def test_does_not_fire_on(text: str) -> None:
    stays(text, "dce")


def _ops_with_a_generator() -> list[torch._ops.OpOverload]:
    found = []
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        if namespace == "aten":
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if any(a.name == "generator" for a in op._schema.arguments) and not op._schema.is_mutable:
                found.append(op)
    return found


def test_every_aten_op_that_takes_a_generator_counts_as_random() -> None:
    found = _ops_with_a_generator()
    assert len(found) > 30
    for op in found:
        switches = {a.name: True for a in op._schema.arguments if a.name in ("train", "training")}
        assert not traits(torch.fx.Graph().call_function(op, (), switches)).pure, op


def test_dead_nodes_come_users_first() -> None:
    program = parse(
        """
        entry forward {
          input %x: f32[2] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2] = aten.exp(%x)
          %b: f32[2] = aten.exp(%a)
          return %x
        }
        """
    )
    assert [node.name for node in dead_nodes(program.forward)] == ["b", "a"]
