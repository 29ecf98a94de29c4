"""Numbers that are known while a model is traced, and where ONNX means something else than torch."""

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

import laconic.ir.onnx  # noqa: F401 - fills the table
from laconic.ir.onnx.shapes import Numbers, elementwise, truncated
from laconic.ir.onnx.table import Refused, find

I64 = TensorProto.INT64


@pytest.mark.parametrize(("a", "b"), [(7, 2), (-7, 2), (7, -2), (-7, -2), (0, 3)])
def test_whole_numbers_divide_towards_zero(a: int, b: int) -> None:
    assert truncated(a, b) == int(torch.div(torch.tensor(a), torch.tensor(b), rounding_mode="trunc"))


def test_numbers_that_do_not_fit_are_left_to_tensors() -> None:
    def product(dtype: torch.dtype, *values: Any) -> Any:
        found = elementwise(lambda a, b: a * b, dtype, *(Numbers.scalar(v, dtype) for v in values))
        return None if found is None else found.item()

    assert product(torch.int32, 2**30, 2) is None
    assert product(torch.int64, 2**30, 2) == 2**31
    assert product(torch.float32, 0.1, 3.0) == float(np.float32(0.1 * 3.0))
    assert (
        elementwise(lambda a, b: a / b, torch.float32, *(Numbers.scalar(v, torch.float32) for v in (1.0, 0.0))) is None
    )


@pytest.mark.parametrize(
    ("name", "opset", "inputs", "attributes", "wanted"),
    [
        ("Mod", 18, [torch.tensor([-7, 7]), torch.tensor([3, -3])], {}, [2, -2]),
        ("Mod", 18, [torch.tensor([-7, 7]), torch.tensor([3, -3])], {"fmod": 1}, [-1, 1]),
        ("Div", 18, [torch.tensor([-7, 7]), torch.tensor([2, 2])], {}, [-3, 3]),
        ("TopK", 18, [torch.tensor([1.0, 3, 3, 2]), Numbers.of([2])], {}, [3, 3]),
        ("Softmax", 11, [torch.zeros(2, 2, 2)], {"axis": 1}, [[[0.25] * 2] * 2] * 2),
        ("Softmax", 13, [torch.zeros(1, 2)], {}, [[0.5, 0.5]]),
        ("Clip", 18, [torch.tensor([-1.0, 2.0]), None, Numbers.scalar(1.0, torch.float32)], {}, [-1.0, 1.0]),
        ("Gather", 18, [torch.tensor([1, 2, 3]), torch.tensor([-1, 0])], {}, [3, 1]),
        ("GatherElements", 18, [torch.tensor([1, 2, 3]), torch.tensor([-1, 0])], {}, [3, 1]),
        ("Reshape", 18, [torch.zeros(2, 3), Numbers.of([0, -1, 1])], {}, [[[0.0]] * 3] * 2),
        ("Cast", 18, [torch.tensor([-1.7, 1.7])], {"to": I64}, [-1, 1]),
        ("ReduceSum", 13, [torch.ones(2, 2), Numbers.of([])], {"noop_with_empty_axes": 1}, [[1.0, 1.0]] * 2),
        ("Slice", 18, [torch.arange(5), *(Numbers.of([n]) for n in (-1, -(2**63), 0, -2))], {}, [4, 2, 0]),
    ],
)
def test_where_onnx_differs_from_torch(
    name: str, opset: int, inputs: list[Any], attributes: dict[str, Any], wanted: Any
) -> None:
    op = find(name, opset)
    assert op is not None
    found = op(inputs, attributes, 1)[0]
    assert (found.tolist() if isinstance(found, torch.Tensor) else found) == wanted


def test_the_first_of_equal_values_comes_first() -> None:
    op = find("TopK", 18)
    assert op is not None
    x = torch.zeros(3, 50)
    assert op([x, Numbers.of([4])], {}, 2)[1].tolist() == [[0, 1, 2, 3]] * 3


def test_recurrent_layers_that_torch_has_not_are_refused() -> None:
    op = find("GRU", 18)
    assert op is not None
    with pytest.raises(Refused, match="linear_before_reset"):
        op([torch.zeros(2, 1, 3), torch.zeros(1, 6, 3), torch.zeros(1, 6, 2)], {}, 1)
