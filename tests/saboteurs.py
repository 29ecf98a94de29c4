"""Rewrites that break a rule, for the tests of the verifier, the contracts and the manager. Each changes a Program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from laconic.ir.program import Alias, Output, Program, Role, Site
from laconic.ir.propagate import propagate
from laconic.ir.rewrite import add_constant, drop_weight, insert_call, weight_node
from laconic.ir.torch_private import quiet
from laconic.ir.tree import Leaf

aten = torch.ops.aten
Change = Callable[[Program], None]


def first(program: Program, target: Any) -> fx.Node:
    return next(n for n in program.forward.calls() if n.target is target)


def output(program: Program, name: str) -> int:
    return next(k for k, o in enumerate(program.forward.outputs) if o.name == name)


def set_output(program: Program, name: str, value: Any) -> None:
    values = list(program.forward.output_values)
    values[output(program, name)] = value
    program.forward.output_node.args = (tuple(values),)


def after(program: Program, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call behind `node` that takes its place in all users; its own operands may name it."""
    users = list(node.users)
    new = insert_call(program, program.forward, node.next, target, args, by="sabotage", like=node)
    for user in users:
        user.replace_input_with(node, new)
    return new


def retype(program: Program, target: Any, **meta: Any) -> None:
    node = first(program, target)
    kind = node.meta["val"]
    with program.mode:
        node.meta["val"] = kind.new_empty(meta.get("shape", kind.shape), dtype=meta.get("dtype", kind.dtype))


# Shapes and types


def wrong_shape(program: Program) -> None:
    retype(program, aten.tanh.default, shape=(3, 5))


def stale_type_of_a_user(program: Program) -> None:
    """The changed call itself is recorded rightly; who reads it is not."""
    node = first(program, aten.neg.default)
    relu: Any = node.args[0]
    relu.target, relu.args = aten.gt.Scalar, (relu.args[0], 0)
    propagate(program, program.forward.graph, [relu])
    with quiet(program.mode):
        node.meta["val"] = torch.empty_like(relu.meta["val"], dtype=torch.float32)


def fixes_the_batch_of_a_reshape(program: Program) -> None:
    """Right in types by the example, and refused at every other size."""
    node = first(program, aten.tanh.default)
    flat = after(program, node, aten.reshape.default, node, [-1])
    part = after(program, flat, aten.slice.Tensor, flat, 0, 0, 12)
    back = after(program, part, aten.reshape.default, part, [-1, 4])
    with quiet(program.mode):
        back.meta["val"] = torch.empty_like(node.meta["val"])


def missing_type(program: Program) -> None:
    del first(program, aten.tanh.default).meta["val"]


def refused_operands(program: Program) -> None:
    first(program, aten.tanh.default).args = ()


def changed_dtype(program: Program) -> None:
    node = program.forward.output_values[output(program, "second")]
    new = insert_call(
        program, program.forward, program.forward.output_node, aten._to_copy.default, (node,), by="s", like=node
    )
    new.kwargs = {"dtype": torch.float64}
    propagate(program, program.forward.graph, [new])
    set_output(program, "second", new)


def changed_weight_dtype(program: Program) -> None:
    weight = program.weights["scale"]
    program.weights["scale"] = replace(weight, value=weight.value.double())


# What callers see


def returns_an_input(program: Program) -> None:
    set_output(program, "copy", program.forward.input_nodes()[1])


def copies_a_view(program: Program) -> None:
    node = program.forward.output_values[output(program, "view")]
    new = insert_call(
        program, program.forward, program.forward.output_node, aten.clone.default, (node,), by="s", like=node
    )
    set_output(program, "view", new)


def merges_two_results(program: Program) -> None:
    set_output(program, "second", program.forward.output_values[output(program, "first")])


def swaps_results(program: Program) -> None:
    a, b = (program.forward.output_values[output(program, n)] for n in ("first", "second"))
    set_output(program, "first", b)
    set_output(program, "second", a)


