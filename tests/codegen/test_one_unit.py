"""One translation unit for all C++ kernels: which kernels fit, and that they compute what they did apart."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile

import laconic.codegen.backend.inductor as inductor
from laconic.codegen.backend.inductor import one_unit
from laconic.codegen.backend.one_unit import LARGEST, Kernel, fits, write_unit
from laconic.codegen.backend.stats import GraphRecord

ARGUMENTS = ("const float*", "float*", "const int64_t", "long", "double", "float")
SCALE = """
#include <cmath>
#include <cstdint>
extern "C" void kernel(const float* in_ptr0,
                       float* out_ptr0,
                       const int64_t ks0,
                       long shift,
                       double factor,
                       float limit)
{
    for (int64_t i = 0; i < ks0; i++) {
        auto value = static_cast<float>(in_ptr0[i] * factor + shift);
        out_ptr0[i] = std::fmin(value, limit);
    }
}
"""
COUNT = """
#include <cstdint>
extern "C" void kernel(int64_t* out_ptr0, const bool* in_ptr0)
{
    #pragma GCC ivdep
    for (int64_t i = 0; i < 4; i++) { if (in_ptr0[i]) { out_ptr0[0] += 1; } }
}
"""
FAILING = """
#include <stdexcept>
#include <cstdint>
extern "C" void kernel(const int64_t which)
{
    if (which == 1) { throw std::out_of_range("index 7 is out of range"); }
    if (which == 2) { throw 3; }
}
"""


def submitted(*kernels: tuple[tuple[str, ...], str], record: GraphRecord | None = None) -> list[dict[str, Any]]:
    """Kernels as Inductor's generated modules ask for them, each module with a scope of its own, in one unit."""
    scopes: list[dict[str, Any]] = []
    with one_unit(record):
        for arguments, source in kernels:
            compiler = AsyncCompile()
            scopes.append({"kernel_of_mine": compiler.cpp_pybinding(list(arguments), source), "other": 1})
            compiler.wait(scopes[-1])
    return scopes


@pytest.fixture(scope="module")
def functions(_cache_of_its_own: None) -> list[Any]:
    """The functions of a unit with the three kernels, the first of them twice."""
    kernels = [(ARGUMENTS, SCALE), (("int64_t*", "const bool*"), COUNT), (("const int64_t",), FAILING)]
    record = GraphRecord()
    scopes = submitted(*kernels, kernels[0], record=record)
    assert (record.kernels, record.units) == (3, 1), "two equal kernels are one"
    assert all(scope["other"] == 1 for scope in scopes)
    return [scope["kernel_of_mine"] for scope in scopes]


def test_numbers_and_pointers_of_each_kind(functions: list[Any]) -> None:
    given, out = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3)
    functions[0](given, out, 3, 2, 1.5, 3.0)
    assert out.tolist() == [3.0, -1.0, 2.75]
    functions[0](given, out, 2, -1, 2, float("inf"))
    assert out.tolist() == [1.0, -5.0, 2.75], "an int for a float, a size that leaves one out, a negative number"


def test_views_begin_where_they_begin(functions: list[Any]) -> None:
    base = torch.arange(6.0)
    functions[0](base[3:], base[:3], 3, 0, 10.0, 1e9)
    assert base.tolist() == [30.0, 40.0, 50.0, 3.0, 4.0, 5.0]


def test_other_types(functions: list[Any]) -> None:
    count = torch.zeros(1, dtype=torch.int64)
    functions[1](count, torch.tensor([True, False, True, True]))
    assert count.item() == 3


def test_equal_kernels_are_one_function(functions: list[Any]) -> None:
    assert functions[3] is functions[0]


def test_errors_inside_are_errors_of_python(functions: list[Any]) -> None:
    functions[2](0)
    with pytest.raises(RuntimeError, match="index 7 is out of range"):
        functions[2](1)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        functions[2](2)


