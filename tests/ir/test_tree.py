"""Trees: how arguments and results nest, under names that are never the same."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import laconic
from helpers import bits, seeded
from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError
from laconic.ir.parse import parse_program
from laconic.ir.run import Runnable
from laconic.ir.text import print_program
from laconic.ir.tree import Leaf, leaves, match, plain

Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    a: Any
    b: Any = None


pytree.register_dataclass(Record)
X = torch.arange(6.0).reshape(2, 3)


def shape_of(value: Any) -> Any:
    flat, spec = pytree.tree_flatten(value)
    return plain(spec, list(range(len(flat))))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Pair(1, [2]), (0, [1])),
        (Record(1), {"a": 0}),
        ({0: 1, "a": 2}, {"0": 0, "a": 1}),
        ({(0, 1): 1, "a": 2}, UnsupportedError),
        ({1: 1, "1": 2}, UnsupportedError),
        (defaultdict(list, {"a": 1, "b": 2}), {"a": 0, "b": 1}),
        (OrderedDict(a=1, b=2), {"a": 0, "b": 1}),
    ],
)
def test_what_registered_classes_become(value: Any, expected: Any) -> None:
    if expected is UnsupportedError:
        with pytest.raises(UnsupportedError):
            shape_of(value)
    else:
        assert shape_of(value) == expected


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": 0, "a": {"b": 1}},
        {"a\\.b": 0, "a.b": 1, "a\\": {"b": 2}, "a": {"b": 3}},
        {"": {"a": 0}, "a": 1, "\\": {"a": 2}},
        {"a.0": 0, "a": (1, [2])},
    ],
)
def test_no_two_leaves_have_the_same_name(tree: Any) -> None:
    names = [name for name, _ in leaves(tree)]
    assert len(set(names)) == len(names)


def test_keys_that_are_numbers_are_matched_as_they_were_given() -> None:
    found: list[Any] = [None, None]
    assert match({"0": Leaf(0), "1": Leaf(1)}, {0: "x", 1: "y"}, found) == ""
    assert found == ["x", "y"]
    assert "keys" in match({"0": Leaf(0)}, {0: "x", "0": "y"}, found)


class Trees(nn.Module):
    def forward(self, given: Any) -> Any:
        if isinstance(given, Record):
            return Record(given.a * 2)
        if isinstance(given, Pair):
            return Pair(given.first * 2, given.second)
        return {0: given[0] + 1, "1": given[1]}


@pytest.mark.parametrize(
    ("given", "plainly"),
    [(Pair(X, X + 1), Pair(X, X + 1)), (Record(X), {"a": X}), ({0: X, 1: X + 1}, {0: X, 1: X + 1})],
    ids=["named tuple", "dataclass", "int keys"],
)
def test_modules_may_take_and_return_them(given: Any, plainly: Any) -> None:
    program = capture_module(Trees(), (given,), {})
    assert pytree.tree_leaves(bits(Runnable(program)(plainly))) == pytree.tree_leaves(bits(expected_plain(given)))


def expected_plain(given: Any) -> Any:
    found = Trees()(given)
    return {"a": found.a} if isinstance(found, Record) else tuple(found) if isinstance(found, tuple) else found


class Dotted(nn.Module):
    def forward(self, d: Any) -> Any:
        return {"a.b": d["a.b"] * 2, "a": {"b": d["a"]["b"] * 3}}


def test_keys_with_dots_survive_text_a_dir_pt2_and_onnx(tmp_path: Path) -> None:
    given = {"a.b": X, "a": {"b": X + 1}}
    result = laconic.optimize(Dotted(), inputs=(given,))
    names = [o.name for o in result.program.forward.outputs]
    assert names == ["a\\.b", "a.b"]
    text = print_program(result.program)
    assert print_program(parse_program(text, seeded())) == text
    result.save(tmp_path / "out", formats=("onnx", "pt2"))
    assert bits(laconic.load(tmp_path / "out")(given)) == bits(Dotted()(given))
    assert bits(torch.export.load(tmp_path / "out" / "model.pt2").module()(given)) == bits(Dotted()(given))
