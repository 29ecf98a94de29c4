"""The verifier: a Program keeps its rules, and a pass kept what no rewrite may change silently.

`verify` checks one program whole: structure, legality of its ops, weights against placeholders, and every type
recomputed with fake tensors. `verify_rewrite` checks a program against the one it was made from: the interface (names,
order, dtypes, shapes and trees of inputs and outputs, states, weight names), what callers can see of shared storage,
and types from the changed nodes on. What changed is found by comparing the two; the pass is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from laconic.ir.alias import boundary
from laconic.ir.errors import VerificationError
from laconic.ir.outline import results_of
from laconic.ir.program import Alias, Entry, Function, Kind, Program, Role, Weight
from laconic.ir.propagate import computed_types
from laconic.ir.signature import signature
from laconic.ir.torch_private import guards
from laconic.ir.traits import PYTHON_NAMES
from laconic.ir.tree import Leaf, leaves
from laconic.ir.types import TensorType, same_type, type_of, type_text

#: What canon removed and nothing may bring back, by the reason.
_FORBIDDEN = {
    torch.ops.aten.view.default: "views are written as reshape: layout is not semantics",
    torch.ops.aten._unsafe_view.default: "views are written as reshape: layout is not semantics",
    torch.ops.aten._assert_tensor_metadata.default: "a recorded fact about a tensor's type goes stale",
    torch.ops.aten.from_file.default: "it opens a file, and may make one",
    torch.ops.aten.save.default: "it writes a file",
}


def verify(program: Program) -> None:
    """Check the whole program. Raises VerificationError at the first broken rule."""
    verify_sizes(program)
    for function in program.functions.values():
        _function(program, function)
    for entry in program.entries.values():
        _structure(program, entry)
        _types(program, entry.calls())
    _table(program)


def verify_rewrite(before: Program, after: Program) -> None:
    """Check `after`, made from `before` by a rewrite. Raises VerificationError at the first broken rule."""
    verify_sizes(after)
    _interface(before, after)
    for name, entry in after.entries.items():
        _structure(after, entry)
        _outputs(before, after, name)
        _types(after, changed_nodes(before.entries[name], entry))
        was, now = boundary(before.entries[name]), boundary(entry)
        for output, other in sorted(was ^ now):
            became = "may now share storage" if (output, other) in now else "no longer shares storage"
            raise VerificationError(
                f"{output} of entry {name!r} {became} with {other}",
                why="a caller that writes into one would see the other change, or no longer would",
            )
    _table(after)


def changed_nodes(before: Entry, after: Entry) -> list[fx.Node]:
    """The calls of `after` that are new, say something else than their namesake in `before`, carry another value, or
    read one whose type changed."""
    known = {n.name: n for n in before.graph.nodes}
    rows = {(n.meta["kind"] == Kind.INPUT, n.meta["name"]): n for n in before.placeholders()}

    def leaf(node: fx.Node) -> str:
        return str(node.meta["name"]) if node.op == "placeholder" else node.name

    found = []
    moved: set[fx.Node] = set()  # nodes whose namesake has another type: who uses them may be stale
    for node in after.graph.nodes:
        old = known.get(node.name)
        if node.op == "placeholder":
            old = rows.get((node.meta["kind"] == Kind.INPUT, node.meta["name"]))
            if old is None or not _same_record(old, node):
                moved.add(node)
        elif node.op == "call_function" and (
            old is None
            or old.op != node.op
            or old.meta.get("val") is not node.meta.get("val")
            or signature(old, leaf) != signature(node, leaf)
            or not moved.isdisjoint(node.all_input_nodes)
        ):
            found.append(node)
            if old is None or not _same_record(old, node):
                moved.add(node)
    return found


def _same_record(old: fx.Node, new: fx.Node) -> bool:
    a, b = old.meta.get("val"), new.meta.get("val")
    return a is b or same_type(type_of(a), type_of(b))


def verify_sizes(program: Program) -> None:
    """No one may decide anything by the example's sizes."""
    found = guards(program.mode)
    if found:
        raise VerificationError(
            "a dynamic size was compared, so that the program holds for some sizes only",
            why="guard: " + ", ".join(found[:4]),
            hint="read sizes through laconic.ir.types, which never guards",
        )