def renames_an_output(program: Program) -> None:
    at = output(program, "first")
    program.forward.outputs[at] = Output(Role.RESULT, "logits")
    program.forward.results = {"logits" if k == "first" else k: leaf for k, leaf in program.forward.results.items()}


def renames_a_key(program: Program) -> None:
    program.forward.results = {f"new {key}": leaf for key, leaf in program.forward.results.items()}


def drops_an_output(program: Program) -> None:
    at = output(program, "second")
    values = list(program.forward.output_values)
    del values[at], program.forward.outputs[at]
    program.forward.output_node.args = (tuple(values),)
    program.forward.results = {k: Leaf(i) for i, k in enumerate(k for k in program.forward.results if k != "second")}


def renames_an_input(program: Program) -> None:
    program.forward.inputs[0] = replace(program.forward.inputs[0], name="z")
    program.forward.input_nodes()


def adds_an_input(program: Program) -> None:
    program.forward.arguments = {**program.forward.arguments, "z": None}


def removes_an_entry(program: Program) -> None:
    program.entries = {"other": program.entries["forward"]}


# States


def drops_the_update(program: Program) -> None:
    at = output(program, "count")
    values = list(program.forward.output_values)
    del values[at], program.forward.outputs[at]
    program.forward.output_node.args = (tuple(values),)


def writes_the_state_back_unchanged(program: Program) -> None:
    set_output(program, "count", program.forward.weight_nodes()["count"])


def copies_the_state_back(program: Program) -> None:
    state = program.forward.weight_nodes()["count"]
    last, like = program.forward.output_node, first(program, aten.tanh.default)
    copy = insert_call(program, program.forward, last, aten.clone.default, (state,), by="s", like=like)
    set_output(program, "count", copy)


def removes_the_state(program: Program) -> None:
    drops_the_update(program)
    node = program.forward.weight_nodes()["count"]
    node.replace_all_uses_with(weight_node(program, program.forward, "scale"))
    drop_weight(program, "count", Alias("scale"))


def makes_a_buffer_of_the_state(program: Program) -> None:
    program.weights["count"] = replace(program.weights["count"], kind=program.weights["scale"].kind)
    program.forward.weight_nodes()["count"].meta["kind"] = program.weights["scale"].kind


# Weights


def drops_a_weight(program: Program) -> None:
    node = first(program, aten.linear.default)
    node.args = node.args[:2]
    drop_weight(program, "linear.bias", Alias(None))
    del program.aliases["linear.bias"]


def trains_what_was_frozen(program: Program) -> None:
    program.weights["frozen"] = replace(program.weights["frozen"], trainable=True)


def changes_a_weight(program: Program) -> None:
    value = program.weights["frozen"].value
    program.weights["frozen"] = replace(program.weights["frozen"], value=value * 1.0000001 + 1e-6)


def points_an_alias_at_other_values(program: Program) -> None:
    node = program.forward.weight_nodes()["frozen"]
    name = add_constant(program, "moved", program.weights["frozen"].value.clone())
    node.replace_all_uses_with(weight_node(program, program.forward, name))
    drop_weight(program, "frozen", Alias("scale"))


def alias_to_nowhere(program: Program) -> None:
    program.aliases["old"] = Alias("nowhere")


def writes_a_weight(program: Program) -> None:
    program.weights["scale"].value.add_(1e-3)


def writes_a_weight_through_data(program: Program) -> None:
    program.weights["scale"].value.data.add_(1e-3)


def writes_a_weight_through_numpy(program: Program) -> None:
    program.weights["linear.weight"].value.numpy()[1, 2] += 1


def writes_the_given_program(program: Program) -> None:
    program.forward.arguments["extra"] = None  # a copy of a program shares this dict with it


def swaps_the_arguments(program: Program) -> None:
    program.forward.arguments = dict(reversed(program.forward.arguments.items()))


