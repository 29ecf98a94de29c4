"""Every operator that is read, against the node tests that come with onnx and against the operators' own schemas."""

import inspect
import math
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from laconic.ir.errors import UnsupportedError
from laconic.ir.onnx import read_onnx
from laconic.ir.onnx.load import weight_of
from laconic.ir.onnx.table import Taken, find, operators

#: Tests of operators that are read which are refused all the same, and why.
REFUSED = {
    r"uint(16|32|64)|bitwise_not_3d": "torch has no such kernels for unsigned numbers beyond uint8",
    r"cast.*(FNUZ|INT4|INT2|E2M1|E8M0)": "torch tensors of these types are not in a Program",
    r"training_dropout": "draws at random, or is told to",
    r"gru_": "the reset gate before the product",
    r"lstm_with_peepholes": "torch has no peepholes",
    r"(window|center_crop_pad).*_expanded": "computes sizes in floating point from inputs",
    r"range_bfloat16": "its bounds are tensors",
}
#: Low precision rounds differently from operator to operator.
LEAST = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@cache
def node_tests() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return [case for case in collect_testcases(None) if case.model is not None]


def tensor(value: Any) -> torch.Tensor:
    proto = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value))
    return weight_of(proto, Path("a test"))


def with_constants(case: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model with what must be known before (shapes, axes) as initializers, and the inputs that are left."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    opset = next((entry.version for entry in model.opset_import if entry.domain == ""), 0)
    wanted = set()
    for node in model.graph.node:
        op = find(node.op_type, opset)
        kinds = [] if op is None else [*op.inputs, *[op.rest] * len(node.input)]
        wanted |= {name for name, kind in zip(node.input, kinds, strict=False) if kind is Taken.NUMBERS}
    given = {entry.name: value for entry, value in zip(case.model.graph.input, case.data_sets[0][0], strict=True)}
    for entry in list(model.graph.input):
        if entry.name in wanted and isinstance(given[entry.name], (np.ndarray, np.generic)):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(given.pop(entry.name)), entry.name))
            model.graph.input.remove(entry)
    return model, given


def differences(case: Any, path: Path) -> str:
    """What is wrong with the outputs, in words. Raises what reading and running raise."""
    model, given = with_constants(case)
    path.write_bytes(model.SerializeToString())
    source = read_onnx(path)
    with torch.no_grad():
        found = source.module(**dict(zip(source.kwargs, map(tensor, given.values()), strict=True)))
    for entry, value in zip(case.model.graph.output, case.data_sets[0][1], strict=True):
        wanted, got = tensor(value), found[entry.name]
        if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            return f"{entry.name}: {got.dtype}{list(got.shape)}, expected {wanted.dtype}{list(wanted.shape)}"
        slack = max(case.atol, LEAST.get(got.dtype, 1e-6))
        if got.dtype.is_floating_point or got.dtype.is_complex:
            same = torch.allclose(got.double(), wanted.double(), rtol=max(case.rtol, 1e-3), atol=slack, equal_nan=True)
        else:
            same = torch.equal(got, wanted)
        if not same:
            return f"{entry.name}: other values"
    return ""


def test_node_tests_of_onnx(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
    passed, wrong, unexpected, unread = 0, [], [], 0
    for case in node_tests():
        try:
            problem = differences(case, tmp_path / "node.onnx")
        except UnsupportedError as refusal:
            said = str(refusal)
            if re.search("operators that are not read|the input '|is written in opset|no standard operators", said):
                unread += 1
            elif not any(re.search(pattern, case.name) for pattern in REFUSED):
                unexpected.append(f"{case.name}: {said}")
            continue
        passed += not problem
        wrong += [f"{case.name}: {problem}"] if problem else []
    assert not wrong
    assert not unexpected
    assert passed >= 1340
    assert passed >= 0.7 * len(node_tests()), unread


def test_a_wrong_function_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in node_tests() if c.name == "test_cumsum_1d_reverse")
    assert differences(case, tmp_path / "node.onnx") == ""
    monkeypatch.setattr(torch, "flip", lambda x, dims: x)
    assert "other values" in differences(case, tmp_path / "node.onnx")


def test_unread_operators_are_those_without_fixed_sizes_or_tensors(tmp_path: Path) -> None:
    """What is refused before anything runs is refused by name, not by a failure later."""
    for name in ("NonZero", "If", "Loop", "Scan", "Compress", "Unique", "NonMaxSuppression", "SequenceEmpty"):
        case = next(c for c in node_tests() if any(n.op_type == name for n in c.model.graph.node))
        (tmp_path / "node.onnx").write_bytes(case.model.SerializeToString())
        with pytest.raises(UnsupportedError, match=rf"ai\.onnx\.{name} \(opset \d+\): \d+ node|the input"):
            read_onnx(tmp_path / "node.onnx")


# ------------------------------------------------------------------------------------------------- schemas

#: Attributes that ONNX has and the table leaves out: a model that sets them is refused.
_OF_CELLS = {"clip", "activation_alpha", "activation_beta"}
LEFT_OUT = {"LSTM": _OF_CELLS, "GRU": _OF_CELLS, "RNN": _OF_CELLS, "QuantizeLinear": {"precision"}}
#: Defaults that are written in another way and say the same.
SAME = {("Clip", "min"), ("Clip", "max"), ("RNN", "activations")}


def described() -> Iterator[tuple[str, Any, Any]]:
    """Each function of the table with each schema that it implements."""
    everything = onnx.defs.get_all_schemas_with_history()
    for name, rows in operators().items():
        history = [s for s in everything if s.name == name and s.domain == ""]
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            end = following.since if following else 1000
            first = max([s.since_version for s in history if s.since_version <= max(row.since, 7)], default=1)
            for schema in history:
                if first <= schema.since_version < end and not schema.deprecated:
                    yield name, row, schema


def test_the_table_says_what_the_schemas_say() -> None:
    seen = 0
    for name, row, schema in described():
        where = f"{name} at opset {schema.since_version}"
        assert set(schema.attributes) - set(row.attributes) <= LEFT_OUT.get(name, set()), where
        assert row.rest is not None or schema.max_input <= len(row.inputs), where
        for attribute, parameter in inspect.signature(row.function).parameters.items():
            if attribute not in schema.attributes or attribute not in row.attributes or (name, attribute) in SAME:
                continue
            seen += 1
            given = schema.attributes[attribute]
            if parameter.default is parameter.empty:
                assert given.required, f"{where}: {attribute}"
                continue
            wanted = onnx.helper.get_attribute_value(given.default_value) if given.default_value.type else None
            wanted = wanted.decode() if isinstance(wanted, bytes) else wanted
            if isinstance(wanted, float):
                assert math.isclose(wanted, parameter.default, rel_tol=1e-6), f"{where}: {attribute}"
            else:
                found = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                assert found == wanted, f"{where}: {attribute}"
    assert seen > 300
