"""The graph of a .pt2, made harmless before torch reads it.

torch turns strings of the file into code: sizes are evaluated by sympy, names become identifiers of generated Python,
ops are looked up as attributes of `torch`, trees name modules to import, guards are run. Each of these strings is held
to a grammar here, or left out:

    sizes          calls of sympy's and torch's size functions on symbols and numbers (`pt2_sizes`)
    names          identifiers; names of weights: words, dots, dashes
    ops            aten and prims, Python's operators and math on sizes, torch.sym_*; none that opens a file
    trees          dicts, lists and tuples; classes with named parts become dicts
    guards, notes  left out; ranges of sizes stand apart and stay

Blocks that switch gradients or disable autocast are put in line: a Program runs without either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from laconic.ir.errors import ModelError, UnsupportedError
from laconic.ir.pt2_sizes import is_size

Json = dict[str, Any]

_OPERATORS = "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift getitem not_"
_OP = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+|torch\.sym_\w+|torch\._sym_\w+|math\.[a-z0-9]+"
    rf"|_operator\.({_OPERATORS.replace(' ', '|')})",
    re.ASCII,
)
_FILES = re.compile(r"torch\.ops\.aten\.(from_file|save|_print)\.")
_WEIGHT = re.compile(r"[\w.\-/ ]+")
_NO_GRAD = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_AUTOCAST = "torch.ops.higher_order.wrap_with_autocast"
_DIALECTS = {"TRAINING", "ATEN"}
_RANGED = re.compile(r"[a-z]+\d{1,6}", re.ASCII)


@dataclass(frozen=True)
class Graph:
    """A graph that torch may read, and the class of what the model returned, "" for a plain one."""

    data: Json
    returned: str


def cut(text: str, longest: int = 200) -> str:
    """A text of a file, or torch's repr of it, as one line that a person reads."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def is_weight_name(name: object) -> bool:
    """Whether something is a name that a weight may have: words, dots, dashes."""
    return isinstance(name, str) and _WEIGHT.fullmatch(name) is not None


def harmless(data: Json, where: str) -> Graph:
    """The graph of a .pt2, as its JSON, with nothing in it that torch would run.

    Raises UnsupportedError for what a Program does not hold, ModelError for what torch would not have written.
    """
    return _Graph(where).read(data)


