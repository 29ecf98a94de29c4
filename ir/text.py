"""The text form: a program written for people, and for the parser in `laconic.ir.parse`.

One line a fact, weight, input or node; `%x` is a value, `@name` a row of the weight table, `!3` the site. Types stand
behind every name; values of weights do not stand in the text. An outlined program has functions and calls of them. The
grammar is in `docs/text-form.md`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import torch
from torch import fx

from laconic.ir.outline import Label, label_of, reads_call, results_of, shift_of
from laconic.ir.program import Alias, Entry, Function, Kind, Program, Role, Weight
from laconic.ir.traits import op_name
from laconic.ir.tree import Leaf, Tree
from laconic.ir.types import DTYPE_NAMES, name_text, type_text, value_text

VERSION = 1
PLAIN_NAME = re.compile(r"[A-Za-z_0-9][\w.]*\Z", re.ASCII)

MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
LAYOUTS = {"strided": torch.strided}
_WORDS: dict[Any, str] = {
    **{value: name for name, value in MEMORY_FORMATS.items()},
    **{value: name for name, value in LAYOUTS.items()},
    **DTYPE_NAMES,
}


def print_program(program: Program) -> str:
    """The program as text. Equal programs print equally."""
    names = program.names
    lines = [f"laconic program {VERSION}", ""]
    lines += [f"fact {name_text(key)} = {json.dumps(value)}" for key, value in program.facts.items()]
    for symbol in program.symbols.values():
        high = "inf" if symbol.high is None else symbol.high
        lines.append(f"size {name_text(symbol.name)} in [{symbol.low}, {high}] like {symbol.hint}")
    lines += [weight_text(w, names) for w in program.weights.values()]
    lines += [f"alias {reference(name)} = {alias_text(alias)}" for name, alias in program.aliases.items()]
    for function in program.functions.values():
        lines += ["", *_function(program, function)]
    for entry in program.entries.values():
        lines += ["", *_entry(program, entry)]
    lines += ["", *_sites(program)]
    return "\n".join(lines).rstrip("\n") + "\n"


def reference(name: str) -> str:
    """A row of the weight table as text."""
    return f"@{name}" if PLAIN_NAME.match(name) else f"@{json.dumps(name)}"


def print_node(node: fx.Node, names: dict[str, str] | None = None) -> str:
    """One call as it stands in the text."""
    arguments = [value(a) for a in node.args] + [f"{k}={value(v)}" for k, v in node.kwargs.items()]
    line = f"%{node.name}: {value_text(node.meta.get('val'), names or {})} = "
    line += f"{op_name(node.target)}({', '.join(arguments)})"
    if "site" in node.meta:
        line += f" !{node.meta['site']}"
    if "by" in node.meta:
        line += f" by {name_text(node.meta['by'])}"
    return line


def value(argument: Any) -> str:
    """An argument, result or constant as text."""
    if isinstance(argument, fx.Node):
        is_row = argument.op == "placeholder" and argument.meta.get("kind", Kind.INPUT) != Kind.INPUT
        return reference(argument.meta["name"]) if is_row else f"%{argument.name}"
    if argument is None or isinstance(argument, (bool, int)):
        return repr(argument)
    if isinstance(argument, float):
        return ("nan" if math.isnan(argument) else repr(argument)) if not math.isinf(argument) else _inf(argument)
    if isinstance(argument, complex):
        return f"complex({value(argument.real)}, {value(argument.imag)})"
    if isinstance(argument, str):
        return json.dumps(argument)
    if isinstance(argument, torch.device):
        return f"device({json.dumps(str(argument))})"
    if isinstance(argument, (torch.dtype, torch.memory_format, torch.layout)) and argument in _WORDS:
        return _WORDS[argument]
    if isinstance(argument, list):
        return "[" + ", ".join(value(a) for a in argument) + "]"
    if isinstance(argument, tuple):
        return "(" + ", ".join(value(a) for a in argument) + ("," if len(argument) == 1 else "") + ")"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {value(v)}" for k, v in argument.items()) + "}"
    raise TypeError(f"{argument!r} has no text form")


def _inf(number: float) -> str:
    return "inf" if number > 0 else "-inf"


def weight_text(weight: Weight, names: dict[str, str]) -> str:
    line = f"{weight.kind} {reference(weight.name)}: {value_text(weight.value, names)}"
    return line + (" trainable" if weight.trainable else "") + ("" if weight.persistent else " transient")


def alias_text(alias: Alias) -> str:
    if alias.target is None:
        return "none"
    windows = [":" if w is None else f"{w[0]}:{w[1]}" for w in (alias.rows, alias.columns)]
    part = ", ".join(windows[: 2 if alias.columns else 1 if alias.rows else 0])
    return ("transpose " if alias.transposed else "") + reference(alias.target) + (f"[{part}]" if part else "")


def _function(program: Program, function: Function) -> list[str]:
    names = program.names
    lines = [f"function {name_text(function.name)} {{"]
    lines += [f"  slot %{slot.name}: {value_text(slot.meta['val'], names)}" for slot in function.slots()]
    lines += [f"  {print_node(node, names)}" for node in function.calls()]
    return [*lines, f"  return {value(function.results)}", "}"]


def _call(program: Program, call: fx.Node) -> str:
    """A call of a function: what its results are called, and how the sites and names of its nodes follow."""
    results = [f"%{node.name}: {value_text(node.meta['val'], program.names)}" for node in results_of(call)]
    operands = ", ".join(value(operand) for operand in call.args)
    line = f"{', '.join(results)} = call {name_text(str(call.target))}({operands})"
    labels: tuple[Label, ...] = call.meta["labels"]
    shift = shift_of([label_of(node) for node in program.functions[str(call.target)].calls()], labels)
    if shift is not None:
        return f"{line} !{shift:+}"
    return f"{line} as [{', '.join(f'%{name}' + ('' if site is None else f' !{site}') for name, site in labels)}]"


def _entry(program: Program, entry: Entry) -> list[str]:
    names = program.names
    lines = [f"entry {name_text(entry.name)} {{"]
    nodes = entry.input_nodes()
    for declared, node in zip(entry.inputs, nodes, strict=True):
        lines.append(
            f"  input %{node.name}: {value_text(node.meta['val'], names)}"
            f" in [{value(declared.low)}, {value(declared.high)}]"
            + (f" named {json.dumps(declared.name)}" if declared.name != node.name else "")
        )
    for name, tree in entry.arguments.items():
        lines.append(f"  argument {name_text(name)} = {tree_text(tree, list(nodes))}")
    for node in entry.graph.nodes:
        if node.op == "call_module":
            lines.append(f"  {_call(program, node)}")
        elif node.op == "call_function" and not reads_call(node):
            lines.append(f"  {print_node(node, names)}")
    results = []
    for output, given in zip(entry.outputs, entry.output_values, strict=True):
        if output.role is Role.RESULT:
            results.append(given)
            continue
        target = reference(output.name) if output.role is Role.UPDATE else json.dumps(output.name)
        seen = " seen " + ", ".join(map(json.dumps, output.seen)) if output.seen else ""
        lines.append(f"  update {target} = {value(given)}{seen}")
    lines.append(f"  return {tree_text(entry.results, results)}")
    return [*lines, "}"]


def tree_text(tree: Tree, values: list[Any]) -> str:
    if isinstance(tree, Leaf):
        return value(values[tree.index])
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {tree_text(v, values)}" for k, v in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(tree_text(v, values) for v in tree) + "]"
    if isinstance(tree, tuple):
        return "(" + ", ".join(tree_text(v, values) for v in tree) + ("," if len(tree) == 1 else "") + ")"
    return value(tree)


def _sites(program: Program) -> list[str]:
    """Runs of ids with the same place share a line."""
    lines: list[str] = []
    first = last = None
    for number, site in sorted(program.sites.items()):
        if first is not None and last is not None and number == last + 1 and site == program.sites[last]:
            last = number
            continue
        if first is not None and last is not None:
            lines.append(_site_line(program, first, last))
        first = last = number
    if first is not None and last is not None:
        lines.append(_site_line(program, first, last))
    return lines


def _site_line(program: Program, first: int, last: int) -> str:
    site = program.sites[first]
    return f"site {first}..{last} = {json.dumps(site.module)} {json.dumps(site.source)}"


__all__ = ["VERSION", "print_node", "print_program", "reference", "type_text", "value"]