def test_arguments_that_are_wrong_are_errors_of_python(functions: list[Any]) -> None:
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match="another number of operands"):
        functions[0](one, one)
    with pytest.raises(TypeError):
        functions[0](one, one, "1", 0, 1.0, 1.0)
    with pytest.raises(TypeError):
        functions[0](one, one, 1, 0, "1", 1.0)
    with pytest.raises(OverflowError):
        functions[0](one, one, 1 << 70, 0, 1.0, 1.0)
    with pytest.raises(RuntimeError):
        functions[0](1, one, 1, 0, 1.0, 1.0)


def test_several_threads(functions: list[Any]) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        given, out = torch.full((4,), float(number)), torch.zeros(4)
        for _ in range(200):
            functions[0](given, out, 4, number, 2.0, 1e9)
            if out.tolist() != [3.0 * number] * 4:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_kernels_than_a_unit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def compile_unit(kernels: list[Kernel]) -> bool:
        made.append(len(kernels))
        for kernel in kernels:
            kernel.give(lambda: None)
        return True

    monkeypatch.setattr(inductor, "_compile_unit", compile_unit)
    record = GraphRecord()
    many = 2 * LARGEST + 1
    scopes = submitted(*((("const int64_t",), FAILING.replace("7", str(k))) for k in range(many)), record=record)
    assert made == [LARGEST, LARGEST, 1]
    assert (record.kernels, record.units) == (many, 3)
    assert all(callable(scope["kernel_of_mine"]) for scope in scopes)


def test_a_unit_inside_a_unit_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def compile_unit(kernels: list[Kernel]) -> bool:
        made.append(len(kernels))
        return True

    monkeypatch.setattr(inductor, "_compile_unit", compile_unit)
    with one_unit():
        submitted((("const int64_t",), FAILING))
        assert not made
        AsyncCompile().cpp_pybinding(["int64_t*", "const bool*"], COUNT)
    assert made == [2]


@pytest.mark.parametrize(("arguments", "source"), [(ARGUMENTS, SCALE), (("int64_t*", "const bool*"), COUNT)])
def test_fits(arguments: tuple[str, ...], source: str) -> None:
    assert fits(arguments, source)


UNFIT = {
    "a helper in front": (ARGUMENTS, SCALE.replace('extern "C"', 'static float one() { return 1; }\nextern "C"')),
    "a helper behind": (ARGUMENTS, SCALE + "\nint more() { return 2; }\n"),
    "a macro": (ARGUMENTS, SCALE.replace('extern "C"', '#define ONE 1\nextern "C"')),
    "a condition inside": (("const int64_t",), FAILING.replace("{\n", "{\n#ifdef X\n#endif\n", 1)),
    "another name": (ARGUMENTS, SCALE.replace("kernel", "other")),
    "a call of itself": (("const int64_t",), FAILING.replace("throw 3;", "kernel(0);")),
    "an argument that is no number": (("const int64_t", "std::string"), FAILING),
    "a reference": (("int64_t&",), FAILING),
}


@pytest.mark.parametrize(("arguments", "source"), UNFIT.values(), ids=UNFIT)
def test_does_not_fit(arguments: tuple[str, ...], source: str) -> None:
    assert not fits(arguments, source)


def test_what_does_not_fit_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(inductor, "_cpp_pybinding", lambda self, arguments, source: left.append(source))
    record = GraphRecord()
    submitted(UNFIT["a macro"], record=record)
    assert left == [UNFIT["a macro"][1]]
    assert (record.kernels, record.units) == (0, 0)
    AsyncCompile().cpp_pybinding(list(ARGUMENTS), SCALE)
    assert left[1:] == [SCALE], "outside of a unit nothing is collected"


def test_includes_are_said_once() -> None:
    kernels = [Kernel(ARGUMENTS, SCALE), Kernel(("int64_t*", "const bool*"), COUNT)]
    text = write_unit(kernels, "unit", "ADDRESS")
    assert text.count("#include <cstdint>") == text.count("#include <cmath>") == 1
    assert text.index("#include <cmath>") < text.index("static void kernel_0(") < text.index("static void kernel_1(")