@dataclass
class _Graph:
    where: str

    def read(self, data: Json) -> Graph:
        try:
            module = data["graph_module"]
            graph, renamed = self._inlined(module["graph"])
            signature = {
                "input_specs": module["signature"]["input_specs"],
                "output_specs": _renamed(module["signature"]["output_specs"], renamed),
            }
            call, returned = self._call(module["module_call_graph"], signature)
            dialects = data.get("verifiers", [])
            whole = {
                "graph_module": {
                    "graph": graph,
                    "signature": signature,
                    "module_call_graph": [call],
                    "metadata": {},
                    "treespec_namedtuple_fields": {},
                },
                "opset_version": data["opset_version"],
                "range_constraints": data["range_constraints"],
                "schema_version": data["schema_version"],
                "verifiers": dialects,
                "torch_version": str(data.get("torch_version", "")),
                "guards_code": [],
            }
            self._ranges(data["range_constraints"])
            if not set(dialects) <= _DIALECTS:
                self._unsupported(f"it is written in the dialect {', '.join(map(str, dialects))}")
            self._hold(whole)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as problem:
            self._damaged(f"{type(problem).__name__}: {problem}", problem)
        return Graph(whole, returned)

    def _damaged(self, why: str, cause: Exception | None = None) -> NoReturn:
        raise ModelError("the graph of the .pt2 is damaged", where=self.where, why=cut(why)) from cause

    def _unsupported(self, why: str, hint: str = "") -> NoReturn:
        raise UnsupportedError("the .pt2 cannot be read", where=self.where, why=cut(why), hint=hint)

    def _hold(self, value: Any, key: str = "") -> None:
        """Hold each string that torch would evaluate to its grammar."""
        if isinstance(value, list):
            for child in value:
                self._hold(child, key)
        elif isinstance(value, dict):
            for name, child in value.items():
                self._hold(child, name)
        elif key == "expr_str":
            self._size(value)
        elif key in ("name", "as_name", "user_input_name"):
            if value is not None and value != "" and not (isinstance(value, str) and value.isidentifier()):
                self._damaged(f"{value!r} is no name")
        elif key in ("parameter_name", "buffer_name", "tensor_constant_name"):
            if not is_weight_name(value):
                self._damaged(f"{value!r} is no name of a weight")
        elif key in ("target", "as_operator"):
            self._op(value)
        elif key in ("class_fqn", "custom_obj_name"):
            self._unsupported(f"it holds an object of the class {value!r}", "export a model of plain tensors")

    def _op(self, target: Any) -> None:
        if not isinstance(target, str) or _FILES.match(target):
            self._damaged(f"{target!r} is no op that may stand in a .pt2")
        if target.startswith("torch.ops.higher_order."):
            self._unsupported(f"it uses {target.rpartition('.')[2]}, an op that holds graphs of its own")
        if not _OP.fullmatch(target):
            self._unsupported(
                f"it uses {target}, which is no op of torch's own", "export before the pass that put it there"
            )

    def _size(self, text: Any) -> None:
        if not isinstance(text, str) or not is_size(text):
            self._damaged(f"{str(text)[:100]!r} is no size, or one out of all proportion")

    def _ranges(self, ranges: Json) -> None:
        for name, ends in ranges.items():
            if not _RANGED.fullmatch(name) or any(type(end) not in (int, type(None)) for end in ends.values()):
                self._damaged(f"{name!r} in {ends} is no range of a size")
            if name.startswith(("u", "zuf")):
                self._unsupported("a size in it depends on the values of tensors (as with nonzero, or .item())")

    def _inlined(self, graph: Json) -> tuple[Json, dict[str, str]]:
        """The graph without blocks that switch gradients or disable autocast, and the new names of their results."""
        values: dict[str, Json] = {key: dict(graph[key]) for key in _VALUES}
        renamed: dict[str, str] = {}
        nodes: list[Json] = []
        for node in graph["nodes"]:
            node = {**node, "inputs": _renamed(node["inputs"], renamed), "metadata": _notes(node.get("metadata") or {})}
            block = self._block(node)
            if block is None:
                nodes.append(node)
                continue
            inner, given = block
            body, results = self._apart(inner, given, f"{_names(node['outputs'])[0]}_", values)
            nodes += body
            renamed.update(zip(_names(node["outputs"]), results, strict=True))
        return {**graph, **values, "nodes": nodes, "outputs": _renamed(graph["outputs"], renamed)}, renamed

    def _block(self, node: Json) -> tuple[Json, list[str]] | None:
        """The graph of a block and what it is called with, if `node` is one that may be put in line."""
        arguments = [given["arg"] for given in node["inputs"]]
        inside = [k for k, argument in enumerate(arguments) if "as_graph" in argument]
        switches = arguments[: inside[0]] if inside else []
        harmless_ = node["target"] == _NO_GRAD or (
            node["target"] == _AUTOCAST and len(switches) > 2 and switches[2].get("as_bool") is False
        )
        if not harmless_ or len(inside) != 1:
            return None
        return arguments[inside[0]]["as_graph"]["graph"], _names(arguments[inside[0] + 1 :])

    def _apart(
        self, graph: Json, given: list[str], prefix: str, values: dict[str, Json]
    ) -> tuple[list[Json], list[str]]:
        """The nodes of a block for these operands, under names of their own, and the names of its results."""
        graph, _ = self._inlined(graph)
        taken = {name for table in values.values() for name in table}
        renamed = dict(zip(_names(graph["inputs"]), given, strict=True))
        for node in graph["nodes"]:
            for name in _names(node["outputs"]):
                fresh = prefix + name
                while fresh in taken:
                    fresh += "_"
                taken.add(fresh)
                renamed[name] = fresh
        for key, table in values.items():
            table.update({renamed[name]: value for name, value in graph[key].items() if renamed.get(name) not in table})
        body = [
            {
                **node,
                "inputs": _renamed(node["inputs"], renamed),
                "outputs": _renamed(node["outputs"], renamed),
                "name": renamed.get(node.get("name") or ""),
            }
            for node in graph["nodes"]
        ]
        return body, [renamed[name] for name in _names(graph["outputs"])]

    def _call(self, calls: list[Json], signature: Json) -> tuple[Json, str]:
        """How the model is called: plain trees, with as many leaves as there are inputs and outputs."""
        root = next(entry["signature"] for entry in calls if entry["fqn"] == "")
        taken, _ = self._tree(json.loads(root["in_spec"])[1])
        given, returned = self._tree(json.loads(root["out_spec"])[1])
        names = root.get("forward_arg_names")
        arguments = [
            kind for spec in signature["input_specs"] for kind in spec if kind in ("user_input", "constant_input")
        ]
        results = [kind for spec in signature["output_specs"] for kind in spec if kind == "user_output"]
        if len(arguments) != _leaves(taken) or len(results) != _leaves(given):
            self._damaged("its signature has another number of inputs or outputs than its trees")
        pair = taken["children_spec"]
        if [child["type"] for child in pair] != ["builtins.tuple", "builtins.dict"]:
            self._damaged("its arguments are no tuple and dict")
        for name in [*(names or []), *json.loads(pair[1]["context"])]:
            if not isinstance(name, str) or not name.isidentifier():
                self._damaged(f"{name!r} is no name of an argument")
        plain = {"inputs": [], "outputs": [], "in_spec": _dumped(taken), "out_spec": _dumped(given)}
        return {"fqn": "", "signature": {**plain, "forward_arg_names": names}}, returned

    def _tree(self, spec: Json) -> tuple[Json, str]:
        """A tree of dicts, lists and tuples, and the class of its root where that was another."""
        kind, context = spec["type"], spec["context"]
        if kind is None:
            return {"type": None, "context": None, "children_spec": []}, ""
        children = [self._tree(child)[0] for child in spec["children_spec"]]
        name = str(kind).rpartition(".")[2]
        if kind in ("builtins.list", "builtins.tuple"):
            return {"type": kind, "context": "null", "children_spec": children}, ""
        if kind in ("collections.namedtuple", "collections.deque"):
            return {"type": "builtins.tuple", "context": "null", "children_spec": children}, name
        keys = _keys(json.loads(context) if isinstance(context, str) else context)
        if len(keys) != len(children) or len({str(key) for key in keys}) != len(keys):
            self._unsupported(
                f"the model takes or returns a {name}, whose parts cannot be named",
                "export a model that takes and returns tensors in dicts, lists and tuples",
            )
        plain = {"type": "builtins.dict", "context": json.dumps(keys), "children_spec": children}
        return plain, "" if kind == "builtins.dict" else name