def forgets_a_fact(program: Program) -> None:
    program.facts.clear()


def forgets_the_examples(program: Program) -> None:
    program.examples.clear()


def renumbers_a_site(program: Program) -> None:
    program.sites[0] = Site("elsewhere", "")


def makes_a_weight_transient(program: Program) -> None:
    weight = program.weights["linear.weight"]
    program.weights["linear.weight"] = replace(weight, persistent=not weight.persistent)


def shadows_a_row(program: Program) -> None:
    program.aliases["linear.bias"] = Alias("linear.weight")


def narrows_a_size(program: Program) -> None:
    program.symbols[next(iter(program.symbols))] = replace(next(iter(program.symbols.values())), low=3)


# Values


def off_by_1e_6(program: Program) -> None:
    node = first(program, aten.tanh.default)
    after(program, node, aten.add.Tensor, node, 1e-6)


def off_in_one_element(program: Program) -> None:
    bump = torch.zeros(4)
    bump[2] = 1e-6
    node = first(program, aten.tanh.default)
    row = weight_node(program, program.forward, add_constant(program, "bump", bump))
    after(program, node, aten.add.Tensor, node, row)


def minus_zero_becomes_zero(program: Program) -> None:
    node = program.forward.output_values[output(program, "copy")]
    after(program, node, aten.add.Tensor, node, 0)


def nan_in_one_result(program: Program) -> None:
    node = program.forward.output_values[output(program, "copy")]
    after(program, node, aten.mul.Tensor, node, float("nan"))


def right_for_the_example_only(program: Program) -> None:
    """The mean becomes a sum over 3: the same at the example's batch."""
    node = first(program, aten.mean.dim)
    total = insert_call(program, program.forward, node, aten.sum.dim_IntList, node.args[:2], by="s", like=node)
    node.replace_all_uses_with(
        insert_call(program, program.forward, node, aten.div.Tensor, (total, 3), by="s", like=node)
    )
    program.forward.graph.erase_node(node)


def folds_the_example_values(program: Program) -> None:
    """Right only below a bound that the example happens to have."""
    node = first(program, aten.relu.default)
    after(program, node, aten.clamp.default, node, 0.0, float(program.examples[0][1].max()) / 2)


def reorders_random_draws(program: Program) -> None:
    node = first(program, aten.rand_like.default)
    insert_call(program, program.forward, node, aten.rand_like.default, node.args, by="s", like=node)


def removes_a_random_draw(program: Program) -> None:
    node = first(program, aten.rand_like.default)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    program.forward.graph.erase_node(node)


def draws_once_more_at_the_end(program: Program) -> None:
    last = program.forward.output_node
    node = first(program, aten.rand_like.default)
    insert_call(program, program.forward, last, aten.rand_like.default, node.args, by="s", like=node)


# Rules of the graph


def brings_view_back(program: Program) -> None:
    node = first(program, aten.tanh.default)
    after(program, node, aten.view.dtype, node, torch.float32)
    after(program, node, aten.view.default, node, [-1, 4])


def writes_in_place(program: Program) -> None:
    node = first(program, aten.tanh.default)
    new = after(program, node, aten.mul.Tensor, node, 1)
    new.target = aten.mul_.Tensor


def uses_before_it_stands(program: Program) -> None:
    node = first(program, aten.linear.default)
    first(program, aten.tanh.default).append(node)


def calls_a_method(program: Program) -> None:
    node = first(program, aten.tanh.default)
    node.op, node.target = "call_method", "tanh"


def calls_python(program: Program) -> None:
    first(program, aten.tanh.default).target = torch.tanh


def compares_a_dynamic_size(program: Program) -> None:
    assert program.forward.input_nodes()[0].meta["val"].shape[0] > 2


def fixes_a_dynamic_size(program: Program) -> None:
    assert int(program.forward.input_nodes()[0].meta["val"].shape[0]) == 3