def _structure(program: Program, entry: Entry) -> None:
    """Topological order, node kinds, legality, placeholders and outputs as declared."""
    named: dict[tuple[bool, str], fx.Node] = {}
    output = None
    _order(program, entry.graph)
    for node in entry.graph.nodes:
        if node.op == "placeholder":
            key = (node.meta.get("kind") == Kind.INPUT, str(node.meta.get("name")))
            if node.meta.get("kind") not in tuple(Kind) or key in named:
                raise VerificationError(f"placeholder %{node.name} has no kind, or a second one has its name")
            named[key] = node
        elif node.op == "call_function":
            _legal(program, node)
        elif node.op == "call_module":
            _function_call(program, node)
        elif node.op == "output":
            output = node
        else:
            raise VerificationError(f"%{node.name} is a {node.op}", why="a program holds calls of functions only")
        if node.op != "output" and "val" not in node.meta:
            raise VerificationError(f"%{node.name} has no recorded type", where=program.describe(node))
    inputs = [name for is_input, name in named if is_input]
    declared = [i.name for i in entry.inputs]
    if sorted(inputs) != sorted(declared):
        raise VerificationError(f"entry {entry.name!r} declares inputs {declared} and has placeholders {inputs}")
    if output is None or len(output.args[0]) != len(entry.outputs):
        raise VerificationError(f"entry {entry.name!r} declares {len(entry.outputs)} outputs and has another number")
    paths = [path or "output" for path, leaf in leaves(entry.results) if isinstance(leaf, Leaf)]
    if paths != [o.name for o in entry.outputs if o.role is Role.RESULT]:
        what = f"entry {entry.name!r} names its results otherwise than their tree"
        raise VerificationError(what, why=f"tree: {paths}")