_VALUES = ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values")


def _notes(metadata: dict[str, Any]) -> dict[str, str]:
    """Where a node comes from: the user's lines and modules."""
    return {key: str(metadata[key]) for key in ("stack_trace", "nn_module_stack") if key in metadata}


def _keys(context: Any) -> list[str | int]:
    """The names of the parts of a mapping, as torch writes its context; [] where it has none."""
    if isinstance(context, dict):
        context = context.get("dict_context")  # of a defaultdict
    if isinstance(context, list) and len(context) == 2 and isinstance(context[0], list):
        context = context[0]  # of a dataclass: its fields, and those that are None
    if not isinstance(context, list) or not all(isinstance(key, (str, int)) for key in context):
        return []
    return context


def _leaves(spec: Json) -> int:
    return 1 if spec["type"] is None else sum(_leaves(child) for child in spec["children_spec"])


def _dumped(spec: Json) -> str:
    return json.dumps([1, spec])


def _named(value: Any) -> Iterator[tuple[Any, str]]:
    """Each place in arguments or results where a value of the graph stands: the dict and the key of its name."""
    if isinstance(value, list):
        for child in value:
            yield from _named(child)
    elif isinstance(value, dict):
        for key, child in value.items():
            if key == "as_name":
                yield value, key
            elif key == "arg" and isinstance(child, dict) and "name" in child:  # of what is written
                yield child, "name"
            elif key in ("as_tensor", "as_tensors", "as_optional_tensor", "as_optional_tensors", "as_nested_tensors"):
                yield from ((found, "name") for found in _tensors(child))
            elif key != "as_graph":
                yield from _named(child)


def _tensors(value: Any) -> Iterator[Json]:
    """The dicts that name a tensor, below one of the entries for tensors."""
    if isinstance(value, list):
        for child in value:
            yield from _tensors(child)
    elif isinstance(value, dict):
        if "name" in value:
            yield value
        else:
            yield from _tensors(value.get("as_tensor"))


def _names(value: Any) -> list[str]:
    return [found[key] for found, key in _named(value)]


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """A copy in which other values of the graph are named."""
    copy = json.loads(json.dumps(value))
    for found, key in list(_named(copy)):
        found[key] = names.get(found[key], found[key])
    return copy
