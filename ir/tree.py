"""Plain trees: how a model's arguments and results nest, in dict, list and tuple alone.

A `Tree` is a nesting of dicts with string keys, lists and tuples whose leaves are `Leaf(i)`, the i-th tensor (or
symbolic number) of a flat list, or constants (None, bool, int, float, str). Library classes such as a model's output
class are turned into these at capture, so that what is saved loads without the library that made it.
"""

from __future__ import annotations

from collections import defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree

from laconic.ir.errors import UnsupportedError

Tree = Any  # a recursive type that type checkers cannot yet say usefully: dict | list | tuple | Leaf | constant
CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Leaf:
    """A placeholder for the `index`-th value of a flat list."""

    index: int


def leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf with its dotted path, left to right. No two paths are the same: in a key, a dot and a backslash stand
    behind a backslash, and an empty key is a backslash."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            own = str(key).replace("\\", r"\\").replace(".", r"\.") or "\\"
            yield from leaves(child, f"{path}.{own}" if path else own)
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            yield from leaves(child, f"{path}.{i}" if path else str(i))
    else:
        yield path, tree


def transform(tree: Tree, on_leaf: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf replaced by `on_leaf(leaf)`."""
    if isinstance(tree, dict):
        return {key: transform(child, on_leaf) for key, child in tree.items()}
    if isinstance(tree, list):
        return [transform(child, on_leaf) for child in tree]
    if isinstance(tree, tuple):
        return tuple(transform(child, on_leaf) for child in tree)
    return on_leaf(tree)


def fill(tree: Tree, values: list[Any]) -> Any:
    """The nesting of `tree` around `values`; constants stay."""
    return transform(tree, lambda leaf: values[leaf.index] if isinstance(leaf, Leaf) else leaf)


def match(tree: Tree, value: Any, into: list[Any], path: str = "") -> str:
    """Take `value` apart along `tree`, writing leaves into the flat list `into`.

    Returns "" or the first place where the two differ, in words.
    """
    if isinstance(tree, Leaf):
        into[tree.index] = value
        return ""
    where = f"argument {path!r}" if path else "the arguments"
    if isinstance(tree, dict):
        given = {str(key): part for key, part in value.items()} if isinstance(value, dict) else {}
        if not isinstance(value, dict) or set(given) != set(tree) or len(given) != len(value):
            return f"{where}: expected a dict with keys {sorted(tree)}"
        pairs: list[tuple[Any, Any, Any]] = [(key, child, given[key]) for key, child in tree.items()]
    elif isinstance(tree, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(tree):
            return f"{where}: expected a sequence of {len(tree)}"
        pairs = [(i, child, value[i]) for i, child in enumerate(tree)]
    else:
        same = type(value) is type(tree) and value == tree
        return "" if same else f"{where}: captured as the constant {tree!r}, called with {value!r}"
    for key, child, part in pairs:
        problem = match(child, part, into, f"{path}.{key}" if path else str(key))
        if problem:
            return problem
    return ""


def plain(spec: pytree.TreeSpec, flat: list[Any], path: str = "") -> Tree:
    """A pytree specification with its leaves, as a plain tree.

    Registered classes become what they hold: a mapping (by its keys) or a tuple, as do named tuples. Keys become
    strings. Raises UnsupportedError for a class whose parts have no names and no order that we know, and for keys that
    are the same as strings.
    """
    if spec.is_leaf():
        return flat[0]
    children, at = [], 0
    for child in spec.children():
        children.append(plain(child, flat[at : at + child.num_leaves], path))
        at += child.num_leaves
    keys = _keys(spec)
    if keys is not None:
        return dict(zip(keys, children, strict=True))
    return children if spec.type is list else tuple(children)


def class_of(spec: pytree.TreeSpec) -> type | None:
    """The class of a node; torch keeps that of a named tuple elsewhere. None for a leaf."""
    kind: type | None = spec.context if spec.type is namedtuple else spec.type
    return kind


def _keys(spec: pytree.TreeSpec) -> list[str] | None:
    """The keys of a mapping-like node, None for a sequence."""
    kind = class_of(spec)
    if kind is None or issubclass(kind, (list, tuple, deque)):
        return None
    context = spec.context
    if kind is defaultdict:
        context = context[1]  # (default factory, keys)
    elif not issubclass(kind, dict) and isinstance(context, (list, tuple)) and len(context) == 2:
        context = context[0] if isinstance(context[0], (list, tuple)) else context  # dataclass: (names, those at None)
    names = list(context) if isinstance(context, (list, tuple)) else None
    if names is None or len(names) != len(spec.children()) or not all(isinstance(n, (str, int)) for n in names):
        if not spec.children():
            return None
        raise UnsupportedError(
            f"the model takes or returns a {kind.__name__}, whose parts cannot be named",
            hint="wrap the model so that it takes and returns tensors in dicts, lists and tuples",
        )
    twice = [key for key in names if [str(n) for n in names].count(str(key)) > 1]
    if twice:
        raise UnsupportedError(
            f"the model takes or returns a {kind.__name__} whose keys are the same as text",
            why=", ".join(map(repr, twice)),
            hint="wrap the model so that it uses strings as keys",
        )
    return [str(n) for n in names]