def _order(program: Program, graph: fx.Graph) -> None:
    """Every operand stands before who uses it."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in seen:
                raise VerificationError(
                    f"%{node.name} uses %{operand.name}, which does not stand before it",
                    where=program.describe(node),
                )
        seen.add(node)


def _function(program: Program, function: Function) -> None:
    """A function of an outlined program: order, legality and types of what it says."""
    _order(program, function.graph)
    for node in function.graph.nodes:
        if node.op == "call_function":
            _legal(program, node)
        elif node.op not in ("placeholder", "output"):
            raise VerificationError(f"%{node.name} in function {function.name!r} is a {node.op}")
    _types(program, function.calls())


def _function_call(program: Program, call: fx.Node) -> None:
    """A call of a function is given what its slots are, and gives what its results are."""
    function = program.functions.get(str(call.target))
    if function is None:
        raise VerificationError(f"there is no function {call.target!r}", where=program.describe(call))
    pairs: list[tuple[Sequence[Any], Sequence[Any]]] = [
        (function.slots(), call.args),
        (function.results, results_of(call)),
    ]
    for said, given in pairs:
        if len(said) != len(given):
            raise VerificationError(f"a call of {function.name!r} has {len(given)} values for {len(said)}")
        for slot, value in zip(said, given, strict=True):
            if not same_type(type_of(slot.meta["val"]), type_of(value.meta["val"])):
                raise VerificationError(f"%{slot.name} of function {function.name!r} is given another type")
    if len(call.meta["labels"]) != len(function.calls()):
        raise VerificationError(f"a call of {function.name!r} names {len(call.meta['labels'])} nodes")


def _legal(program: Program, node: fx.Node) -> None:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target in _FORBIDDEN:
            raise VerificationError(
                f"{target} is not allowed here", where=program.describe(node), why=_FORBIDDEN[target]
            )
        if target._schema.is_mutable:
            raise VerificationError(
                f"{target} writes into an operand",
                where=program.describe(node),
                why="a program is functional",
            )
    elif target not in PYTHON_NAMES:
        raise VerificationError(f"{target!r} is no op that may stand in a program", where=program.describe(node))


def _types(program: Program, nodes: Iterable[fx.Node]) -> None:
    names = program.names
    for node, expected in computed_types(program, nodes):
        found = type_of(node.meta["val"])
        if not same_type(expected, found):
            raise VerificationError(
                f"%{node.name} is recorded as {type_text(found, names)} but computes {type_text(expected, names)}",
                where=program.describe(node),
                hint="the rewrite left a stale type: rewrite through laconic.ir.rewrite, or propagate what it changed",
            )


def _table(program: Program) -> None:
    """Weights against their placeholders, aliases against the table."""
    names = program.names
    for entry in program.entries.values():
        for name, node in entry.weight_nodes().items():
            weight = program.weights.get(name)
            if weight is None:
                raise VerificationError(f"entry {entry.name!r} uses {name!r}, which the weight table lacks")
            expected, found = type_of(weight.value), type_of(node.meta["val"])
            if not same_type(expected, found):
                raise VerificationError(
                    f"weight {name!r} is {type_text(expected, names)} "
                    f"but entry {entry.name!r} takes it as {type_text(found, names)}"
                )
            if node.meta["kind"] != weight.kind:
                raise VerificationError(
                    f"{name!r} is a {weight.kind} and entry {entry.name!r} takes it as another kind"
                )
        for name in entry.updated():
            if name not in program.weights or program.weights[name].kind is not Kind.STATE:
                raise VerificationError(f"entry {entry.name!r} updates {name!r}, which is no state")
    for name, alias in program.aliases.items():
        if name in program.weights:
            raise VerificationError(f"{name!r} is a row of the weight table and an alias")
        if alias.target is not None and alias.target not in program.weights:
            raise VerificationError(f"the alias {name!r} points at {alias.target!r}, which the weight table lacks")


def _interface(before: Program, after: Program) -> None:
    """What no rewrite may change: entries, inputs, trees, dynamic axes, and that every weight name leads somewhere."""
    if list(before.entries) != list(after.entries):
        raise VerificationError(f"entries were {list(before.entries)} and are {list(after.entries)}")
    if before.symbols != after.symbols:
        raise VerificationError("the dynamic axes or their ranges changed")
    if any(after.facts.get(key) != value for key, value in before.facts.items()):
        raise VerificationError("a fact about the captured model changed")
    if any(after.sites.get(number) != site for number, site in before.sites.items()):
        raise VerificationError("a site was renumbered or dropped")
    if [id(t) for case in before.examples for t in case] != [id(t) for case in after.examples for t in case]:
        raise VerificationError("the example inputs changed")
    for name, old in before.entries.items():
        new = after.entries[name]
        if new.name != name:
            raise VerificationError(f"entry {name!r} calls itself {new.name!r}")
        sites = {n.name: n.meta.get("site") for n in old.calls()}
        moved = [n for n in new.calls() if n.name in sites and n.meta.get("site") != sites[n.name]]
        if moved:
            raise VerificationError(f"%{moved[0].name} was moved to another site", where=before.describe(moved[0]))
        if old.inputs != new.inputs or repr(old.arguments) != repr(new.arguments):  # the order of keys counts
            raise VerificationError(f"the inputs of entry {name!r} changed")
        for a, b in zip(old.input_nodes(), new.input_nodes(), strict=False):
            if not same_type(type_of(a.meta["val"]), type_of(b.meta["val"])):
                raise VerificationError(f"input {a.meta['name']!r} of entry {name!r} changed its type")
    for name, weight in before.weights.items():
        now = after.weights.get(name)
        if now is None and name not in after.aliases:
            raise VerificationError(f"the weight {name!r} is gone and no alias says where its values went")
        if weight.kind is Kind.STATE and now is None and after.aliases[name].target is not None:
            raise VerificationError(f"the state {name!r} is gone, and its name leads to a row that is not updated")
        if now is not None and replace(now, value=weight.value) != weight:
            raise VerificationError(f"the weight {name!r} changed its kind or whether it is trained or persistent")
        alias = after.aliases.get(name)
        target = after.weights.get(alias.target) if now is None and alias is not None and alias.target else None
        if target is not None and _training(target) != _training(weight):
            raise VerificationError(
                f"the weight {name!r} now stands in {target.name!r}, which is trained otherwise",
                why=f"{weight.kind} and {target.kind}; trained: {weight.trainable} and {target.trainable}",
            )
    for name in before.aliases:
        if name not in after.aliases:
            raise VerificationError(f"the alias {name!r} is gone")
    for name in after.aliases:
        if name not in before.aliases and name not in before.weights:
            raise VerificationError(f"the alias {name!r} gives a name that the model never had")
    for name, made in after.weights.items():
        if name not in before.weights and made.kind is not Kind.CONSTANT and not _moved(before, after, made):
            raise VerificationError(
                f"the new row {name!r} is a {made.kind}: a pass makes constants only",
                why="no weight that was there before is said to lie there, transposed",
            )


def _moved(before: Program, after: Program, made: Weight) -> bool:
    """Whether a new row is an old one in another layout: all of it, under another name and treated alike."""
    transposed = Alias(made.name, transposed=True)
    return any(
        after.aliases.get(name) == transposed and replace(made, name=name, value=old.value) == old
        for name, old in before.weights.items()
    )


def _training(weight: Weight) -> tuple[bool, bool, bool]:
    """What an optimizer and a caller who updates states tell apart."""
    return (weight.kind is Kind.PARAMETER, weight.kind is Kind.STATE, weight.trainable)


def _outputs(before: Program, after: Program, name: str) -> None:
    old, new = before.entries[name], after.entries[name]
    gone = {output for output in old.outputs if output.role is Role.UPDATE and output.name not in after.weights}
    pairs = [pair for pair in zip(old.outputs, old.output_values, strict=True) if pair[0] not in gone]
    if [output for output, _ in pairs] != new.outputs or repr(old.results) != repr(new.results):
        lost = [str(o) for o in old.outputs if o not in new.outputs]
        came = [str(o) for o in new.outputs if o not in old.outputs]
        changed = f"lost {', '.join(lost) or 'none'}; gained {', '.join(came) or 'none'}"
        dropped = any(o.role is not Role.RESULT for o in old.outputs if o not in new.outputs)
        what = "dropped an update" if dropped else "changed the names or order of the outputs"
        raise VerificationError(f"the rewrite {what} of entry {name!r}", why=changed)
    for (output, was), now in zip(pairs, new.output_values, strict=True):
        expected = type_of(was.meta["val"]) if isinstance(was, fx.Node) else was
        if output.role is Role.UPDATE:
            expected = _as_the_state(before, after, output.name, expected)
        found = type_of(now.meta["val"]) if isinstance(now, fx.Node) else now
        same = same_type(expected, found) if isinstance(was, fx.Node) and isinstance(now, fx.Node) else was == now
        if not same:
            raise VerificationError(f"{output} of entry {name!r} was {expected} and is {found}")
        if output.role is Role.UPDATE and _unchanged(now, output.name) and not _unchanged(was, output.name):
            raise VerificationError(f"the {output} of entry {name!r} is dropped: the state is written back unchanged")


def _as_the_state(before: Program, after: Program, name: str, update: Any) -> Any:
    """The type of what updates a state: that of before, or where the state itself has another type now, the state's."""
    was, now = (type_of(program.weights[name].value) for program in (before, after))
    same = (
        isinstance(was, TensorType) and isinstance(now, TensorType) and (was.shape, was.dtype) == (now.shape, now.dtype)
    )
    return update if same else now


def _unchanged(value: Any, state: str) -> bool:
    return isinstance(value, fx.Node) and value.op == "placeholder" and value.meta["name"] == state
